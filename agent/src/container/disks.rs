//! Disks by serial: found in sysfs, mounted once, shared while used, unmounted clean.
//!
//! Blocking; called from worker threads. The mutex is held during mounts, which serialises
//! them: a guest has few, and two containers may want the same disk at the same time.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use nix::mount::{MntFlags, MsFlags, mount, umount2};

use crate::error::{AgentError, Result};
use crate::wait::poll;

const MOUNTS: &str = "/run/spore/disks";
const SYS_BLOCK: &str = "/sys/block";
/// A disk attached just before the request shows within this time.
const ATTACH_DEADLINE: Duration = Duration::from_secs(10);
/// A disk is released within this time after its last mount is gone.
const RELEASE_DEADLINE: Duration = Duration::from_secs(10);
const MAX_SERIAL: usize = 20;

/// What a disk is mounted as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// EROFS, shared by any number of containers.
    Image,
    /// ext4, one container's.
    Writable,
}

impl Kind {
    fn file_system(self) -> &'static str {
        match self {
            Self::Image => "erofs",
            Self::Writable => "ext4",
        }
    }
}

#[derive(Debug)]
struct Mounted {
    device: PathBuf,
    path: PathBuf,
    kind: Kind,
    users: usize,
}

#[derive(Debug, Default)]
struct Table {
    /// Serials never move between devices: a slot is one device for the guest's life.
    names: HashMap<String, String>,
    mounted: HashMap<String, Mounted>,
}

/// The guest's disks.
#[derive(Debug, Default)]
pub struct Disks {
    table: Mutex<Table>,
}

impl Disks {
    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Mounts the disk, or shares its mount, and returns where.
    pub fn acquire(&self, serial: &str, kind: Kind) -> Result<PathBuf> {
        let mut table = self.table();
        if let Some(mounted) = table.mounted.get_mut(serial) {
            if kind == Kind::Writable || mounted.kind != kind {
                return Err(AgentError::FailedPrecondition(format!(
                    "disk \"{serial}\": in use by another container"
                )));
            }
            mounted.users += 1;
            return Ok(mounted.path.clone());
        }
        let device = Path::new("/dev").join(find(&mut table.names, serial)?);
        let path = Path::new(MOUNTS).join(serial);
        fs::create_dir_all(&path).map_err(|error| AgentError::internal(path.display(), error))?;
        // noinit_itable: the kernel would otherwise write to a fresh file system in the
        // background and so inflate every copy-on-write disk. A journal is replayed.
        let (flags, options) = match kind {
            Kind::Image => (MsFlags::MS_RDONLY, ""),
            Kind::Writable => (MsFlags::empty(), "noinit_itable,errors=remount-ro"),
        };
        let file_system = kind.file_system();
        mount(Some(&device), &path, Some(file_system), flags, Some(options)).map_err(|error| {
            let _ = fs::remove_dir(&path);
            let mend = match error {
                nix::errno::Errno::ENODEV => format!("; the guest's kernel lacks {file_system}"),
                nix::errno::Errno::EINVAL | nix::errno::Errno::EUCLEAN => {
                    format!("; its content is not a valid {file_system} file system")
                }
                _ => String::new(),
            };
            AgentError::Internal(format!("disk \"{serial}\": mount as {file_system}: {}{mend}", error.desc()))
        })?;
        let mounted = Mounted { device, path: path.clone(), kind, users: 1 };
        table.mounted.insert(serial.into(), mounted);
        Ok(path)
    }

    /// Gives a disk back; the last user unmounts it and waits until the kernel has let go of
    /// it, so that what is on it is complete.
    pub fn release(&self, serial: &str) -> Result<()> {
        let mut table = self.table();
        let Some(mounted) = table.mounted.get_mut(serial) else { return Ok(()) };
        mounted.users -= 1;
        if mounted.users > 0 {
            return Ok(());
        }
        let Some(mounted) = table.mounted.remove(serial) else { return Ok(()) };
        unmount(serial, &mounted)
    }

    /// Unmounts everything, for shutdown.
    pub fn release_all(&self) {
        for (serial, mounted) in self.table().mounted.drain() {
            if let Err(error) = unmount(&serial, &mounted) {
                crate::say!("{error}");
            }
        }
    }
}

