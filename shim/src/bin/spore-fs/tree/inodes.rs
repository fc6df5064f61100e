//! The files that the guest knows, by the numbers that it knows them by.
//!
//! A number stands for one file of one export and is never used again. The guest counts how often
//! it was given a number (LOOKUP and its kin) and says how many of those it has forgotten; at
//! none the descriptor is closed. Lock order: this table's lock is taken last.

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::fs::{AtFlags, FileType, Stat, statat};

use super::errno;

/// The root directory, which lists the exports.
pub(super) const ROOT: u64 = fuse_backend_rs::api::filesystem::ROOT_ID;
/// Numbers of exports follow the root's, those of other files begin here, so that exports that
/// come later, or in another server, have theirs.
const FIRST_EXPORT: u64 = ROOT + 1;
const FIRST_FILE: u64 = 1 << 32;
/// Most file systems of the host that one sandbox's exports reach.
const MAX_DEVICES: usize = 1 << 15;

/// Which file of the host: device and inode.
pub(super) type FileId = (u64, u64);

#[derive(Debug)]
pub(super) struct Inode {
    number: u64,
    export: u32,
    /// `None` for a file that was not found again after a restore.
    file: Option<OwnedFd>,
    id: FileId,
    kind: FileType,
}

impl Inode {
    pub(super) fn number(&self) -> u64 {
        self.number
    }

    pub(super) fn export(&self) -> u32 {
        self.export
    }

    pub(super) fn kind(&self) -> FileType {
        self.kind
    }

    pub(super) fn fd(&self) -> io::Result<BorrowedFd<'_>> {
        self.file.as_ref().map(AsFd::as_fd).ok_or_else(|| errno(libc::ESTALE))
    }
}

#[derive(Default)]
struct Table {
    known: HashMap<u64, (Arc<Inode>, u64)>,
    numbers: HashMap<(u32, FileId), u64>,
    exports: BTreeMap<u32, Arc<Inode>>,
    devices: HashMap<Device, u64>,
    last: u64,
}

#[derive(Default)]
pub(super) struct Inodes(Mutex<Table>);

/// An export's file system: export and device.
pub(super) type Device = (u32, u64);

/// What a save consists of.
pub(super) struct Saved {
    /// Files and their lookups.
    pub(super) known: Vec<(Arc<Inode>, u64)>,
    /// Devices and their places.
    pub(super) devices: Vec<(Device, u64)>,
    pub(super) last: u64,
}

