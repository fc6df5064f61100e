//! Puts an archive of changes into a directory, as overlayfs would have left them there. Everything
//! is reached from the directory's descriptor and never through a symbolic link, so that nothing
//! outside is touched even where this process is not confined.

use std::ffi::CString;
use std::io::Read;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{
    AtFlags, Dir, FileType, Gid, Mode, OFlags, RenameFlags, ResolveFlags, Timespec, Timestamps, UTIME_OMIT,
    Uid, XattrFlags, chownat, fchmod, fchown, fsetxattr, ftruncate, futimens, linkat, makedev, mkdirat,
    mknodat, openat, openat2, renameat_with, statat, symlinkat, unlinkat, utimensat,
};
use rustix::io::{Errno, pwrite};
use spore_agent_api::changes::OPAQUE;

use super::archive::{Archive, ArchiveError, Entry, Kind, Limits, Names, shown};

const BUFFER: usize = 128 * 1024;

#[derive(Debug, thiserror::Error)]
pub(super) enum ApplyError {
    #[error(transparent)]
    Archive(#[from] ArchiveError),
    #[error("{path}: {operation}: {source}")]
    Host { path: String, operation: &'static str, source: Errno },
}

/// Directories that entries are still coming for; their times are set when they are complete.
type Open = Vec<(Names, (i64, i64))>;

/// Applies the archive to `root`; returns how much the guest could not send.
pub(super) fn apply(root: &OwnedFd, input: impl Read, limits: Limits) -> Result<u64, ApplyError> {
    let mut archive = Archive::new(input, limits);
    let mut open = Open::new();
    while let Some(entry) = archive.next()? {
        while open.last().is_some_and(|(directory, _)| !entry.names.starts_with(directory)) {
            close(root, open.pop())?;
        }
        if let Kind::Directory { opaque } = entry.kind {
            directory(root, &entry, opaque)?;
            open.push((entry.names, entry.mtime));
        } else {
            other(root, &entry, &mut archive)?;
        }
    }
    while let Some(last) = open.pop() {
        close(root, Some(last))?;
    }
    Ok(archive.skipped)
}

fn host<'a>(names: &'a [Vec<u8>], operation: &'static str) -> impl Fn(Errno) -> ApplyError + 'a {
    move |source| ApplyError::Host { path: shown(names), operation, source }
}

/// The directory `names`, which no symbolic link leads to.
fn reach(root: &OwnedFd, names: &[Vec<u8>]) -> Result<OwnedFd, Errno> {
    let path = if names.is_empty() { b".".to_vec() } else { names.join(&b'/') };
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let inside = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    openat2(root, path.as_slice(), flags, Mode::empty(), inside)
}

/// The directory that an entry is in, and the entry's name there.
fn parent<'a>(root: &OwnedFd, names: &'a Names) -> Result<(OwnedFd, &'a [u8]), ApplyError> {
    let (name, above) = names.split_last().ok_or_else(|| host(names, "look up")(Errno::INVAL))?;
    let directory = reach(root, above).map_err(host(names, "open its directory"))?;
    Ok((directory, name.as_slice()))
}

fn close(root: &OwnedFd, directory: Option<(Names, (i64, i64))>) -> Result<(), ApplyError> {
    let Some((names, mtime)) = directory else { return Ok(()) };
    let failed = host(&names, "set its time");
    futimens(reach(root, &names).map_err(&failed)?, &times(mtime)).map_err(&failed)
}

fn times((tv_sec, tv_nsec): (i64, i64)) -> Timestamps {
    let last_access = Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT };
    Timestamps { last_access, last_modification: Timespec { tv_sec, tv_nsec } }
}

fn directory(root: &OwnedFd, entry: &Entry, opaque: bool) -> Result<(), ApplyError> {
    let names = &entry.names;
    if names.is_empty() {
        let fd = reach(root, names).map_err(host(names, "open"))?;
        return attributes(&fd, entry);
    }
    let (above, name) = parent(root, names)?;
    let mut opaque = opaque;
    let there = match kind_of(above.as_fd(), name).map_err(host(names, "look at"))? {
        Some(FileType::Directory) => true,
        Some(_) => {
            // What was hidden by a file or a whiteout does not come back with a directory.
            opaque = true;
            unlinkat(&above, name, AtFlags::empty()).map_err(host(names, "remove"))?;
            false
        }
        None => false,
    };
    if !there {
        mkdirat(&above, name, Mode::RWXU).map_err(host(names, "create"))?;
    }
    let fd = reach(root, names).map_err(host(names, "open"))?;
    if opaque {
        clear(&fd).map_err(host(names, "empty"))?;
        fsetxattr(&fd, OPAQUE, b"y", XattrFlags::empty()).map_err(host(names, "make opaque"))?;
    }
    attributes(&fd, entry)
}

