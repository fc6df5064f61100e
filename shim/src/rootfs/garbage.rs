//! Takes away what nobody needs in the state directory: layers whose root directory is gone,
//! disks of sandboxes that ended, files and restored disks that killed shims left half-made. Cheap when there is
//! nothing; problems are left to the next call.

use std::io;
use std::path::{Path, PathBuf};

use super::owner::Owner;
use super::writable::{self, DISK, EPHEMERAL, OWNER, WRITABLE};
use super::{changes, lock, temporary};

/// Removes layers without a living owner. None of them is in use: a layer's directory is
/// locked while it is prepared, its disk from then on.
pub(crate) fn collect_garbage(state_dir: &Path) {
    for dir in entries(&state_dir.join(WRITABLE)) {
        collect(&dir, is_abandoned);
    }
    for namespace in entries(&state_dir.join(EPHEMERAL)) {
        for dir in entries(&namespace) {
            discard(&dir);
        }
    }
}

/// Removes a layer that belonged to one sandbox, unless it is in use.
pub(crate) fn discard(dir: &Path) {
    collect(dir, |_| true);
    // The namespace's directory goes with its last sandbox, and theirs with the last of them.
    for parent in dir.ancestors().skip(1).take(2) {
        let _ = std::fs::remove_dir(parent);
    }
}

/// Removes what killed shims left half-made in the state directory.
pub(crate) fn sweep(state_dir: &Path) {
    for dir in ["images", "golden"] {
        temporary::sweep(&state_dir.join(dir));
    }
    for dir in entries(&state_dir.join(WRITABLE)) {
        sweep_files(&dir);
    }
}

fn sweep_files(dir: &Path) {
    temporary::sweep(dir);
    writable::restoring::sweep(dir);
}

/// The same for one directory of layers, wherever it is, of which the shim has gone: one that lives may be taking an export
/// back itself.
pub(crate) fn sweep_layer(dir: &Path) {
    sweep_files(dir);
    if let Some(_preparing) = lock::try_directory(dir) {
        // What cannot be taken back now is taken back by the next start.
        let _ = changes::sweep(dir);
    }
}

fn entries(dir: &Path) -> Vec<PathBuf> {
    std::fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.path()).collect()
}

fn is_abandoned(dir: &Path) -> bool {
    match std::fs::read(dir.join(OWNER)) {
        Ok(text) => serde_json::from_slice::<Owner>(&text).is_ok_and(|owner| owner.is_gone()),
        // The owner is written before anything else, so nobody has written here yet. Should
        // there be a disk nevertheless, its next task writes the owner again.
        Err(error) => error.kind() == io::ErrorKind::NotFound && !dir.join(DISK).exists(),
    }
}

fn collect(dir: &Path, is_garbage: impl FnOnce(&Path) -> bool) {
    let Some(_preparing) = lock::try_directory(dir) else { return };
    if !is_garbage(dir) {
        return;
    }
    // A running VM keeps its layer although the directory was removed under it.
    if let Ok(_unused) = writable::lock_existing(dir) {
        let _ = std::fs::remove_dir_all(dir);
    }
}
