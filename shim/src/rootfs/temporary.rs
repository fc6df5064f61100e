//! Files and directories that are being made: named by their maker and its parent (pid and start time each),
//! so that whoever comes later can tell a living maker's file from a dead one's and remove
//! the latter. A maker whose parent has ended counts as dead: it ends with its parent, if
//! not at that very moment.

use std::io;
use std::path::{Path, PathBuf};

use crate::process::ProcessId;

const PREFIX: &str = ".tmp-";

/// A file or directory under construction, removed when dropped unless published.
pub(crate) struct Temporary {
    path: PathBuf,
}

impl Temporary {
    pub(crate) fn new(dir: &Path, name: &str) -> Self {
        Self::with_parent(dir, name, None)
    }

    /// In a process that lives no longer than its parent.
    pub(super) fn of_helper(dir: &Path, name: &str) -> Self {
        Self::with_parent(dir, name, ProcessId::of(std::os::unix::process::parent_id()).ok())
    }

    fn with_parent(dir: &Path, name: &str, parent: Option<ProcessId>) -> Self {
        use std::sync::atomic::{AtomicU32, Ordering};
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let this = ProcessId::this().unwrap_or(ProcessId { pid: std::process::id(), start: 0 });
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        Self { path: dir.join(file_name(this, parent, count, name)) }
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Gives what is finished its name and makes that durable.
    pub(crate) fn publish(self, target: &Path) -> io::Result<()> {
        std::fs::rename(&self.path, target)?;
        let dir = target.parent().unwrap_or(Path::new("/"));
        std::fs::File::open(dir)?.sync_all()
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        remove(&self.path);
    }
}

/// Whatever it is.
fn remove(path: &Path) {
    if std::fs::remove_file(path).is_err_and(|error| error.kind() == io::ErrorKind::IsADirectory) {
        let _ = std::fs::remove_dir_all(path);
    }
}

fn file_name(maker: ProcessId, parent: Option<ProcessId>, count: u32, name: &str) -> String {
    let parent = parent.unwrap_or(maker);
    format!("{PREFIX}{}-{}-{}-{}-{count}-{name}", maker.pid, maker.start, parent.pid, parent.start)
}

/// The maker and its parent, from what follows the prefix.
fn makers(rest: &str) -> Option<[ProcessId; 2]> {
    let mut parts = rest.split('-');
    let mut process = || {
        let (pid, start) = (parts.next()?, parts.next()?);
        Some(ProcessId { pid: pid.parse().ok()?, start: start.parse().ok()? })
    };
    Some([process()?, process()?])
}

/// Removes what dead makers left in `dir`, and the locks that they held.
pub(crate) fn sweep(dir: &Path) {
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let Some(rest) = name.to_str().and_then(|name| name.strip_prefix(PREFIX)) else { continue };
        if !makers(rest).is_some_and(|makers| makers.into_iter().all(ProcessId::is_alive)) {
            remove(&entry.path());
        }
    }
    super::lock::sweep(dir);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_dead_makers_files_are_swept() {
        let dir = tempfile::tempdir().unwrap();
        let ours = Temporary::new(dir.path(), "x");
        std::fs::write(ours.path(), b"").unwrap();
        let (this, dead) = (ProcessId::this().unwrap(), ProcessId { pid: 4_194_303, start: 1 });
        for name in [file_name(dead, None, 0, "x"), file_name(this, Some(dead), 0, "x"), ".tmp-x".into()] {
            std::fs::write(dir.path().join(name), b"").unwrap();
        }
        std::fs::write(dir.path().join("image.erofs"), b"").unwrap();
        let half = dir.path().join(file_name(dead, None, 1, "x"));
        std::fs::create_dir(&half).unwrap();
        std::fs::write(half.join("y"), b"").unwrap();
        sweep(dir.path());
        let mut names: Vec<_> =
            std::fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        assert_eq!(names, [ours.path().file_name().unwrap(), "image.erofs".as_ref()]);
        drop(ours);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    }
}
