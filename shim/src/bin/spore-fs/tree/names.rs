//! Names in directories: looking them up, making and removing them.

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::sync::Arc;

use fuse_backend_rs::abi::fuse_abi::CreateIn;
use fuse_backend_rs::api::filesystem::Context;
use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags, RenameFlags, linkat, mkdirat, mknodat, openat};
use rustix::fs::{renameat_with, symlinkat, unlinkat};

use super::credentials::as_user;
use super::handles::usable;
use super::inodes::{Inode, ROOT};
use super::{Tree, errno};

/// One name of a directory: not the directory itself, not its parent, and no path.
fn checked(name: &CStr) -> io::Result<&CStr> {
    match name.to_bytes() {
        b"" | b"." | b".." => Err(errno(libc::EINVAL)),
        bytes if bytes.contains(&b'/') => Err(errno(libc::EINVAL)),
        _ => Ok(name),
    }
}

/// The directory that something is to be made or removed in. Nothing can be in the root.
fn directory(tree: &Tree, parent: u64) -> io::Result<Arc<Inode>> {
    tree.inodes.get(parent)
}

pub(super) fn lookup(tree: &Tree, parent: u64, name: &CStr) -> io::Result<Arc<Inode>> {
    let name = checked(name)?;
    if parent == ROOT {
        let id = name.to_str().ok().and_then(|name| name.parse().ok()).ok_or_else(|| errno(libc::ENOENT))?;
        return tree.inodes.export_of(id);
    }
    let parent = directory(tree, parent)?;
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let file = openat(parent.fd()?, name, flags, Mode::empty())?;
    tree.inodes.learn(parent.export(), file)
}

pub(super) fn symlink(
    tree: &Tree,
    context: &Context,
    target: &CStr,
    parent: u64,
    name: &CStr,
) -> io::Result<()> {
    let (parent, name) = (directory(tree, parent)?, checked(name)?);
    as_user(context, || Ok(symlinkat(target, parent.fd()?, name)?))
}

pub(super) fn make_directory(
    tree: &Tree,
    context: &Context,
    parent: u64,
    name: &CStr,
    mode: u32,
) -> io::Result<()> {
    let (parent, name) = (directory(tree, parent)?, checked(name)?);
    as_user(context, || Ok(mkdirat(parent.fd()?, name, Mode::from_raw_mode(mode & 0o7777))?))
}

/// Makes a file, fifo or socket. A device node would be the host's, where the guest's user has
/// no business; overlayfs's whiteout, device 0:0, opens nothing.
pub(super) fn make_node(
    tree: &Tree,
    context: &Context,
    parent: u64,
    name: &CStr,
    (mode, rdev): (u32, u32),
) -> io::Result<()> {
    let (parent, name) = (directory(tree, parent)?, checked(name)?);
    let kind = FileType::from_raw_mode(mode);
    match kind {
        FileType::RegularFile | FileType::Fifo | FileType::Socket => {}
        FileType::CharacterDevice if rdev == 0 => {}
        _ => return Err(errno(libc::EPERM)),
    }
    let mode = Mode::from_raw_mode(mode & 0o7777);
    as_user(context, || Ok(mknodat(parent.fd()?, name, kind, mode, u64::from(rdev))?))
}

pub(super) fn remove(tree: &Tree, parent: u64, name: &CStr, is_directory: bool) -> io::Result<()> {
    let (parent, name) = (directory(tree, parent)?, checked(name)?);
    let flags = if is_directory { AtFlags::REMOVEDIR } else { AtFlags::empty() };
    Ok(unlinkat(parent.fd()?, name, flags)?)
}

pub(super) fn rename(
    tree: &Tree,
    (from, old): (u64, &CStr),
    (to, new): (u64, &CStr),
    flags: u32,
) -> io::Result<()> {
    let (from, to) = (directory(tree, from)?, directory(tree, to)?);
    let flags = RenameFlags::from_bits(flags).ok_or_else(|| errno(libc::EINVAL))?;
    Ok(renameat_with(from.fd()?, checked(old)?, to.fd()?, checked(new)?, flags)?)
}

pub(super) fn link(tree: &Tree, inode: u64, parent: u64, name: &CStr) -> io::Result<()> {
    let (inode, parent) = (tree.inodes.get(inode)?, directory(tree, parent)?);
    let path = tree.path_of(inode.fd()?);
    Ok(linkat(CWD, path, parent.fd()?, checked(name)?, AtFlags::SYMLINK_FOLLOW)?)
}

/// Makes a new file and opens it; `None` when there is one already and that is as good.
///
/// Never opens what is there by its name: it may be a fifo or a device by now.
pub(super) fn create(
    tree: &Tree,
    context: &Context,
    parent: u64,
    name: &CStr,
    args: &CreateIn,
) -> io::Result<Option<File>> {
    let (parent, name) = (directory(tree, parent)?, checked(name)?);
    let exclusive = args.flags & libc::O_EXCL.cast_unsigned() != 0;
    let flags = usable(args.flags) | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW;
    let mode = Mode::from_raw_mode(args.mode & 0o7777);
    match as_user(context, || Ok(openat(parent.fd()?, name, flags, mode)?)) {
        Ok(file) => Ok(Some(file.into())),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists && !exclusive => Ok(None),
        Err(error) => Err(error),
    }
}
