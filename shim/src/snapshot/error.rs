//! What can be wrong with a store and the snapshots in it.

use std::io;
use std::path::{Path, PathBuf};

use super::manifest::{ManifestError, SnapshotId};

#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    #[error("snapshot store: {operation} {path}: {source}", path = path.display())]
    Host { operation: &'static str, path: PathBuf, source: io::Error },
    #[error("snapshot store: the disk that holds {path} is full: {operation}: {source}; free space there or remove snapshots", path = path.display())]
    DiskFull { operation: &'static str, path: PathBuf, source: io::Error },
    #[error("snapshot {wanted:?}: there is none in {store}", store = store.display())]
    NoSuch { wanted: String, store: PathBuf },
    #[error("snapshot {wanted:?}: {count} snapshots are meant by that; give the id")]
    Ambiguous { wanted: String, count: usize },
    #[error("template {name:?}: {detail}")]
    BadName { name: String, detail: &'static str },
    #[error("template {name:?}: snapshot {id} has this name; remove it, or choose another name")]
    NameTaken { name: String, id: SnapshotId },
    #[error("snapshot {wanted:?}: it is no template; `spore snapshot rm` removes it")]
    NoTemplate { wanted: String },
    #[error("snapshot {id}: there is another one with this id; remove it first")]
    Exists { id: SnapshotId },
    #[error("snapshot {id}: {source}")]
    Manifest { id: SnapshotId, source: ManifestError },
    #[error("snapshot {id}: {file}: {source}")]
    File { id: SnapshotId, file: String, source: FileError },
    #[error(
        "snapshot {id}: its ancestors go round in a circle at {at}: manifests were tampered with; remove one"
    )]
    Cycle { id: SnapshotId, at: SnapshotId },
    #[error(
        "snapshot store: {needed} bytes are needed; {path} has {free} free, of which {reserve} are kept for the host: free space there, or remove snapshots", path = path.display()
    )]
    NoRoom { needed: u64, free: u64, reserve: u64, path: PathBuf },
    #[error(
        "snapshot store: {needed} bytes are needed; {used} of the quota of {quota} are used: remove snapshots, or raise the quota"
    )]
    Quota { needed: u64, used: u64, quota: u64 },
}

/// A file of a snapshot is not what its manifest says.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    #[error("the file is missing")]
    Missing,
    #[error("it is no regular file")]
    Kind,
    #[error("it has {found} bytes, the manifest says {expected}: it was cut or is another's")]
    Length { found: u64, expected: u64 },
    #[error("it is damaged: its digest is {found}, the manifest says {expected}")]
    Digest { found: String, expected: String },
    #[error("read: {0}")]
    Read(#[from] io::Error),
}

/// For `map_err`: names operation and path; a full disk is told apart.
pub(super) fn host(operation: &'static str, path: &Path) -> impl FnOnce(io::Error) -> StoreError {
    let path = path.to_path_buf();
    move |source| match source.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            StoreError::DiskFull { operation, path, source }
        }
        _ => StoreError::Host { operation, path, source },
    }
}

impl StoreError {
    /// Whether the snapshot is what no snapshot of ours is, so that nobody can use it any more. A newer release's is none
    /// of these, nor is one that just cannot be read now.
    pub(super) fn is_damage(&self) -> bool {
        match self {
            Self::Manifest { source, .. } => !matches!(source, ManifestError::Newer { .. }),
            Self::File { source: FileError::Read(error), .. } => error.raw_os_error() == Some(libc::EIO),
            Self::File { .. } => true,
            _ => false,
        }
    }

    /// The same for work on a snapshot's files outside the store.
    pub(crate) fn own<'a, P: AsRef<Path> + ?Sized>(
        operation: &'static str,
        path: &'a P,
    ) -> impl FnOnce(io::Error) -> Self + use<'a, P> {
        host(operation, path.as_ref())
    }
}
