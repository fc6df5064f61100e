//! The disks of a container's root file system (DESIGN 5): read-only EROFS images below, one
//! ext4 disk for writes above; overlayfs joins them in the guest.
//!
//! | source | read-only disks, uppermost first | writable disk lives in |
//! |---|---|---|
//! | overlayfs snapshotter, Docker | [upper directory's content] · merged layers (cache) | the rootfs snapshot's directory |
//! | erofs snapshotter | [upper directory's content] · its own images, one or merged | the same |
//! | native snapshotter, `--rootfs` | a copy of the directory | `<state_dir>/writable/<key>/` |
//! | read-only view | merged layers (cache) | `<state_dir>/ephemeral/<namespace>/<id>/` |

pub(crate) mod build;
pub(crate) mod changes;
mod containerd;
mod digest;
mod garbage;
mod images;
pub(crate) mod lock;
pub(crate) mod mountinfo;
mod owner;
mod source;
pub(crate) mod sparse;
mod superblock;
pub(crate) mod temporary;
mod upper;
mod writable;

pub(crate) use images::hex;
pub(crate) use lock::KeyLock;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
pub(crate) use temporary::{Temporary, sweep as sweep_temporary};

use containerd_shim_protos::api::Mount;
use slog::{Logger, debug, info};

use self::changes::Ground;
pub(crate) use self::changes::{Changes, ChangesError};
pub(crate) use self::digest::Image;
pub(crate) use self::garbage::{collect_garbage, discard, sweep, sweep_layer};
pub(crate) use self::source::Source;
pub use self::sparse::next_data;
pub(crate) use self::writable::layers::{Layers, PutBack, Rewind, StagedLayer, WritableDisk};

/// Read-only disks that one container may take of the slots that a VM has: more layers are
/// merged into one image.
pub(crate) const MOST_LAYER_DISKS: u8 = 1;

#[derive(Debug, thiserror::Error)]
pub(crate) enum RootfsError {
    #[error("root file system: {what} is not supported, allowed: {allowed}")]
    Unsupported { what: String, allowed: &'static str },
    #[error("root file system: {operation} {path}: {source}")]
    Host { operation: &'static str, path: PathBuf, source: io::Error },
    #[error(
        "root file system image {path}: {detail}; remove the file (it is made again), or pull the image again when it belongs to the erofs snapshotter"
    )]
    BadImage { path: PathBuf, detail: String },
    #[error("root file system image {path}: cannot be made: {detail}")]
    Build { path: PathBuf, detail: String },
    #[error("writable layer {path}: cannot be made: {detail}")]
    Format { path: PathBuf, detail: String },
    #[error("root file system: the disk that holds {path} is full: {detail}; free space there")]
    DiskFull { path: PathBuf, detail: String },
    #[error(
        "writable layer {path}: {detail}; its file system is damaged: remove the container and create it anew"
    )]
    BadLayer { path: PathBuf, detail: String },
    #[error(
        "writable layer {path}: there is one already, of which the checkpoint was not taken; restore into a new rootfs snapshot"
    )]
    Occupied { path: PathBuf },
    #[error(
        "root file system {path}: a client has changed it since the container ended, which the checkpoint does not have; start the container without the checkpoint, or restore it into a new rootfs snapshot"
    )]
    Changed { path: PathBuf },
    #[error(
        "writable layer {path}: in use by another sandbox; a root directory can serve one container at a time, use a copy of it"
    )]
    InUse { path: PathBuf },
}

/// What to prepare from.
pub(crate) struct Request<'a> {
    pub(crate) id: &'a str,
    pub(crate) namespace: &'a str,
    /// containerd's gRPC socket.
    pub(crate) containerd: &'a str,
    pub(crate) mounts: &'a [Mount],
    pub(crate) root: &'a Path,
    pub(crate) state_dir: &'a Path,
    /// The sandbox's run-time directory.
    pub(crate) run_dir: &'a Path,
    pub(crate) writable_size_mib: u64,
}

/// Open disks, ready to be attached.
#[derive(Debug)]
pub(crate) struct Disks {
    /// Uppermost first.
    pub(crate) lower: Vec<Image>,
    pub(crate) writable: WritableDisk,
    /// For a layer that has an upper directory on the host.
    pub(crate) changes: Option<Changes>,
    /// Of a restored disk that takes the place of another; to be committed when the machine is there.
    pub(crate) put_back: Option<PutBack>,
}

/// Which file of the host is which disk. The guest knows its disks by serials only, so what
/// it says of one tells the user nothing.
#[derive(Debug, Clone)]
pub(crate) struct Paths {
    lower: Vec<PathBuf>,
    writable: PathBuf,
}

