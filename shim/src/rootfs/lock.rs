//! Locks by files and directories that may be removed: whoever gets the lock looks whether
//! its name still means what it locked, and begins anew when it does not.

use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use super::{RootfsError, private_dir};

const PREFIX: &str = ".lock-";
/// How often others may remove a directory while it is being made.
const ATTEMPTS: u32 = 1000;

/// A lock on one image, by a file that is removed when it is released.
pub(crate) struct KeyLock {
    path: PathBuf,
    _file: File,
}

impl KeyLock {
    pub(super) fn acquire(target: &Path) -> io::Result<Self> {
        let path = path_of(target);
        loop {
            let file = open(&path)?;
            file.lock()?;
            if is_still(&path, &file)? {
                return Ok(Self { path, _file: file });
            }
        }
    }

    /// `None` when somebody else has it.
    pub(crate) fn try_acquire(target: &Path) -> io::Result<Option<Self>> {
        let path = path_of(target);
        loop {
            let file = open(&path)?;
            match file.try_lock() {
                Ok(()) if is_still(&path, &file)? => return Ok(Some(Self { path, _file: file })),
                Ok(()) => {}
                Err(std::fs::TryLockError::WouldBlock) => return Ok(None),
                Err(std::fs::TryLockError::Error(error)) => return Err(error),
            }
        }
    }
}

fn open(path: &Path) -> io::Result<File> {
    OpenOptions::new().create(true).truncate(false).write(true).mode(0o600).open(path)
}

impl Drop for KeyLock {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

fn path_of(target: &Path) -> PathBuf {
    let mut name = std::ffi::OsString::from(PREFIX);
    name.push(target.file_name().unwrap_or_default());
    target.with_file_name(name)
}

/// Whether `path` still names the file that is locked.
pub(crate) fn is_still(path: &Path, file: &File) -> io::Result<bool> {
    let named = std::fs::metadata(path).ok().map(|metadata| (metadata.dev(), metadata.ino()));
    let ours = file.metadata()?;
    Ok(named == Some((ours.dev(), ours.ino())))
}

/// Makes the directory, unless it is there, and waits for its lock.
pub(super) fn directory(path: &Path) -> Result<File, RootfsError> {
    let mut attempts = 0;
    loop {
        attempts += 1;
        match try_make(path) {
            Ok(Some(dir)) => return Ok(dir),
            Ok(None) => {}
            // It or its parent was removed in the middle, by somebody who tidies up.
            Err(RootfsError::Host { source, .. })
                if attempts < ATTEMPTS
                    && matches!(source.kind(), ErrorKind::NotFound | ErrorKind::AlreadyExists) => {}
            Err(error) => return Err(error),
        }
    }
}

/// `None` when the directory was removed while its lock was being waited for.
fn try_make(path: &Path) -> Result<Option<File>, RootfsError> {
    let host = |operation| move |source| RootfsError::Host { operation, path: path.into(), source };
    private_dir(path)?;
    let dir = File::open(path).map_err(host("open"))?;
    dir.lock().map_err(host("lock"))?;
    Ok(is_still(path, &dir).map_err(host("look at"))?.then_some(dir))
}

/// The directory's lock, if nobody has it.
pub(super) fn try_directory(path: &Path) -> Option<File> {
    let dir = File::open(path).ok()?;
    (dir.try_lock().is_ok() && is_still(path, &dir).is_ok_and(|still| still)).then_some(dir)
}

/// Removes the lock files in `dir` that a killed process left.
pub(super) fn sweep(dir: &Path) {
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        if !entry.file_name().as_encoded_bytes().starts_with(PREFIX.as_bytes()) {
            continue;
        }
        let path = entry.path();
        let Ok(file) = OpenOptions::new().write(true).custom_flags(libc::O_NOFOLLOW).open(&path) else {
            continue;
        };
        // Removed while it is locked, as its holders do it: who waits for it begins anew.
        if file.try_lock().is_ok() && is_still(&path, &file).is_ok_and(|still| still) {
            let _ = std::fs::remove_file(&path);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    #[test]
    fn one_holder_at_a_time_also_under_sweeps_and_no_lock_file_stays() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("x.erofs");
        let inside = AtomicU32::new(0);
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    for _ in 0..50 {
                        let _lock = KeyLock::acquire(&target).unwrap();
                        assert_eq!(inside.fetch_add(1, Ordering::SeqCst), 0);
                        sweep(dir.path());
                        inside.fetch_sub(1, Ordering::SeqCst);
                    }
                });
            }
        });
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn only_lock_files_that_nobody_holds_are_swept() {
        let dir = tempfile::tempdir().unwrap();
        let held = KeyLock::acquire(&dir.path().join("held.erofs")).unwrap();
        for name in [".lock-dead.erofs", "image.erofs"] {
            std::fs::write(dir.path().join(name), b"").unwrap();
        }
        sweep(dir.path());
        let exists = |name: &str| dir.path().join(name).exists();
        assert!(exists(".lock-held.erofs") && exists("image.erofs"));
        assert!(!exists(".lock-dead.erofs"));
        drop(held);
    }

    #[test]
    fn what_is_no_directory_is_an_error() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let message = directory(file.path()).unwrap_err().to_string();
        assert!(message.contains(&file.path().display().to_string()), "{message}");
        assert!(try_directory(Path::new("/no/such/directory")).is_none());
    }

    #[test]
    fn a_directory_that_is_removed_under_the_waiting_is_made_anew() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("a/b");
        let parent = root.path().join("a");
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..100 {
                        let dir = directory(&path).unwrap();
                        assert!(is_still(&path, &dir).unwrap(), "the lock is on what the path names");
                        assert!(try_directory(&path).is_none());
                        std::fs::remove_dir(&path).unwrap();
                        let _ = std::fs::remove_dir(&parent);
                    }
                });
            }
        });
    }
}
