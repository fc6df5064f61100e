//! `/run/spore/<namespace>/<id>/`: the run-time state of one sandbox. It exists from
//! `start` until the last of the sandbox is gone; `delete` reclaims from it whatever a
//! killed shim left.

use std::fs::{DirBuilder, File, Permissions};
use std::io::{self, ErrorKind};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::network;
use crate::process::ProcessId;
use crate::rootfs;
use crate::snapshot::SnapshotId;

const RECORD: &str = "processes.json";
/// What a shim may take for its own end. containerd gives all of this 5 s.
const END_DEADLINE: Duration = Duration::from_secs(3);
/// How long a killed process may take to disappear.
const KILL_DEADLINE: Duration = Duration::from_secs(10);
/// How often others may remove the namespace's directory while it is being used.
const CREATE_ATTEMPTS: u32 = 1000;

/// Who belongs to the sandbox.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Record {
    pub(crate) shim: Option<ProcessId>,
    pub(crate) vmm: Option<ProcessId>,
    #[serde(default)]
    pub(crate) file_server: Option<ProcessId>,
    pub(crate) holder: Option<ProcessId>,
    /// VMM and file server of a machine that is to take the place of that one, or whose place it has taken, while there are two.
    #[serde(default)]
    pub(crate) others: Vec<ProcessId>,
    /// The shim is on its way out: who reclaims waits for it a little.
    #[serde(default)]
    pub(crate) ending: bool,
    /// The network namespace that was there before the sandbox, and stays after it.
    #[serde(default)]
    pub(crate) network: Option<PathBuf>,
    /// The inode of the one that the sandbox is in: others may have given it a path since.
    #[serde(default)]
    pub(crate) network_inode: Option<u64>,
    /// The machine's size, for whoever lists sandboxes.
    #[serde(default)]
    pub(crate) vcpus: Option<u8>,
    #[serde(default)]
    pub(crate) memory_mib: Option<u64>,
    /// The snapshot that its container hibernates in.
    #[serde(default)]
    pub(crate) hibernates_in: Option<SnapshotId>,
    /// It may have left snapshots that nobody else removes.
    #[serde(default)]
    pub(crate) has_hibernated: bool,
}

/// What others may know of a sandbox that runs.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Running {
    /// Of its shim's socket, `unix://…`.
    pub address: Option<String>,
    pub vcpus: Option<u8>,
    pub memory_mib: Option<u64>,
    /// The snapshot that its container hibernates in.
    pub hibernates_in: Option<SnapshotId>,
}

/// What the records of a sandbox tell; nothing when there are none.
pub fn running(run_dir: &Path, namespace: &str, id: &str) -> Running {
    let record = read(&RunDir::path_of(run_dir, namespace, id));
    let Some(shim) = record.shim.filter(|shim| shim.is_alive()) else { return Running::default() };
    // A shim works in its bundle, where its address stands for containerd.
    let address = std::fs::read_to_string(format!("/proc/{}/cwd/address", shim.pid)).ok();
    let address = address.map(|address| address.trim().to_owned());
    let Record { vcpus, memory_mib, hibernates_in, .. } = record;
    Running { address, vcpus, memory_mib, hibernates_in }
}

/// The directory, opened: its files are reached through the descriptor, because a socket's
/// path may have only 107 bytes and namespace and id are longer than that together.
#[derive(Debug)]
pub(crate) struct RunDir {
    path: PathBuf,
    dir: File,
}

impl RunDir {
    pub(crate) fn path_of(run_dir: &Path, namespace: &str, id: &str) -> PathBuf {
        run_dir.join(namespace).join(id)
    }