impl Disks {
    pub(crate) fn paths(&self) -> Paths {
        Paths {
            lower: self.lower.iter().map(|image| path_of(image.file())).collect(),
            writable: path_of(&self.writable.top),
        }
    }
}

impl Paths {
    /// What the agent says when it cannot mount one of these disks (their serials in the order
    /// of [`Disks::lower`], and the writable one's), with the host's file and the mend.
    /// `None` when it says something else.
    pub(crate) fn explain(&self, lower: &[String], writable: &str, said: &str) -> Option<RootfsError> {
        let is_about = |serial: &str| said.contains(&format!("disk \"{serial}\": mount "));
        let detail = || format!("the guest cannot mount it: {said}");
        if is_about(writable) {
            return Some(RootfsError::BadLayer { path: self.writable.clone(), detail: detail() });
        }
        let (_, path) = lower.iter().zip(&self.lower).find(|(serial, _)| is_about(serial))?;
        Some(RootfsError::BadImage { path: path.clone(), detail: detail() })
    }
}

fn path_of(file: &File) -> PathBuf {
    std::fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd())).unwrap_or_default()
}

/// Checks what can be checked without work, so that a bad request fails before a VM boots.
pub(crate) fn find(request: &Request<'_>) -> Result<Source, RootfsError> {
    Source::find(request.mounts, request.root)
}

/// Whether a task has run on this rootfs snapshot before: there is what it has written. A directory may be anybody's.
pub(crate) fn has_run(request: &Request<'_>, source: &Source) -> Result<bool, RootfsError> {
    match source {
        Source::Directory { frozen: false, .. } => Ok(false),
        _ => writable::Place::find(source, request)?.has_run(),
    }
}

pub(crate) async fn prepare(
    request: &Request<'_>,
    source: Source,
    log: &Logger,
) -> Result<Disks, RootfsError> {
    debug!(log, "root file system"; "source" => ?source);
    private_dir(request.state_dir)?;
    let place = writable::Place::find(&source, request)?;
    place.note(request)?;
    let (upper, ground) = settle(&source, place.dir()).await?;
    let writable = {
        let (place, state_dir, size) =
            (place.clone(), request.state_dir.to_path_buf(), request.writable_size_mib);
        blocking(move || writable::open(&place, &state_dir, size))
    };
    let lower = lower(request, &source, ground, place.dir(), log);
    if place.is_collected() {
        // Nothing may be made in the directory before it has its owner and its disk is locked.
        let writable = writable.await?;
        return Ok(Disks { lower: lower.await?, writable, changes: None, put_back: None });
    }
    let (writable, lower) = tokio::join!(writable, lower);
    let (lower, writable) = (lower?, writable?);
    let changes = changes_of(upper, place.dir(), &writable)?;
    Ok(Disks { lower, writable, changes, put_back: None })
}

/// As [`prepare`], of a container that is restored: its writable disk is a copy of these files, and its other disks are the
/// caller's.
pub(crate) async fn restore(
    request: &Request<'_>,
    source: Source,
    files: Vec<File>,
) -> Result<Disks, RootfsError> {
    private_dir(request.state_dir)?;
    let place = writable::Place::find(&source, request)?;
    place.note(request)?;
    // What stands in the upper directory is in the disk, if the client wanted it.
    let upper = upper_of(&source);
    let (writable, put_back) = {
        let (place, upper) = (place.clone(), upper.clone());
        blocking(move || {
            if let Some(upper) = upper {
                let _preparing = lock::directory(place.dir())?;
                changes::settle_restored(&upper, place.dir())?;
            }
            writable::adopt(&place, &files)
        })
        .await?
    };
    let changes = changes_of(upper, place.dir(), &writable)?;
    Ok(Disks { lower: Vec::new(), writable, changes, put_back })
}

/// Makes a restored disk the one of its place.
pub(crate) async fn commit(put_back: PutBack) -> Result<(), RootfsError> {
    blocking(move || put_back.commit()).await
}

/// Removes the disk of a restore that has failed: a start of the container must not find it.
pub(crate) fn forget_restored(paths: &Paths) -> Result<(), RootfsError> {
    paths.writable.parent().map_or(Ok(()), writable::layers::remove)
}

fn changes_of(
    upper: Option<PathBuf>,
    dir: &Path,
    writable: &WritableDisk,
) -> Result<Option<Changes>, RootfsError> {
    let Some(upper) = upper else { return Ok(None) };
    let size = writable.size().map_err(|source| RootfsError::Host {
        operation: "look at the writable layer in",
        path: dir.into(),
        source,
    })?;
    Ok(Some(Changes::new(&upper, dir, size)))
}

