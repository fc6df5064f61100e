//! `/run/spore/<namespace>/<id>/`: the run-time state of one sandbox. It exists from
//! `start` until the last of the sandbox is gone; `delete` reclaims from it whatever a
//! killed shim left.

use std::fs::{DirBuilder, File, Permissions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::process::ProcessId;

const RECORD: &str = "processes.json";
/// How long a killed process may take to disappear.
const KILL_DEADLINE: Duration = Duration::from_secs(10);

/// Who belongs to the sandbox.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Record {
    pub(crate) shim: Option<ProcessId>,
    pub(crate) vmm: Option<ProcessId>,
    pub(crate) holder: Option<ProcessId>,
    /// The socket's address as containerd knows it.
    pub(crate) address: Option<String>,
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
        DirBuilder::new().recursive(true).mode(0o700).create(&path)?;
        std::fs::set_permissions(&path, Permissions::from_mode(0o700))?;
        let dir = File::open(&path)?;
        Ok(Self { path, dir })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn file(&self, name: &str) -> PathBuf {
        self.path.join(name)
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

    pub(crate) fn remove(&self) -> io::Result<()> {
        remove(&self.path)
    }
}

fn read(path: &Path) -> Record {
    // A record that is missing or torn names nobody; PDEATHSIG and the control socket end
    // the processes then.
    std::fs::read(path.join(RECORD))
        .ok()
        .and_then(|bytes| serde_json::from_slice(&bytes).ok())
        .unwrap_or_default()
}

fn remove(path: &Path) -> io::Result<()> {
    match std::fs::remove_dir_all(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => {
            // The namespace's directory goes with its last sandbox; others may be in it.
            if let Some(parent) = path.parent() {
                let _ = std::fs::remove_dir(parent);
            }
            Ok(())
        }
    }
}

/// Ends everything that the record of `path` names and removes the directory. Returns the
/// record and what could not be done. Works in any state, also when nothing is left.
pub(crate) fn reclaim(path: &Path) -> (Record, Vec<String>) {
    let record = read(path);
    let mut problems = Vec::new();
    let this = ProcessId::this().ok();
    // The shim first: a living one would report the end of its VM as an accident.
    for (name, process) in [("shim", record.shim), ("VMM", record.vmm), ("holder", record.holder)] {
        let Some(process) = process.filter(|process| Some(*process) != this) else { continue };
        if let Err(error) = process.kill(KILL_DEADLINE) {
            problems.push(format!("{name} process {}: kill: {error}", process.pid));
        }
    }
    if let Err(error) = remove(path) {
        problems.push(format!("run-time directory {}: remove: {error}", path.display()));
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
}