impl Inodes {
    fn lock(&self) -> MutexGuard<'_, Table> {
        // Nothing panics under the lock but for want of memory.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn export(&self, id: u32, root: OwnedFd) -> io::Result<()> {
        let status = status(root.as_fd())?;
        let mut table = self.lock();
        if table.exports.contains_key(&id) {
            return Err(errno(libc::EEXIST));
        }
        let number = FIRST_EXPORT + u64::from(id);
        let inode = Arc::new(inode(number, id, Some(root), &status));
        table.numbers.insert((id, inode.id), number);
        table.exports.insert(id, inode);
        Ok(())
    }

    pub(super) fn exports(&self) -> Vec<(u32, Arc<Inode>)> {
        self.lock().exports.iter().map(|(id, inode)| (*id, Arc::clone(inode))).collect()
    }

    /// The root of an export.
    pub(super) fn export_of(&self, id: u32) -> io::Result<Arc<Inode>> {
        self.lock().exports.get(&id).cloned().ok_or_else(|| errno(libc::ENOENT))
    }

    pub(super) fn any_export(&self) -> io::Result<Arc<Inode>> {
        self.lock().exports.values().next().cloned().ok_or_else(|| errno(libc::ENOENT))
    }

    /// The file behind a number of the guest's.
    pub(super) fn get(&self, number: u64) -> io::Result<Arc<Inode>> {
        let table = self.lock();
        let of_export = || table.exports.values().find(|inode| inode.number == number);
        let found = table.known.get(&number).map(|(inode, _)| inode).or_else(of_export);
        // The root is no file: what is for files cannot be done with it.
        found.cloned().ok_or_else(|| errno(if number == ROOT { libc::EROFS } else { libc::ESTALE }))
    }

    /// The number of the file `file` of an export, once more known to the guest.
    pub(super) fn learn(&self, export: u32, file: OwnedFd) -> io::Result<Arc<Inode>> {
        let status = status(file.as_fd())?;
        let mut table = self.lock();
        let key = (export, (status.st_dev, status.st_ino));
        if let Some(number) = table.numbers.get(&key).copied() {
            if let Some((inode, lookups)) = table.known.get_mut(&number) {
                *lookups = lookups.saturating_add(1);
                return Ok(Arc::clone(inode));
            }
            // An export's root, found below another directory of it: it is there for good.
            if let Some(inode) = table.exports.values().find(|inode| inode.number == number) {
                return Ok(Arc::clone(inode));
            }
        }
        let number = table.next();
        let inode = Arc::new(inode(number, export, Some(file), &status));
        table.numbers.insert(key, number);
        table.known.insert(number, (Arc::clone(&inode), 1));
        Ok(inode)
    }

    pub(super) fn forget(&self, number: u64, count: u64) {
        let mut table = self.lock();
        let Some((_, lookups)) = table.known.get_mut(&number) else { return };
        *lookups = lookups.saturating_sub(count);
        if *lookups == 0
            && let Some((inode, _)) = table.known.remove(&number)
        {
            table.numbers.remove(&(inode.export, inode.id));
        }
    }

    /// Forgets all but the exports.
    pub(super) fn clear(&self) {
        let mut table = self.lock();
        let forgotten: Vec<_> = table.known.drain().map(|(_, (inode, _))| (inode.export, inode.id)).collect();
        for key in forgotten {
            table.numbers.remove(&key);
        }
    }

    /// The inode number that the guest sees. Files of several file systems of the host are in
    /// one of the guest's, and two of them with one number would be taken for one file.
    pub(super) fn shown(&self, export: u32, (device, inode): FileId) -> u64 {
        let mut table = self.lock();
        let next = table.devices.len();
        let index = match table.devices.get(&(export, device)) {
            Some(index) => *index,
            None if next < MAX_DEVICES => *table.devices.entry((export, device)).or_insert(next as u64),
            None => 0,
        };
        inode ^ (index << 48)
    }

    pub(super) fn saved(&self) -> Saved {
        let table = self.lock();
        Saved {
            known: table.known.values().cloned().collect(),
            devices: table.devices.iter().map(|(device, place)| (*device, *place)).collect(),
            last: table.last,
        }
    }

    /// Takes a file of a save up under its number; without `file` it gives ESTALE.
    pub(super) fn restore(
        &self,
        number: u64,
        export: u32,
        file: Option<OwnedFd>,
        lookups: u64,
    ) -> io::Result<()> {
        let status = file.as_ref().map(|file| status(file.as_fd())).transpose()?;
        let mut table = self.lock();
        if number <= FIRST_FILE || number > table.last || lookups == 0 {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                format!("file number {number}, {lookups} lookups"),
            ));
        }
        let inode = match &status {
            Some(status) => inode(number, export, file, status),
            None => Inode { number, export, file: None, id: (0, number), kind: FileType::Unknown },
        };
        if table.known.contains_key(&number) {
            return Err(io::Error::new(io::ErrorKind::InvalidData, format!("file number {number} is taken")));
        }
        if status.is_some() {
            table.numbers.entry((export, inode.id)).or_insert(number);
        }
        table.known.insert(number, (Arc::new(inode), lookups));
        Ok(())
    }

    /// Continues with the numbers of a save. Devices keep their place, so that files keep the
    /// inode numbers that the guest has seen.
    pub(super) fn restore_numbers(&self, devices: &[(Device, u64)], last: u64) {
        let mut table = self.lock();
        table.last = table.last.max(last);
        table.devices.extend(devices.iter().copied().filter(|(_, index)| *index < MAX_DEVICES as u64));
    }
}

impl Table {
    fn next(&mut self) -> u64 {
        self.last = self.last.max(FIRST_FILE) + 1;
        self.last
    }
}

fn inode(number: u64, export: u32, file: Option<OwnedFd>, status: &Stat) -> Inode {
    let kind = FileType::from_raw_mode(status.st_mode);
    Inode { number, export, file, id: (status.st_dev, status.st_ino), kind }
}

/// What stat(2) says of the file itself.
pub(super) fn status(fd: BorrowedFd<'_>) -> io::Result<Stat> {
    Ok(statat(fd, c"", AtFlags::EMPTY_PATH)?)
}