fn upper_of(source: &Source) -> Option<PathBuf> {
    match source {
        Source::Overlay { upper, .. } | Source::Images { upper, .. } => {
            upper.as_ref().map(|found| found.upper.clone())
        }
        Source::Directory { .. } => None,
    }
}

/// The upper directory, and what of it, or of a copy, the guest gets.
async fn settle(source: &Source, beside: &Path) -> Result<(Option<PathBuf>, Ground), RootfsError> {
    let Some(found) = upper_of(source) else { return Ok((None, Ground::Nothing)) };
    let (upper, beside) = (found.clone(), beside.to_path_buf());
    let ground = blocking(move || {
        let _preparing = lock::directory(&beside)?;
        changes::settle(&upper, &beside)
    });
    Ok((Some(found), ground.await?))
}

async fn lower(
    request: &Request<'_>,
    source: &Source,
    ground: Ground,
    beside: &Path,
    log: &Logger,
) -> Result<Vec<Image>, RootfsError> {
    let state_dir = request.state_dir;
    let mut disks = Vec::new();
    match source {
        Source::Directory { path, frozen } => {
            // A snapshot's directory is nobody else's and is converted once; a directory of
            // the user's may have changed since the last task.
            let target = beside.join("base.erofs");
            disks.push(Image::other(images::tree(state_dir, path, &target, !frozen).await?));
        }
        Source::Overlay { lowers, .. } => {
            disks.extend(upper_disk(state_dir, ground, beside).await?);
            disks.push(merged(request, lowers, log).await?);
        }
        Source::Images { images, .. } => {
            disks.extend(upper_disk(state_dir, ground, beside).await?);
            if images.len() <= usize::from(MOST_LAYER_DISKS) {
                for image in images {
                    disks.push(Image::other(images::open(image)?));
                }
            } else {
                // The snapshotter has mounted each on the directory beside it.
                let mounted: Vec<PathBuf> = images.iter().map(|image| image.with_file_name("fs")).collect();
                disks.push(merged(request, &mounted, log).await?);
            }
        }
    }
    Ok(disks)
}

async fn merged(request: &Request<'_>, lowers: &[PathBuf], log: &Logger) -> Result<Image, RootfsError> {
    let key = match containerd::chain_id(request).await {
        Ok(Some(chain)) => images::chain_key(&chain),
        Ok(None) => None,
        Err(detail) => {
            info!(log, "containerd does not tell the chain id, the layers' identity serves instead"; "cause" => detail);
            None
        }
    };
    let key = match key {
        Some(key) => key,
        None => images::directories_key(lowers)?,
    };
    images::merged(request.state_dir, &key, lowers).await
}

async fn upper_disk(state_dir: &Path, ground: Ground, beside: &Path) -> Result<Option<Image>, RootfsError> {
    match ground {
        Ground::Directory(directory) => {
            Ok(upper::image(state_dir, &directory, beside).await?.map(Image::other))
        }
        Ground::Nothing => Ok(None),
    }
}

/// Makes a directory for the shim alone, parents included.
fn private_dir(path: &Path) -> Result<(), RootfsError> {
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(|source| RootfsError::Host {
        operation: "create",
        path: path.into(),
        source,
    })
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, RootfsError> + Send + 'static,
) -> Result<T, RootfsError> {
    tokio::task::spawn_blocking(work).await.unwrap_or_else(|error| {
        Err(RootfsError::Host { operation: "prepare", path: PathBuf::new(), source: io::Error::other(error) })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_agent_says_of_a_disk_is_told_with_the_hosts_file() {
        let dir = tempfile::tempdir().unwrap();
        let file = |name: &str| File::create(dir.path().join(name)).unwrap();
        file("writable.ext4");
        let layers = writable::layers::Layers::find(dir.path()).unwrap().unwrap();
        let writable = layers.open().unwrap();
        let image = |name| Image::other(file(name));
        let lower = vec![image("upper.erofs"), image("chain.erofs")];
        let disks = Disks { lower, writable, changes: None, put_back: None };
        let lower = ["ro0".to_string(), "ro1".to_string()];
        let explain = |said: &str| {
            disks.paths().explain(&lower, "rw0", said).map(|error| error.to_string()).unwrap_or_default()
        };
        let image = explain("disk \"ro1\": mount as erofs: Invalid argument");
        assert!(image.contains("/chain.erofs") && image.contains("remove the file"), "{image}");
        assert!(image.contains("Invalid argument"), "{image}");
        let layer = explain("disk \"rw0\": mount as ext4: Structure needs cleaning");
        assert!(layer.contains("/writable.ext4") && layer.contains("create it anew"), "{layer}");
        assert_eq!(explain("exec: \"x\": executable file not found in $PATH"), "");
    }
}