fn unmount(serial: &str, mounted: &Mounted) -> Result<()> {
    umount2(&mounted.path, MntFlags::empty())
        .or_else(|_busy| umount2(&mounted.path, MntFlags::MNT_DETACH))
        .map_err(|error| AgentError::internal(format!("disk \"{serial}\": unmount"), error.desc()))?;
    let _ = fs::remove_dir(&mounted.path);
    if mounted.kind == Kind::Image {
        return Ok(());
    }
    // A mount in another namespace may outlive ours for a moment. An exclusive open fails
    // as long as any file system holds the device.
    let free = || {
        fs::OpenOptions::new().read(true).custom_flags(libc::O_EXCL | libc::O_CLOEXEC).open(&mounted.device)
    };
    poll(RELEASE_DEADLINE, || match free() {
        Err(error) if error.raw_os_error() == Some(libc::EBUSY) => None,
        _ => Some(()),
    })
    .ok_or_else(|| {
        AgentError::Internal(format!(
            "disk \"{serial}\": still mounted somewhere {RELEASE_DEADLINE:?} after unmount"
        ))
    })
}

/// The device's name under /dev, once it has a medium.
fn find(names: &mut HashMap<String, String>, serial: &str) -> Result<String> {
    if serial.is_empty()
        || serial.len() > MAX_SERIAL
        || !serial.bytes().all(|byte| byte.is_ascii_alphanumeric())
    {
        return Err(AgentError::InvalidArgument(format!(
            "disk \"{serial}\": a serial is 1 to {MAX_SERIAL} letters and digits, such as \"ro0\""
        )));
    }
    if !names.contains_key(serial) {
        scan(Path::new(SYS_BLOCK), names).map_err(|error| AgentError::internal(SYS_BLOCK, error))?;
    }
    let Some(name) = names.get(serial) else {
        let mut known: Vec<_> = names.keys().map(String::as_str).collect();
        known.sort_unstable();
        return Err(AgentError::NotFound(format!(
            "disk \"{serial}\": this guest has no such slot; it has {}",
            if known.is_empty() { "none".to_owned() } else { known.join(", ") }
        )));
    };
    // The kernel tells nobody when a disk's capacity leaves zero, hence the polling.
    let size = Path::new(SYS_BLOCK).join(name).join("size");
    let present = || fs::read_to_string(&size).ok().filter(|size| size.trim() != "0").map(drop);
    match poll(ATTACH_DEADLINE, present) {
        Some(()) => Ok(name.clone()),
        None => Err(AgentError::NotFound(format!(
            "disk \"{serial}\": the slot is still empty after {ATTACH_DEADLINE:?}; attach the disk first"
        ))),
    }
}

/// Fills in the serials of all disks that have one.
fn scan(block: &Path, names: &mut HashMap<String, String>) -> io::Result<()> {
    for entry in fs::read_dir(block)? {
        let entry = entry?;
        let (Ok(name), Ok(serial)) =
            (entry.file_name().into_string(), fs::read_to_string(entry.path().join("serial")))
        else {
            continue;
        };
        let serial = serial.trim();
        if !serial.is_empty() {
            names.insert(serial.into(), name);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn serials_are_found_in_sysfs() {
        let block = tempfile::tempdir().unwrap();
        for (name, serial) in [("vda", "ro0\n"), ("vdb", "rw0"), ("vdc", "")] {
            fs::create_dir(block.path().join(name)).unwrap();
            fs::write(block.path().join(name).join("serial"), serial).unwrap();
        }
        fs::create_dir(block.path().join("loop0")).unwrap();
        let mut names = HashMap::new();
        scan(block.path(), &mut names).unwrap();
        assert_eq!(names.len(), 2);
        assert_eq!(names["ro0"], "vda");
        assert_eq!(names["rw0"], "vdb");
    }

    #[test]
    fn a_serial_cannot_be_a_path() {
        for bad in ["", "../x", "ro/0", "a23456789012345678901"] {
            let error = find(&mut HashMap::new(), bad).unwrap_err();
            assert!(matches!(error, AgentError::InvalidArgument(_)), "{bad}: {error}");
        }
    }
}
