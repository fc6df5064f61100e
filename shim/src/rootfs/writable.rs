//! The writable layer: an ext4 disk whose life is the rootfs snapshot's, not the task's.
//! It is a sparse copy of a golden file system, made once for each size, with layers above it once it was
//! captured ([`layers`]).

pub(crate) mod layers;
pub(super) mod restoring;

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use self::layers::{Layers, PutBack, WritableDisk};
use super::owner::Owner;
use super::source::Source;
use super::temporary::{self, Temporary};
use super::{Request, RootfsError, lock, private_dir, sparse};
use crate::rundir::{self, Layer};

pub(super) const DISK: &str = "writable.ext4";
pub(super) const OWNER: &str = "owner.json";
/// Changes with the options of mkfs.ext4, so that templates of an earlier version are not used.
const GOLDEN_FORMAT: &str = "2";
/// Below the state directory: layers of root directories that have no snapshot around them.
pub(super) const WRITABLE: &str = "writable";
/// Below the state directory: layers that go with their sandbox.
pub(super) const EPHEMERAL: &str = "ephemeral";
/// In a rootfs snapshot's directory, removed with it by its snapshotter.
const DIRECTORY: &str = "spore";

/// Where the writable disk lives.
#[derive(Debug, Clone)]
pub(super) struct Place {
    dir: PathBuf,
    life: Life,
}

/// What the layer goes with.
#[derive(Debug, Clone)]
enum Life {
    /// The rootfs snapshot whose directory it is in.
    Snapshot,
    /// A root directory elsewhere.
    Owned(Owner),
    Sandbox,
}

impl Place {
    pub(super) fn find(source: &Source, request: &Request<'_>) -> Result<Self, RootfsError> {
        match source {
            Source::Overlay { upper: Some(upper), .. } | Source::Images { upper: Some(upper), .. } => {
                let snapshot = upper.work.parent().unwrap_or(&upper.work);
                Ok(Self { dir: snapshot.join(DIRECTORY), life: Life::Snapshot })
            }
            // A view is read-only by its maker's wish; what is written is as short-lived as
            // the sandbox, but not in the run-time directory: that is the host's memory.
            Source::Overlay { upper: None, .. } | Source::Images { upper: None, .. } => {
                let names = [plain_name(request.namespace)?, plain_name(request.id)?];
                let dir = request.state_dir.join(EPHEMERAL).join(names[0]).join(names[1]);
                Ok(Self { dir, life: Life::Sandbox })
            }
            Source::Directory { path, .. } => {
                let owner = Owner::of(path).map_err(|source| RootfsError::Host {
                    operation: "look at the root directory",
                    path: path.clone(),
                    source,
                })?;
                let dir = request.state_dir.join(WRITABLE).join(owner.key());
                Ok(Self { dir, life: Life::Owned(owner) })
            }
        }
    }

    pub(super) fn dir(&self) -> &Path {
        &self.dir
    }

    /// Whether only the disk's lock keeps the directory from being collected.
    pub(super) fn is_collected(&self) -> bool {
        !matches!(self.life, Life::Snapshot)
    }

    /// There is a disk, and it is not one that was restored for a task that never ran.
    pub(super) fn has_run(&self) -> Result<bool, RootfsError> {
        let lasts = !matches!(self.life, Life::Sandbox);
        Ok(lasts && !restoring::is_begun(&self.dir) && Layers::find(&self.dir)?.is_some())
    }

    /// Notes in the run-time directory where something is going to be made.
    pub(super) fn note(&self, request: &Request<'_>) -> Result<(), RootfsError> {
        let layer = match self.life {
            Life::Sandbox => Layer::Ephemeral,
            _ => Layer::Lasting,
        };
        rundir::note_layer(request.run_dir, layer, request.id, &self.dir).map_err(|source| {
            RootfsError::Host { operation: "note the layer in", path: request.run_dir.into(), source }
        })
    }
}

/// Identifiers come from a client; one that is a path would lead elsewhere.
fn plain_name(name: &str) -> Result<&str, RootfsError> {
    if name.is_empty() || name.starts_with('.') || name.contains('/') {
        return Err(RootfsError::Unsupported {
            what: format!("the identifier {name:?}"),
            allowed: "names without '/' that do not begin with '.'",
        });
    }
    Ok(name)
}

/// Opens the layer, making it at first use, and locks it for this sandbox.
pub(super) fn open(place: &Place, state_dir: &Path, size_mib: u64) -> Result<WritableDisk, RootfsError> {
    let _preparing = enter(place)?;
    let disk = place.dir.join(DISK);
    if let Some(layers) = Layers::find(&place.dir)? {
        return layers.open();
    }
    layers::remove(&place.dir)?;
    let golden = golden(state_dir, size_mib)?;
    publish(&place.dir, DISK, |copy| sparse::copy(&golden, copy)).map_err(host("make", &disk))?;
    let made = Layers::find(&place.dir)?;
    made.ok_or_else(|| host("open", &disk)(io::ErrorKind::NotFound.into()))?.open()
}

/// As [`open`], for a layer that shall be what these files are: where there is none, see [`Layers::adopt`], and it goes with its
/// sandbox until [`Layers::keep`]; where there is one that has them, [`Layers::put_back`].
pub(super) fn adopt(place: &Place, files: &[File]) -> Result<(WritableDisk, Option<PutBack>), RootfsError> {
    let _preparing = enter(place)?;
    let Some(there) = Layers::find(&place.dir)? else {
        return Ok((Layers::adopt(&place.dir, files)?.open()?, None));
    };
    let put_back = there.put_back(files)?;
    let (disk, put_back) = put_back.ok_or_else(|| RootfsError::Occupied { path: place.dir.clone() })?;
    Ok((disk, Some(put_back)))
}

