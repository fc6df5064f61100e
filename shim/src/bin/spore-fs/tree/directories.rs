//! Reading directories.

use std::ffi::{CStr, CString};
use std::fs::File;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::AsFd;

use fuse_backend_rs::api::filesystem::{DirEntry, Entry};
use rustix::fs::{FileType, Mode, OFlags, RawDir, SeekFrom, openat, seek};

use super::Tree;
use super::handles::Handle;
use super::inodes::{Inode, ROOT};

/// Bytes that are asked of the kernel at a time.
const CHUNK: usize = 32 * 1024;

/// Opens a directory; the number of its handle.
pub(super) fn open(tree: &Tree, inode: u64) -> io::Result<u64> {
    if inode == ROOT {
        return Ok(tree.handles.insert(Handle::empty(ROOT, 0)));
    }
    let inode = tree.inodes.get(inode)?;
    let file = readable(&inode)?;
    Ok(tree.handles.insert(Handle::new(inode.number(), libc::O_DIRECTORY.cast_unsigned(), file)))
}

/// Opens a known directory for reading.
pub(super) fn readable(inode: &Inode) -> io::Result<File> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    Ok(openat(inode.fd()?, c".", flags, Mode::empty())?.into())
}

/// Shows entries from `offset` on until `show`, which gets the directory's number too, says that
/// there is no more room.
pub(super) fn read(
    tree: &Tree,
    handle: u64,
    offset: u64,
    show: &mut dyn FnMut(u64, DirEntry<'_>) -> io::Result<bool>,
) -> io::Result<()> {
    let handle = tree.handle(handle)?;
    if handle.is_root() {
        return read_root(tree, offset, show);
    }
    let directory = tree.inodes.get(handle.inode())?;
    let status = super::inodes::status(directory.fd()?)?;
    let file = handle.file()?;
    let _position = handle.position();
    seek(file.as_fd(), SeekFrom::Start(offset))?;
    let mut buffer = Box::new_uninit_slice(CHUNK);
    let buffer: &mut [MaybeUninit<u8>] = &mut buffer;
    let mut entries = RawDir::new(file.as_fd(), buffer);
    while let Some(entry) = entries.next() {
        let entry = entry?;
        let shown = DirEntry {
            // An entry that another file system is mounted on has that one's number when looked up.
            ino: tree.inodes.shown(directory.export(), (status.st_dev, entry.ino())),
            offset: entry.next_entry_cookie(),
            type_: kind_of(entry.file_type()),
            name: entry.file_name().to_bytes(),
        };
        if !show(directory.number(), shown)? {
            break;
        }
    }
    Ok(())
}

fn read_root(
    tree: &Tree,
    offset: u64,
    show: &mut dyn FnMut(u64, DirEntry<'_>) -> io::Result<bool>,
) -> io::Result<()> {
    let first = usize::try_from(offset).unwrap_or(usize::MAX);
    for (at, (id, inode)) in (0u64..).zip(tree.inodes.exports()).skip(first) {
        let name = id.to_string();
        let type_ = kind_of(inode.kind());
        let entry = DirEntry { ino: u64::from(id) + 2, offset: at + 1, type_, name: name.as_bytes() };
        if !show(ROOT, entry)? {
            break;
        }
    }
    Ok(())
}

/// The entry that a name has, counted as known; `None` for a directory's own and its parent's.
pub(super) fn known(tree: &Tree, parent: u64, name: &[u8]) -> Option<Entry> {
    if matches!(name, b"." | b"..") {
        return None;
    }
    let name = CString::new(name).ok()?;
    tree.find(parent, CStr::as_ref(&name)).ok()
}

/// As readdir(3) says it.
fn kind_of(kind: FileType) -> u32 {
    u32::from(match kind {
        FileType::RegularFile => libc::DT_REG,
        FileType::Directory => libc::DT_DIR,
        FileType::Symlink => libc::DT_LNK,
        FileType::Fifo => libc::DT_FIFO,
        FileType::Socket => libc::DT_SOCK,
        FileType::CharacterDevice => libc::DT_CHR,
        FileType::BlockDevice => libc::DT_BLK,
        FileType::Unknown => libc::DT_UNKNOWN,
    })
}