    /// Makes the directory, or opens the one that `start` made.
    pub(crate) fn create(run_dir: &Path, namespace: &str, id: &str) -> io::Result<Self> {
        let path = Self::path_of(run_dir, namespace, id);
        let make = || {
            DirBuilder::new().recursive(true).mode(0o700).create(&path)?;
            std::fs::set_permissions(&path, Permissions::from_mode(0o700))?;
            Self::open(&path)
        };
        // Another sandbox that ends removes the namespace's directory when it finds it empty,
        // and that may be just before ours is made in it, or just after it was found there.
        for _ in 1..CREATE_ATTEMPTS {
            match make() {
                Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::AlreadyExists) => {}
                other => return other,
            }
        }
        make()
    }

    /// The directory of a sandbox that there is.
    pub(crate) fn open(path: &Path) -> io::Result<Self> {
        Ok(Self { path: path.into(), dir: File::open(path)? })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn file(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// Makes a file, or empties it.
    pub(crate) fn create_file(&self, name: &str) -> io::Result<File> {
        File::options().write(true).create(true).truncate(true).mode(0o600).open(self.file(name))
    }

    /// Makes a file, or opens it to write at its end.
    pub(crate) fn append_file(&self, name: &str) -> io::Result<File> {
        File::options().append(true).create(true).mode(0o600).open(self.file(name))
    }

    /// A short name of `name` for `bind` and `connect`, valid in this process.
    pub(crate) fn socket(&self, name: &str) -> PathBuf {
        format!("/proc/self/fd/{}/{name}", self.dir.as_raw_fd()).into()
    }

    /// Changes the record, atomically.
    pub(crate) fn record(&self, change: impl FnOnce(&mut Record)) -> io::Result<()> {
        let mut record = read(&self.path);
        change(&mut record);
        let temporary = self.file(".processes.json");
        std::fs::write(&temporary, serde_json::to_vec(&record)?)?;
        std::fs::rename(temporary, self.file(RECORD))
    }

    /// Removes this very directory, and what goes with it. A shim that ends late finds its
    /// successor's (the same id was started meanwhile), and leaves that alone.
    pub(crate) fn remove(&self) -> io::Result<()> {
        if self.is_taken_over() {
            return Ok(());
        }
        for (layer, target) in layers_in(&self.contents()) {
            if layer == Layer::Ephemeral {
                rootfs::discard(&target);
            }
        }
        // Through the descriptor: never another directory of the same name.
        for entry in std::fs::read_dir(self.contents())? {
            let entry = entry?;
            let removed = match entry.file_type()?.is_dir() {
                true => std::fs::remove_dir_all(entry.path()),
                false => std::fs::remove_file(entry.path()),
            };
            gone(removed)?;
        }
        if self.is_current()? {
            gone(std::fs::remove_dir(&self.path))?;
        }
        remove_namespace(&self.path);
        Ok(())
    }

    fn contents(&self) -> PathBuf {
        format!("/proc/self/fd/{}", self.dir.as_raw_fd()).into()
    }

    /// Whether the path still names the directory that was opened.
    fn is_current(&self) -> io::Result<bool> {
        let ours = self.dir.metadata()?;
        let named = std::fs::symlink_metadata(&self.path);
        Ok(named.is_ok_and(|named| (named.dev(), named.ino()) == (ours.dev(), ours.ino())))
    }

    /// Whether another shim lives in it now.
    fn is_taken_over(&self) -> bool {
        let shim = read(&self.contents()).shim;
        shim.is_some_and(|shim| shim.pid != std::process::id() && shim.is_alive())
    }
}

fn gone(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// The namespace's directory goes with its last sandbox; others may be in it.
fn remove_namespace(path: &Path) {
    if let Some(parent) = path.parent() {
        let _ = std::fs::remove_dir(parent);
    }
}

/// A writable layer's directory, noted before anything is made in it, so that `delete` can
/// clean up there after a killed shim.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Layer {
    /// The rootfs snapshot's or the root directory's.
    Lasting,
    /// Goes with the run-time directory.
    Ephemeral,
}

impl Layer {
    fn prefix(self) -> &'static str {
        match self {
            Self::Lasting => "layer-",
            Self::Ephemeral => "ephemeral-",
        }
    }
}

/// Notes the layer of container `id`: a symbolic link, which is made at once or not at all.
pub(crate) fn note_layer(run_dir: &Path, layer: Layer, id: &str, target: &Path) -> io::Result<()> {
    let link = run_dir.join(format!("{}{id}", layer.prefix()));
    gone(std::fs::remove_file(&link))?;
    std::os::unix::fs::symlink(target, link)
}