/// Locks the place while its disk is looked for and made. Two sandboxes that begin at once must not each make one: the second's
/// rename would take the first's disk away. Nor may the layer be collected before its disk is locked.
fn enter(place: &Place) -> Result<File, RootfsError> {
    let preparing = lock::directory(&place.dir)?;
    temporary::sweep(&place.dir);
    restoring::discard(&place.dir)?;
    match &place.life {
        Life::Owned(owner) => write_owner(&place.dir, owner)?,
        Life::Sandbox => remove_stale(&place.dir)?,
        Life::Snapshot => {}
    }
    Ok(preparing)
}

/// Locks the disk in a layer's directory, if there is one.
pub(super) fn lock_existing(dir: &Path) -> Result<Option<File>, RootfsError> {
    Layers::find(dir)?.map(|layers| layers.lock()).transpose()
}

fn write_owner(dir: &Path, owner: &Owner) -> Result<(), RootfsError> {
    let path = dir.join(OWNER);
    // Kept current: its parent, say, may have been moved to another disk.
    let known = std::fs::read(&path).ok().and_then(|text| serde_json::from_slice::<Owner>(&text).ok());
    if known.as_ref() == Some(owner) {
        return Ok(());
    }
    let text = serde_json::to_vec(owner).map_err(|error| host("write", &path)(error.into()))?;
    publish(dir, OWNER, |mut file| file.write_all(&text)).map_err(host("write", &path))
}

/// What a killed sandbox of the same name wrote is not this one's.
fn remove_stale(dir: &Path) -> Result<(), RootfsError> {
    let _unused = lock_existing(dir)?;
    layers::remove(dir)
}

pub(super) fn host(operation: &'static str, path: &Path) -> impl FnOnce(io::Error) -> RootfsError {
    let path = path.to_path_buf();
    move |source| match source.raw_os_error() {
        Some(libc::ENOSPC) => RootfsError::DiskFull { path, detail: format!("{operation}: {source}") },
        _ => RootfsError::Host { operation, path, source },
    }
}

fn create(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(path)
}

/// Makes a file under a temporary name; it appears complete and durable, or not at all.
pub(super) fn publish(dir: &Path, name: &str, make: impl FnOnce(&File) -> io::Result<()>) -> io::Result<()> {
    let temporary = Temporary::new(dir, name);
    let file = create(temporary.path())?;
    make(&file)?;
    file.sync_all()?;
    temporary.publish(&dir.join(name))
}

/// The template of a size, made by mkfs.ext4 at first need.
fn golden(state_dir: &Path, size_mib: u64) -> Result<File, RootfsError> {
    let dir = state_dir.join("golden");
    private_dir(&dir)?;
    let path = dir.join(format!("{size_mib}-{GOLDEN_FORMAT}.ext4"));
    let open = |source| RootfsError::Host { operation: "open", path: path.clone(), source };
    if let Ok(file) = File::open(&path) {
        return Ok(file);
    }
    temporary::sweep(&dir);
    // Two makers at once each publish an equal file; the later rename wins.
    let temporary = Temporary::new(&dir, "golden");
    let fail = |detail: String| {
        if detail.to_lowercase().contains(super::build::DISK_FULL) {
            RootfsError::DiskFull { path: dir.clone(), detail }
        } else {
            RootfsError::Format { path: path.clone(), detail }
        }
    };
    let io_fail = |error: io::Error| match error.raw_os_error() {
        Some(libc::ENOSPC) => RootfsError::DiskFull { path: dir.clone(), detail: error.to_string() },
        _ => fail(error.to_string()),
    };
    create(temporary.path()).and_then(|file| file.set_len(size_mib << 20)).map_err(io_fail)?;
    let result = mkfs_ext4(temporary.path(), size_mib)
        .map_err(|error| fail(format!("mkfs.ext4: cannot be run: {error}; install e2fsprogs")))?;
    if !result.status.success() {
        let text = String::from_utf8_lossy(&result.stderr);
        let text: Vec<&str> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
        return Err(fail(format!("mkfs.ext4: {}: {}", result.status, text.join(" | "))));
    }
    File::open(temporary.path()).and_then(|file| file.sync_all()).map_err(io_fail)?;
    temporary.publish(&path).map_err(io_fail)?;
    File::open(&path).map_err(open)
}

fn mkfs_ext4(path: &Path, size_mib: u64) -> io::Result<std::process::Output> {
    // A new file reads as zeroes, so nothing has to be zeroed now or by the guest later;
    // room to grow the file system is not needed. A 10 GiB template takes 0.2 MiB. An orphan file
    // would be read at every mount, its 2 MiB block by block: 512 requests one after the other.
    let journal_mib = if size_mib >= 256 { 16 } else { 4 };
    let mut command = Command::new("mkfs.ext4");
    command
        .env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
        .args(["-q", "-F", "-m", "0"]);
    if size_mib >= 64 {
        command.args(["-J", &format!("size={journal_mib}")]);
    }
    command.args([
        "-O",
        "^resize_inode,^orphan_file",
        "-L",
        "spore",
        "-E",
        "assume_storage_prezeroed=1,nodiscard",
    ]);
    command.arg(path).stdin(std::process::Stdio::null()).output()
}

#[cfg(test)]
mod tests;
