//! Attributes of files, plain and extended.

use std::ffi::CStr;
use std::io;

use fuse_backend_rs::abi::fuse_abi::stat64;
use fuse_backend_rs::api::filesystem::{Entry, GetxattrReply, ListxattrReply, SetattrValid};
use rustix::fs::{AtFlags, CWD, Gid, Mode, Timespec, Timestamps, Uid, XattrFlags};
use rustix::fs::{chmodat, chownat, ftruncate, getxattr, listxattr, setxattr, utimensat};

use super::handles::{self, Handle};
use super::inodes::{Inode, Inodes, ROOT, status};
use super::{Tree, errno};

/// Most bytes of an extended attribute and of a list of them (Linux, limits.h).
const MAX_EXTENDED: u32 = 64 * 1024;

/// Nothing at all; the fields that matter are set by the caller.
fn blank() -> stat64 {
    Entry::default().attr
}

/// The root directory's.
pub(super) fn of_root() -> stat64 {
    let mut shown = blank();
    shown.st_ino = ROOT;
    shown.st_mode = libc::S_IFDIR | 0o555;
    shown.st_nlink = 2;
    shown.st_blksize = 4096;
    shown
}

pub(super) fn of(inodes: &Inodes, inode: &Inode) -> io::Result<stat64> {
    let found = status(inode.fd()?)?;
    let mut shown = blank();
    shown.st_dev = found.st_dev;
    shown.st_ino = inodes.shown(inode.export(), (found.st_dev, found.st_ino));
    shown.st_nlink = found.st_nlink;
    shown.st_mode = found.st_mode;
    shown.st_uid = found.st_uid;
    shown.st_gid = found.st_gid;
    shown.st_rdev = found.st_rdev;
    shown.st_size = found.st_size;
    shown.st_blksize = found.st_blksize;
    shown.st_blocks = found.st_blocks;
    shown.st_atime = found.st_atime;
    shown.st_atime_nsec = found.st_atime_nsec.cast_signed();
    shown.st_mtime = found.st_mtime;
    shown.st_mtime_nsec = found.st_mtime_nsec.cast_signed();
    shown.st_ctime = found.st_ctime;
    shown.st_ctime_nsec = found.st_ctime_nsec.cast_signed();
    Ok(shown)
}

/// Changes what `valid` names: mode, owner, size, times, in this order, as one of them may undo
/// another (an owner's change clears set-user-id).
pub(super) fn set(
    tree: &Tree,
    inode: &Inode,
    wanted: &stat64,
    handle: Option<&Handle>,
    valid: SetattrValid,
) -> io::Result<()> {
    let path = tree.path_of(inode.fd()?);
    if valid.intersects(SetattrValid::UID | SetattrValid::GID) {
        let uid = valid.contains(SetattrValid::UID).then(|| Uid::from_raw(wanted.st_uid));
        let gid = valid.contains(SetattrValid::GID).then(|| Gid::from_raw(wanted.st_gid));
        chownat(inode.fd()?, c"", uid, gid, AtFlags::EMPTY_PATH)?;
    }
    if valid.contains(SetattrValid::MODE) {
        chmodat(CWD, &path, Mode::from_raw_mode(wanted.st_mode & 0o7777), AtFlags::empty())?;
    }
    if valid.contains(SetattrValid::SIZE) {
        let size = u64::try_from(wanted.st_size).map_err(|_| errno(libc::EINVAL))?;
        match handle {
            Some(handle) => ftruncate(handle.file()?, size)?,
            None => ftruncate(handles::open(tree, inode, libc::O_WRONLY.cast_unsigned())?, size)?,
        }
    }
    if valid.intersects(SetattrValid::ATIME | SetattrValid::MTIME) {
        let time = |named, now, seconds, nanoseconds| match (valid.contains(named), valid.contains(now)) {
            (true, true) => Timespec { tv_sec: 0, tv_nsec: rustix::fs::UTIME_NOW },
            (true, false) => Timespec { tv_sec: seconds, tv_nsec: nanoseconds },
            (false, _) => Timespec { tv_sec: 0, tv_nsec: rustix::fs::UTIME_OMIT },
        };
        let (atime, mtime) = (SetattrValid::ATIME, SetattrValid::MTIME);
        let times = Timestamps {
            last_access: time(atime, SetattrValid::ATIME_NOW, wanted.st_atime, wanted.st_atime_nsec),
            last_modification: time(mtime, SetattrValid::MTIME_NOW, wanted.st_mtime, wanted.st_mtime_nsec),
        };
        utimensat(CWD, &path, &times, AtFlags::empty())?;
    }
    Ok(())
}

pub(super) fn set_extended(
    tree: &Tree,
    inode: &Inode,
    name: &CStr,
    value: &[u8],
    flags: u32,
) -> io::Result<()> {
    let flags = XattrFlags::from_bits(flags).ok_or_else(|| errno(libc::EINVAL))?;
    Ok(setxattr(tree.path_of(inode.fd()?), name, value, flags)?)
}

pub(super) fn get_extended(tree: &Tree, inode: &Inode, name: &CStr, size: u32) -> io::Result<GetxattrReply> {
    let (path, mut value) = (tree.path_of(inode.fd()?), buffer(size));
    let length = getxattr(path, name, &mut value[..])?;
    if size == 0 {
        return Ok(GetxattrReply::Count(u32::try_from(length).map_err(|_| errno(libc::E2BIG))?));
    }
    value.truncate(length);
    Ok(GetxattrReply::Value(value))
}

pub(super) fn list_extended(tree: &Tree, inode: &Inode, size: u32) -> io::Result<ListxattrReply> {
    let (path, mut names) = (tree.path_of(inode.fd()?), buffer(size));
    let length = listxattr(path, &mut names[..])?;
    if size == 0 {
        return Ok(ListxattrReply::Count(u32::try_from(length).map_err(|_| errno(libc::E2BIG))?));
    }
    names.truncate(length);
    Ok(ListxattrReply::Names(names))
}

/// Room for a value; for all there may be when its size is asked, as 0.
fn buffer(size: u32) -> Vec<u8> {
    let size = if size == 0 { MAX_EXTENDED } else { size.min(MAX_EXTENDED) };
    vec![0; size as usize]
}
