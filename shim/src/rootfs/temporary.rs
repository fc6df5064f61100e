//! Files that are being made: named by their maker (pid and start time), so that whoever
//! comes later can tell a living maker's file from a dead one's and remove the latter.

use std::io;
use std::path::{Path, PathBuf};

use crate::process::ProcessId;

const PREFIX: &str = ".tmp-";

/// A file under construction, removed when dropped unless published.
pub(super) struct Temporary {
    path: PathBuf,
}

impl Temporary {
    pub(super) fn new(dir: &Path, name: &str) -> Self {
        use std::sync::atomic::{AtomicU32, Ordering};
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let this = ProcessId::this().unwrap_or(ProcessId { pid: std::process::id(), start: 0 });
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        Self { path: dir.join(format!("{PREFIX}{}-{}-{count}-{name}", this.pid, this.start)) }
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Gives the finished file its name and makes that durable.
    pub(super) fn publish(self, target: &Path) -> io::Result<()> {
        std::fs::rename(&self.path, target)?;
        let dir = target.parent().unwrap_or(Path::new("/"));
        std::fs::File::open(dir)?.sync_all()
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

/// Removes what dead makers left in `dir`.
pub(super) fn sweep(dir: &Path) {
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let Some(rest) = name.to_str().and_then(|name| name.strip_prefix(PREFIX)) else { continue };
        let mut parts = rest.split('-');
        let maker =
            parts.next().and_then(|pid| pid.parse().ok()).zip(parts.next().and_then(|s| s.parse().ok()));
        if maker.is_none_or(|(pid, start)| !ProcessId { pid, start }.is_alive()) {
            let _ = std::fs::remove_file(entry.path());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_dead_makers_files_are_swept() {
        let dir = tempfile::tempdir().unwrap();
        let ours = Temporary::new(dir.path(), "x");
        std::fs::write(ours.path(), b"").unwrap();
        std::fs::write(dir.path().join(".tmp-4194303-1-0-x"), b"").unwrap();
        std::fs::write(dir.path().join("image.erofs"), b"").unwrap();
        sweep(dir.path());
        let mut names: Vec<_> =
            std::fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        assert_eq!(names, [ours.path().file_name().unwrap(), "image.erofs".as_ref()]);
        drop(ours);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    }
}
