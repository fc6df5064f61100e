//! Open files and directories of the guest, by the numbers that it knows them by.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::fs::{FileType, Mode, OFlags};

use super::inodes::{Inode, ROOT};
use super::{Tree, errno};

#[derive(Debug)]
pub(super) struct Handle {
    inode: u64,
    /// Those it was opened with, as far as they mean something after that.
    flags: u32,
    /// None of the root, and of a file that was not found again after a restore.
    file: Option<File>,
    /// Held while a directory's position is used.
    position: Mutex<()>,
}

impl Handle {
    pub(super) fn new(inode: u64, flags: u32, file: File) -> Self {
        Self { inode, flags, file: Some(file), position: Mutex::default() }
    }

    /// A handle without a file: the root's, or one whose file has vanished.
    pub(super) fn empty(inode: u64, flags: u32) -> Self {
        Self { inode, flags, file: None, position: Mutex::default() }
    }

    pub(super) fn inode(&self) -> u64 {
        self.inode
    }

    pub(super) fn flags(&self) -> u32 {
        self.flags
    }

    pub(super) fn is_root(&self) -> bool {
        self.inode == ROOT
    }

    pub(super) fn file(&self) -> io::Result<&File> {
        self.file.as_ref().ok_or_else(|| errno(if self.is_root() { libc::EISDIR } else { libc::ESTALE }))
    }

    pub(super) fn position(&self) -> MutexGuard<'_, ()> {
        self.position.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[derive(Default)]
struct Table {
    open: HashMap<u64, Arc<Handle>>,
    last: u64,
}

#[derive(Default)]
pub(super) struct Handles(Mutex<Table>);

impl Handles {
    fn lock(&self) -> MutexGuard<'_, Table> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn insert(&self, handle: Handle) -> u64 {
        let mut table = self.lock();
        table.last += 1;
        let number = table.last;
        table.open.insert(number, Arc::new(handle));
        number
    }

    pub(super) fn get(&self, number: u64) -> io::Result<Arc<Handle>> {
        self.lock().open.get(&number).cloned().ok_or_else(|| errno(libc::EBADF))
    }

    pub(super) fn remove(&self, number: u64) -> io::Result<()> {
        // Closed after the lock is given back: closing may take its time.
        let removed = self.lock().open.remove(&number);
        removed.map(drop).ok_or_else(|| errno(libc::EBADF))
    }

    pub(super) fn clear(&self) {
        let _closed_later = std::mem::take(&mut self.lock().open);
    }

    pub(super) fn saved(&self) -> (Vec<(u64, Arc<Handle>)>, u64) {
        let table = self.lock();
        let open = table.open.iter().map(|(number, handle)| (*number, Arc::clone(handle)));
        (open.collect(), table.last)
    }

    /// Takes a handle of a save up under its number.
    pub(super) fn restore(&self, number: u64, handle: Handle) -> io::Result<()> {
        let mut table = self.lock();
        if number == 0 || number > table.last || table.open.contains_key(&number) {
            return Err(io::Error::new(io::ErrorKind::InvalidData, format!("handle number {number}")));
        }
        table.open.insert(number, Arc::new(handle));
        Ok(())
    }

    pub(super) fn restore_last(&self, last: u64) {
        let mut table = self.lock();
        table.last = table.last.max(last);
    }
}

/// The guest's flags that mean something on the host. O_DIRECT is the guest kernel's affair:
/// here it would want aligned buffers.
pub(super) fn usable(flags: u32) -> OFlags {
    let known = OFlags::ACCMODE
        | OFlags::APPEND
        | OFlags::TRUNC
        | OFlags::NONBLOCK
        | OFlags::SYNC
        | OFlags::DSYNC
        | OFlags::NOATIME;
    (OFlags::from_bits_retain(flags) & known) | OFlags::CLOEXEC
}

/// The flags that an open file goes on having.
pub(super) fn kept(flags: u32) -> u32 {
    flags & !(libc::O_CREAT | libc::O_EXCL | libc::O_TRUNC).cast_unsigned()
}

/// Opens a known file. A fifo, socket or device is the guest kernel's own to open: here it would
/// be the host's, and the open might never return.
pub(super) fn open(tree: &Tree, inode: &Inode, flags: u32) -> io::Result<File> {
    match inode.kind() {
        FileType::RegularFile => {}
        FileType::Directory => return Err(errno(libc::EISDIR)),
        _ => return Err(errno(libc::ENXIO)),
    }
    let path = tree.path_of(inode.fd()?);
    Ok(rustix::fs::open(path, usable(flags), Mode::empty())?.into())
}
