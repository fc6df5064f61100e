//! The disk of a task that is being restored: a file beside it says so, from before the disk is there until the task begins to
//! run. Before that nothing in it is anybody's. So when the task does not come to that, as its shim was killed, the disk is
//! removed: by `delete`, or by the next who looks for a disk there, after a crash of the host too.

use std::fs::File;
use std::io;
use std::path::Path;

use super::{host, layers, lock_existing};
use crate::rootfs::{RootfsError, lock};

pub(super) const MARK: &str = "restoring";

/// Durable with the next that is made durable in the directory.
pub(super) fn begin(dir: &Path) -> Result<(), RootfsError> {
    let path = dir.join(MARK);
    File::create(&path).map(drop).map_err(host("make", &path))
}

pub(super) fn is_begun(dir: &Path) -> bool {
    dir.join(MARK).exists()
}

/// From now on the disk is its task's, durably.
pub(super) fn done(dir: &Path) -> Result<(), RootfsError> {
    let path = dir.join(MARK);
    match std::fs::remove_file(&path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(host("remove", &path)(error)),
        _ => {}
    }
    File::open(dir).and_then(|dir| dir.sync_all()).map_err(host("write back", dir))
}

/// Removes the disk of a task that never ran, if there is one. The caller has the directory's lock.
pub(super) fn discard(dir: &Path) -> Result<(), RootfsError> {
    if !is_begun(dir) {
        return Ok(());
    }
    match lock_existing(dir) {
        Ok(_unused) => layers::remove(dir),
        // A damaged one is no better than none.
        Err(RootfsError::BadLayer { .. }) => layers::remove(dir),
        Err(RootfsError::Host { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
            layers::remove(dir)
        }
        // It may be somebody's.
        Err(error) => Err(error),
    }
}

/// The same for whoever tidies up: unless somebody is at work there.
pub(in crate::rootfs) fn sweep(dir: &Path) {
    if is_begun(dir)
        && let Some(_preparing) = lock::try_directory(dir)
    {
        let _ = discard(dir);
    }
}