/// The layers noted in the run-time directory `path`.
fn layers_in(path: &Path) -> Vec<(Layer, PathBuf)> {
    let noted = |entry: std::fs::DirEntry| {
        let name = entry.file_name();
        let is = |layer: &Layer| name.as_encoded_bytes().starts_with(layer.prefix().as_bytes());
        let layer = [Layer::Lasting, Layer::Ephemeral].into_iter().find(is)?;
        Some((layer, std::fs::read_link(entry.path()).ok()?))
    };
    std::fs::read_dir(path).into_iter().flatten().flatten().filter_map(noted).collect()
}

fn read(path: &Path) -> Record {
    // A record that is missing or torn names nobody; PDEATHSIG and the control socket end
    // the processes then.
    std::fs::read(path.join(RECORD))
        .ok()
        .and_then(|bytes| serde_json::from_slice(&bytes).ok())
        .unwrap_or_default()
}

/// Ends everything that the record of `path` names, sweeps the layers noted there and
/// removes the directory. Returns the record and what could not be done. Works in any
/// state, also when nothing is left.
pub(crate) fn reclaim(path: &Path) -> (Record, Vec<String>) {
    let record = read(path);
    let mut problems = Vec::new();
    let this = ProcessId::this().ok();
    // containerd calls as soon as a shim has answered Shutdown: it has its last events to send.
    if let Some(shim) = record.shim.filter(|_| record.ending)
        && let Err(error) = shim.wait(END_DEADLINE)
    {
        problems.push(format!("shim process {}: wait for its end: {error}", shim.pid));
    }
    // The shim first: a living one would report the end of its VM as an accident.
    let others = [("VMM", record.vmm), ("file server", record.file_server), ("holder", record.holder)];
    let others = others.into_iter().chain(record.others.iter().map(|other| ("rollback's", Some(*other))));
    for (name, process) in [("shim", record.shim)].into_iter().chain(others) {
        let Some(process) = process.filter(|process| Some(*process) != this) else { continue };
        if let Err(error) = process.kill(KILL_DEADLINE) {
            problems.push(format!("{name} process {}: kill: {error}", process.pid));
        }
    }
    // With the VMM its taps are gone.
    let kept = record.network_inode.and_then(network::kept);
    if let Some(namespace) = kept.or(record.network.clone())
        && let Err(error) = network::reclaim(&namespace)
    {
        problems.push(error.to_string());
    }
    for (_, layer) in layers_in(path) {
        rootfs::sweep_layer(&layer);
    }
    match RunDir::open(path).and_then(|dir| dir.remove()) {
        Err(error) if error.kind() == ErrorKind::NotFound => remove_namespace(path),
        Err(error) => problems.push(format!("run-time directory {}: remove: {error}", path.display())),
        Ok(()) => {}
    }
    (record, problems)
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::{UnixListener, UnixStream};
    use std::process::Command;

    use super::*;

    #[test]
    fn sockets_work_below_long_names() {
        let root = tempfile::tempdir().unwrap();
        let dir = RunDir::create(root.path(), &"n".repeat(76), &"i".repeat(76)).unwrap();
        let _listener = UnixListener::bind(dir.socket("vsock.sock")).unwrap();
        UnixStream::connect(dir.socket("vsock.sock")).unwrap();
        assert!(dir.file("vsock.sock").exists());
        dir.remove().unwrap();
        assert!(!dir.path().parent().unwrap().exists());
    }

    #[test]
    fn reclaiming_waits_for_a_shim_that_ends_by_itself() {
        let root = tempfile::tempdir().unwrap();
        let dir = RunDir::create(root.path(), "default", "web").unwrap();
        // It ends when its input does: when this thread has reclaim waiting.
        let mut shim = Command::new("cat").stdin(std::process::Stdio::piped()).spawn().unwrap();
        let id = ProcessId::of(shim.id()).unwrap();
        dir.record(|record| (record.shim, record.ending) = (Some(id), true)).unwrap();
        let path = dir.path().to_owned();
        let reclaiming = std::thread::spawn(move || reclaim(&path));
        drop(shim.stdin.take());
        let status = shim.wait().unwrap();
        assert!(status.success(), "{status}");
        assert_eq!(reclaiming.join().unwrap().1, Vec::<String>::new());
    }

    #[test]
    fn reclaiming_kills_what_is_recorded_and_nobody_else() {
        let root = tempfile::tempdir().unwrap();
        let dir = RunDir::create(root.path(), "default", "web").unwrap();
        let mut ours = Command::new("sleep").arg("1000").spawn().unwrap();
        let mut stranger = Command::new("sleep").arg("1000").spawn().unwrap();
        let vmm = ProcessId::of(ours.id()).unwrap();
        let reused = ProcessId { start: 1, ..ProcessId::of(stranger.id()).unwrap() };
        dir.record(|record| record.vmm = Some(vmm)).unwrap();
        dir.record(|record| record.holder = Some(reused)).unwrap();
        let (record, problems) = reclaim(dir.path());
        assert_eq!(problems, Vec::<String>::new());
        assert_eq!(record.vmm, Some(vmm));
        assert_eq!(ours.wait().unwrap().code(), None, "killed by a signal");
        assert!(stranger.try_wait().unwrap().is_none(), "a reused pid must be left alone");
        stranger.kill().unwrap();
        stranger.wait().unwrap();
        assert!(!dir.path().exists());
        assert_eq!(reclaim(dir.path()).1, Vec::<String>::new(), "idempotent");
    }

    #[test]
    fn a_torn_record_does_not_stop_reclaiming() {
        let root = tempfile::tempdir().unwrap();
        let dir = RunDir::create(root.path(), "default", "web").unwrap();
        std::fs::write(dir.file(RECORD), b"{\"shim\":").unwrap();
        assert_eq!(reclaim(dir.path()).1, Vec::<String>::new());
        assert!(!dir.path().exists());
    }

    #[test]
    fn sandboxes_begin_while_others_end_in_the_same_namespace() {
        let root = tempfile::tempdir().unwrap();
        std::thread::scope(|scope| {
            for id in ["a", "b", "c", "d"] {
                let root = root.path();
                scope.spawn(move || {
                    for _ in 0..500 {
                        let dir = RunDir::create(root, "default", id).unwrap();
                        dir.record(|record| record.ending = true).unwrap();
                        dir.remove().unwrap();
                    }
                });
            }
        });
        assert!(!root.path().join("default").exists());
    }

    #[test]
    fn a_late_end_leaves_the_successor_alone() {
        let root = tempfile::tempdir().unwrap();
        let first = RunDir::create(root.path(), "default", "web").unwrap();
        std::fs::remove_dir_all(first.path()).unwrap();
        let second = RunDir::create(root.path(), "default", "web").unwrap();
        std::fs::write(second.file("vsock.sock"), b"").unwrap();
        first.remove().unwrap();
        assert!(second.file("vsock.sock").exists(), "another directory");
        // Or it found the first one's directory and uses that.
        let mut shim = Command::new("sleep").arg("1000").spawn().unwrap();
        let id = ProcessId::of(shim.id()).unwrap();
        second.record(|record| record.shim = Some(id)).unwrap();
        RunDir::create(root.path(), "default", "web").unwrap().remove().unwrap();
        assert!(second.file("vsock.sock").exists(), "the same directory");
        shim.kill().unwrap();
        shim.wait().unwrap();
        second.remove().unwrap();
        assert!(!second.path().exists());
    }

    #[test]
    fn what_a_sandbox_noted_goes_with_its_directory() {
        let root = tempfile::tempdir().unwrap();
        let (view, snapshot) = (root.path().join("view"), root.path().join("snapshot"));
        for clean_end in [true, false] {
            let dir = RunDir::create(root.path(), "default", "web").unwrap();
            for target in [&view, &snapshot] {
                std::fs::create_dir_all(target).unwrap();
                std::fs::write(target.join(".tmp-1-1-1-1-0-x"), b"").unwrap();
                std::fs::write(target.join("writable.ext4"), b"").unwrap();
            }
            for _ in 0..2 {
                note_layer(dir.path(), Layer::Ephemeral, "web", &view).unwrap();
                note_layer(dir.path(), Layer::Lasting, "other", &snapshot).unwrap();
            }
            match clean_end {
                true => dir.remove().unwrap(),
                false => assert_eq!(reclaim(dir.path()).1, Vec::<String>::new()),
            }
            assert!(!dir.path().exists() && !view.exists());
            assert!(snapshot.join("writable.ext4").exists(), "user data");
            assert_eq!(snapshot.join(".tmp-1-1-1-1-0-x").exists(), clean_end, "delete sweeps");
        }
    }
}
