//! The writable layer: an ext4 disk whose life is the rootfs snapshot's, not the task's.
//! It is a sparse copy of a golden file system, made once for each size.

use std::fs::{File, OpenOptions, TryLockError};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::images::hex;
use super::source::Source;
use super::temporary::{self, Temporary};
use super::{Request, RootfsError, private_dir, sparse};

const DISK: &str = "writable.ext4";
const OWNER: &str = "owner.json";
/// In a rootfs snapshot's directory, removed with it by its snapshotter.
const DIRECTORY: &str = "spore";

/// The directory that a layer without a snapshot directory belongs to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Owner {
    path: PathBuf,
    device: u64,
    inode: u64,
    /// Birth time where the file system knows it: inode numbers are used again.
    born_ns: Option<u128>,
}

/// Where the writable disk lives.
#[derive(Debug, Clone)]
pub(super) struct Place {
    dir: PathBuf,
    owner: Option<Owner>,
}

impl Place {
    pub(super) fn find(source: &Source, request: &Request<'_>) -> Result<Self, RootfsError> {
        match source {
            Source::Overlay { upper, .. } | Source::Images { upper, .. } => Ok(match upper {
                Some(upper) => {
                    let snapshot = upper.work.parent().unwrap_or(&upper.work);
                    Self { dir: snapshot.join(DIRECTORY), owner: None }
                }
                // A view is read-only by its maker's wish; what is written is as short-lived
                // as the sandbox.
                None => Self { dir: request.run_dir.to_path_buf(), owner: None },
            }),
            Source::Directory { path, .. } => {
                let owner = Owner::of(path).map_err(|source| RootfsError::Host {
                    operation: "look at the root directory",
                    path: path.clone(),
                    source,
                })?;
                let dir = request.state_dir.join("writable").join(owner.key());
                Ok(Self { dir, owner: Some(owner) })
            }
        }
    }

    pub(super) fn dir(&self) -> &Path {
        &self.dir
    }
}

impl Owner {
    fn of(path: &Path) -> io::Result<Self> {
        let metadata = std::fs::metadata(path)?;
        if !metadata.is_dir() {
            return Err(io::Error::from_raw_os_error(libc::ENOTDIR));
        }
        let born = metadata.created().ok().and_then(|time| time.duration_since(std::time::UNIX_EPOCH).ok());
        Ok(Self {
            path: path.into(),
            device: metadata.dev(),
            inode: metadata.ino(),
            born_ns: born.map(|time| time.as_nanos()),
        })
    }

    fn key(&self) -> String {
        let mut hash = Sha256::new();
        hash.update(self.path.as_os_str().as_encoded_bytes());
        hash.update([0]);
        hash.update(self.device.to_le_bytes());
        hash.update(self.inode.to_le_bytes());
        hash.update(self.born_ns.unwrap_or(0).to_le_bytes());
        hex(&hash.finalize()[..16])
    }

    fn exists(&self) -> bool {
        Self::of(&self.path).is_ok_and(|current| current == *self)
    }
}

/// Opens the layer, making it at first use, and locks it for this sandbox.
pub(super) fn open(place: &Place, state_dir: &Path, size_mib: u64) -> Result<File, RootfsError> {
    let host = |operation, path: &Path| {
        let path = path.to_path_buf();
        move |source: io::Error| match source.raw_os_error() {
            Some(libc::ENOSPC) => RootfsError::DiskFull { path, detail: format!("{operation}: {source}") },
            _ => RootfsError::Host { operation, path, source },
        }
    };
    private_dir(&place.dir)?;
    let disk = place.dir.join(DISK);
    if !disk.exists() {
        // Two sandboxes that begin at once must not each make one: the second's rename
        // would take the first's disk away.
        let dir = File::open(&place.dir).map_err(host("open", &place.dir))?;
        dir.lock().map_err(host("lock", &place.dir))?;
        if !disk.exists() {
            temporary::sweep(&place.dir);
            if let Some(owner) = &place.owner {
                let text =
                    serde_json::to_vec(owner).map_err(|error| host("write", &place.dir)(error.into()))?;
                publish(&place.dir, OWNER, |path| std::fs::write(path, &text))
                    .map_err(host("write", &place.dir.join(OWNER)))?;
            }
            let golden = golden(state_dir, size_mib)?;
            publish(&place.dir, DISK, |path| {
                let copy = create(path)?;
                sparse::copy(&golden, &copy)?;
                copy.sync_all()
            })
            .map_err(host("make", &disk))?;
        }
    }
    let file = OpenOptions::new().read(true).write(true).open(&disk).map_err(host("open", &disk))?;
    // The lock belongs to the open file, of which the VMM gets a descriptor: it lasts as
    // long as the VM does.
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(RootfsError::InUse { path: disk }),
        Err(TryLockError::Error(error)) => Err(host("lock", &disk)(error)),
    }
}

fn create(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(path)
}

/// Makes a file under a temporary name; it appears complete or not at all.
fn publish(dir: &Path, name: &str, make: impl FnOnce(&Path) -> io::Result<()>) -> io::Result<()> {
    let temporary = Temporary::new(dir, name);
    make(temporary.path())?;
    temporary.publish(&dir.join(name))
}

/// The template of a size, made by mkfs.ext4 at first need.
fn golden(state_dir: &Path, size_mib: u64) -> Result<File, RootfsError> {
    let dir = state_dir.join("golden");
    private_dir(&dir)?;
    let path = dir.join(format!("{size_mib}.ext4"));
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
    // room to grow the file system is not needed. A 10 GiB template takes 0.3 MiB.
    let journal_mib = if size_mib >= 256 { 16 } else { 4 };
    let mut command = Command::new("mkfs.ext4");
    command
        .env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
        .args(["-q", "-F", "-m", "0"]);
    if size_mib >= 64 {
        command.args(["-J", &format!("size={journal_mib}")]);
    }
    command.args(["-O", "^resize_inode", "-L", "spore", "-E", "assume_storage_prezeroed=1,nodiscard"]);
    command.arg(path).stdin(std::process::Stdio::null()).output()
}

/// Removes layers whose root directory is gone. Cheap when there are none; problems are
/// left to the next call.
pub(crate) fn collect_garbage(state_dir: &Path) {
    for entry in std::fs::read_dir(state_dir.join("writable")).into_iter().flatten().flatten() {
        let dir = entry.path();
        let owner =
            std::fs::read(dir.join(OWNER)).ok().and_then(|text| serde_json::from_slice::<Owner>(&text).ok());
        let Some(owner) = owner else { continue };
        if owner.exists() {
            continue;
        }
        // A running VM keeps its layer although the directory was removed under it.
        let unused = match File::open(dir.join(DISK)) {
            Ok(file) => file.try_lock().is_ok(),
            Err(_) => true,
        };
        if unused {
            let _ = std::fs::remove_dir_all(&dir);
        }
    }
}

#[cfg(test)]
mod tests;