fn other(root: &OwnedFd, entry: &Entry, archive: &mut Archive<impl Read>) -> Result<(), ApplyError> {
    let names = &entry.names;
    let (above, name) = parent(root, names)?;
    remove(above.as_fd(), name).map_err(host(names, "replace"))?;
    let failed = host(names, "create");
    match &entry.kind {
        Kind::File { length, pieces } => {
            let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let file = openat(&above, name, flags, Mode::RUSR | Mode::WUSR).map_err(failed)?;
            write(&file, entry, *length, pieces, archive)?;
            attributes(&file, entry)?;
            return futimens(&file, &times(entry.mtime)).map_err(host(names, "set its time"));
        }
        Kind::Link(target) => {
            let (from, old) = parent(root, target)?;
            return linkat(&from, old, &above, name, AtFlags::empty()).map_err(failed);
        }
        Kind::Symlink(target) => symlinkat(target.as_slice(), &above, name).map_err(failed)?,
        Kind::Whiteout => {
            let mode = Mode::empty();
            mknodat(&above, name, FileType::CharacterDevice, mode, makedev(0, 0)).map_err(failed)?;
        }
        Kind::Fifo => {
            let mode = Mode::from_raw_mode(entry.mode);
            mknodat(&above, name, FileType::Fifo, mode, 0).map_err(failed)?;
        }
        Kind::Directory { .. } => return Err(failed(Errno::ISDIR)),
    }
    let owner = (Some(Uid::from_raw(entry.uid)), Some(Gid::from_raw(entry.gid)));
    chownat(&above, name, owner.0, owner.1, AtFlags::SYMLINK_NOFOLLOW)
        .map_err(host(names, "set its owner"))?;
    utimensat(&above, name, &times(entry.mtime), AtFlags::SYMLINK_NOFOLLOW)
        .map_err(host(names, "set its time"))
}

fn write(
    file: &OwnedFd,
    entry: &Entry,
    length: u64,
    pieces: &[(u64, u64)],
    archive: &mut Archive<impl Read>,
) -> Result<(), ApplyError> {
    let failed = host(&entry.names, "write");
    // The holes; what is written comes over it.
    ftruncate(file, length).map_err(&failed)?;
    let mut buffer = vec![0; BUFFER];
    let mut size = 0;
    for &(mut offset, mut left) in pieces {
        size += left;
        while left > 0 {
            let count = usize::try_from(left).unwrap_or(BUFFER).min(BUFFER);
            archive.data(&mut buffer[..count])?;
            let mut rest = &buffer[..count];
            while !rest.is_empty() {
                let written = pwrite(file, rest, offset).map_err(&failed)?;
                rest = &rest[written..];
                offset += written as u64;
            }
            left -= count as u64;
        }
    }
    Ok(archive.pad(size)?)
}

/// The owner first: a change of owner takes the set-user-id bit and capabilities away.
fn attributes(fd: &OwnedFd, entry: &Entry) -> Result<(), ApplyError> {
    let names = &entry.names;
    fchown(fd, Some(Uid::from_raw(entry.uid)), Some(Gid::from_raw(entry.gid)))
        .map_err(host(names, "set its owner"))?;
    fchmod(fd, Mode::from_raw_mode(entry.mode)).map_err(host(names, "set its mode"))?;
    for (name, value) in &entry.attributes {
        fsetxattr(fd, name.as_slice(), value, XattrFlags::empty())
            .map_err(host(names, "set an attribute"))?;
    }
    Ok(())
}

fn kind_of(directory: BorrowedFd<'_>, name: &[u8]) -> Result<Option<FileType>, Errno> {
    match statat(directory, name, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(stat) => Ok(Some(FileType::from_raw_mode(stat.st_mode))),
        Err(Errno::NOENT) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Removes whatever has this name, if anything has.
fn remove(directory: BorrowedFd<'_>, name: &[u8]) -> Result<(), Errno> {
    match kind_of(directory, name)? {
        None => Ok(()),
        Some(FileType::Directory) => {
            let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            clear(&openat(directory, name, flags, Mode::empty())?)?;
            unlinkat(directory, name, AtFlags::REMOVEDIR)
        }
        Some(_) => unlinkat(directory, name, AtFlags::empty()),
    }
}

/// Removes everything in a directory, with a few descriptors and little stack however deep it is: what a
/// directory holds moves up to the top, one level at a time.
pub(super) fn clear(top: &OwnedFd) -> Result<(), Errno> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let mut moved = 0_u64;
    let mut left = names(top)?;
    while let Some((name, is_directory)) = left.pop() {
        if !is_directory {
            unlinkat(top, &name, AtFlags::empty())?;
            continue;
        }
        let directory = openat(top, &name, flags, Mode::empty())?;
        for (below, is_directory) in names(&directory)? {
            if !is_directory {
                unlinkat(&directory, &below, AtFlags::empty())?;
                continue;
            }
            let up = loop {
                let up = format!(".spore-moved-{moved}");
                moved += 1;
                match renameat_with(&directory, &below, top, up.as_str(), RenameFlags::NOREPLACE) {
                    Err(Errno::EXIST) => {}
                    other => {
                        other?;
                        break CString::new(up).map_err(|_| Errno::INVAL)?;
                    }
                }
            };
            left.push((up, true));
        }
        unlinkat(top, &name, AtFlags::REMOVEDIR)?;
    }
    Ok(())
}

/// What is in a directory, and whether it is one itself.
fn names(directory: &OwnedFd) -> Result<Vec<(CString, bool)>, Errno> {
    let mut names = Vec::new();
    for entry in Dir::read_from(directory)? {
        let name = entry?.file_name().to_owned();
        if !matches!(name.as_bytes(), b"." | b"..") {
            let kind = kind_of(directory.as_fd(), name.as_bytes())?;
            names.push((name, kind == Some(FileType::Directory)));
        }
    }
    Ok(names)
}
