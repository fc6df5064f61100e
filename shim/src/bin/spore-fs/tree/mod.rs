//! The file system that the guest sees: a root directory that lists the exports by number, and
//! behind each number a directory or file of the host.
//!
//! A file that the guest knows is an open path descriptor ([`inodes`]); all access goes through
//! it or one name below it, so there is no path to walk and none to escape by. What one export's
//! mount forbids (writing, device nodes) the kernel refuses. Attributes and names may be cached
//! by the guest for [`CACHED`]; data as long as a file is open and its times do not change. Locks
//! and inotify are the guest kernel's own: they do not reach the host or other guests.

mod attributes;
mod credentials;
mod directories;
mod handles;
mod inodes;
mod names;
pub(crate) mod state;
#[cfg(test)]
mod tests;

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use fuse_backend_rs::abi::fuse_abi::{CreateIn, stat64, statvfs64};
use fuse_backend_rs::api::filesystem::{
    Context, DirEntry, Entry, FileSystem, FsOptions, GetxattrReply, ListxattrReply, OpenOptions,
    SetattrValid, ZeroCopyReader, ZeroCopyWriter,
};
use rustix::fs::{FallocateFlags, SeekFrom};

use self::handles::{Handle, Handles};
use self::inodes::{Inode, Inodes};

/// How long the guest may take a name or attributes for true without asking.
const CACHED: Duration = Duration::from_secs(1);

pub(crate) struct Tree {
    inodes: Inodes,
    handles: Handles,
    /// The directory of this process's descriptors.
    descriptors: &'static str,
}

fn errno(number: i32) -> io::Error {
    io::Error::from_raw_os_error(number)
}

impl Tree {
    /// `descriptors` is where `/proc/self/fd` can be reached.
    pub(crate) fn new(descriptors: &'static str) -> Self {
        Self { inodes: Inodes::default(), handles: Handles::default(), descriptors }
    }

    /// Adds what `root` names as `/<id>`.
    pub(crate) fn export(&self, id: u32, root: OwnedFd) -> io::Result<()> {
        self.inodes.export(id, root)
    }

    /// A path by which a file that is known by a path descriptor can be opened, linked or changed:
    /// the file itself, whatever it is, a symbolic link too.
    fn path_of(&self, fd: BorrowedFd<'_>) -> String {
        format!("{}/{}", self.descriptors, fd.as_raw_fd())
    }

    fn entry(&self, inode: &Inode) -> io::Result<Entry> {
        Ok(Entry {
            inode: inode.number(),
            generation: 0,
            attr: attributes::of(&self.inodes, inode)?,
            attr_flags: 0,
            attr_timeout: CACHED,
            entry_timeout: CACHED,
        })
    }

    /// What stands under `name` in a directory, counted as known to the guest.
    fn find(&self, parent: u64, name: &CStr) -> io::Result<Entry> {
        let inode = names::lookup(self, parent, name)?;
        self.entry(&inode).inspect_err(|_| self.inodes.forget(inode.number(), 1))
    }

    fn handle(&self, number: u64) -> io::Result<std::sync::Arc<Handle>> {
        self.handles.get(number)
    }

    fn open_handle(&self, inode: &Inode, flags: u32) -> io::Result<u64> {
        let file = handles::open(self, inode, flags)?;
        Ok(self.handles.insert(Handle::new(inode.number(), flags, file)))
    }

    fn attributes_of(&self, number: u64) -> io::Result<(stat64, Duration)> {
        if number == inodes::ROOT {
            return Ok((attributes::of_root(), CACHED));
        }
        Ok((attributes::of(&self.inodes, &*self.inodes.get(number)?)?, CACHED))
    }
}

impl FileSystem for Tree {
    type Inode = u64;
    type Handle = u64;

    fn init(&self, _capable: FsOptions) -> io::Result<FsOptions> {
        // A mount begins anew; what an earlier one knew is of no use to it.
        self.destroy();
        Ok(FsOptions::ASYNC_READ
            | FsOptions::BIG_WRITES
            | FsOptions::MAX_PAGES
            | FsOptions::AUTO_INVAL_DATA
            | FsOptions::DO_READDIRPLUS
            | FsOptions::READDIRPLUS_AUTO
            | FsOptions::ASYNC_DIO
            | FsOptions::PARALLEL_DIROPS
            | FsOptions::ATOMIC_O_TRUNC)
    }

    fn destroy(&self) {
        self.handles.clear();
        self.inodes.clear();
    }

    fn lookup(&self, _: &Context, parent: u64, name: &CStr) -> io::Result<Entry> {
        self.find(parent, name)
    }

    fn forget(&self, _: &Context, inode: u64, count: u64) {
        self.inodes.forget(inode, count);
    }

    fn getattr(&self, _: &Context, inode: u64, _: Option<u64>) -> io::Result<(stat64, Duration)> {
        self.attributes_of(inode)
    }

    fn setattr(
        &self,
        _: &Context,
        inode: u64,
        wanted: stat64,
        handle: Option<u64>,
        valid: SetattrValid,
    ) -> io::Result<(stat64, Duration)> {
        let handle = handle.map(|number| self.handle(number)).transpose()?;
        attributes::set(self, &*self.inodes.get(inode)?, &wanted, handle.as_deref(), valid)?;
        self.attributes_of(inode)
    }

    fn readlink(&self, _: &Context, inode: u64) -> io::Result<Vec<u8>> {
        let target = rustix::fs::readlinkat(self.inodes.get(inode)?.fd()?, c"", Vec::new())?;
        Ok(target.into_bytes())
    }

    fn symlink(&self, context: &Context, target: &CStr, parent: u64, name: &CStr) -> io::Result<Entry> {
        names::symlink(self, context, target, parent, name)?;
        self.find(parent, name)
    }

    fn mknod(
        &self,
        context: &Context,
        parent: u64,
        name: &CStr,
        mode: u32,
        rdev: u32,
        _umask: u32,
    ) -> io::Result<Entry> {
        names::make_node(self, context, parent, name, (mode, rdev))?;
        self.find(parent, name)
    }

    fn mkdir(
        &self,
        context: &Context,
        parent: u64,
        name: &CStr,
        mode: u32,
        _umask: u32,
    ) -> io::Result<Entry> {
        names::make_directory(self, context, parent, name, mode)?;
        self.find(parent, name)
    }

    fn unlink(&self, _: &Context, parent: u64, name: &CStr) -> io::Result<()> {
        names::remove(self, parent, name, false)
    }

    fn rmdir(&self, _: &Context, parent: u64, name: &CStr) -> io::Result<()> {
        names::remove(self, parent, name, true)
    }

    fn rename(&self, _: &Context, from: u64, old: &CStr, to: u64, new: &CStr, flags: u32) -> io::Result<()> {
        names::rename(self, (from, old), (to, new), flags)
    }

    fn link(&self, _: &Context, inode: u64, parent: u64, name: &CStr) -> io::Result<Entry> {
        names::link(self, inode, parent, name)?;
        self.find(parent, name)
    }

    fn open(
        &self,
        _: &Context,
        inode: u64,
        flags: u32,
        _fuse_flags: u32,
    ) -> io::Result<(Option<u64>, OpenOptions, Option<u32>)> {
        let handle = self.open_handle(&*self.inodes.get(inode)?, flags)?;
        Ok((Some(handle), OpenOptions::empty(), None))
    }

    fn create(
        &self,
        context: &Context,
        parent: u64,
        name: &CStr,
        args: CreateIn,
    ) -> io::Result<(Entry, Option<u64>, OpenOptions, Option<u32>)> {
        let (entry, handle) = match names::create(self, context, parent, name, &args)? {
            Some(file) => {
                let entry = self.find(parent, name)?;
                let handle = Handle::new(entry.inode, handles::kept(args.flags), file);
                (entry, self.handles.insert(handle))
            }
            None => {
                let entry = self.find(parent, name)?;
                let opened =
                    self.inodes.get(entry.inode).and_then(|inode| self.open_handle(&inode, args.flags));
                (entry, opened.inspect_err(|_| self.inodes.forget(entry.inode, 1))?)
            }
        };
        Ok((entry, Some(handle), OpenOptions::empty(), None))
    }

    fn read(
        &self,
        _: &Context,
        _inode: u64,
        handle: u64,
        writer: &mut dyn ZeroCopyWriter,
        size: u32,
        offset: u64,
        _lock_owner: Option<u64>,
        _flags: u32,
    ) -> io::Result<usize> {
        let handle = self.handle(handle)?;
        let size = (size as usize).min(writer.available_bytes());
        writer.write_from(&mut *crate::sys::lend(handle.file()?), size, offset)
    }

    fn write(
        &self,
        _: &Context,
        _inode: u64,
        handle: u64,
        reader: &mut dyn ZeroCopyReader,
        size: u32,
        offset: u64,
        _lock_owner: Option<u64>,
        _delayed: bool,
        _flags: u32,
        _fuse_flags: u32,
    ) -> io::Result<usize> {
        let handle = self.handle(handle)?;
        reader.read_to(&mut *crate::sys::lend(handle.file()?), size as usize, offset)
    }

    /// A close in the guest: errors that were kept for it come now.
    fn flush(&self, _: &Context, _inode: u64, handle: u64, _lock_owner: u64) -> io::Result<()> {
        let copy = self.handle(handle)?.file()?.try_clone()?;
        nix::unistd::close(OwnedFd::from(copy)).map_err(io::Error::from)
    }

    fn fsync(&self, _: &Context, _inode: u64, datasync: bool, handle: u64) -> io::Result<()> {
        let handle = self.handle(handle)?;
        if datasync { handle.file()?.sync_data() } else { handle.file()?.sync_all() }
    }

    fn fallocate(
        &self,
        _: &Context,
        _inode: u64,
        handle: u64,
        mode: u32,
        offset: u64,
        length: u64,
    ) -> io::Result<()> {
        let mode = FallocateFlags::from_bits(mode).ok_or_else(|| errno(libc::EOPNOTSUPP))?;
        Ok(rustix::fs::fallocate(self.handle(handle)?.file()?, mode, offset, length)?)
    }

    fn release(
        &self,
        _: &Context,
        _inode: u64,
        _flags: u32,
        handle: u64,
        _flush: bool,
        _flock_release: bool,
        _lock_owner: Option<u64>,
    ) -> io::Result<()> {
        self.handles.remove(handle)
    }

    fn statfs(&self, _: &Context, inode: u64) -> io::Result<statvfs64> {
        let inode = if inode == inodes::ROOT { self.inodes.any_export()? } else { self.inodes.get(inode)? };
        crate::sys::statvfs(inode.fd()?)
    }

    fn setxattr(&self, _: &Context, inode: u64, name: &CStr, value: &[u8], flags: u32) -> io::Result<()> {
        attributes::set_extended(self, &*self.inodes.get(inode)?, name, value, flags)
    }

    fn getxattr(&self, _: &Context, inode: u64, name: &CStr, size: u32) -> io::Result<GetxattrReply> {
        attributes::get_extended(self, &*self.inodes.get(inode)?, name, size)
    }

    fn listxattr(&self, _: &Context, inode: u64, size: u32) -> io::Result<ListxattrReply> {
        attributes::list_extended(self, &*self.inodes.get(inode)?, size)
    }

    fn removexattr(&self, _: &Context, inode: u64, name: &CStr) -> io::Result<()> {
        let inode = self.inodes.get(inode)?;
        Ok(rustix::fs::removexattr(self.path_of(inode.fd()?), name)?)
    }

    fn opendir(&self, _: &Context, inode: u64, _flags: u32) -> io::Result<(Option<u64>, OpenOptions)> {
        Ok((Some(directories::open(self, inode)?), OpenOptions::empty()))
    }

    fn readdir(
        &self,
        _: &Context,
        _inode: u64,
        handle: u64,
        _size: u32,
        offset: u64,
        add: &mut dyn FnMut(DirEntry<'_>) -> io::Result<usize>,
    ) -> io::Result<()> {
        directories::read(self, handle, offset, &mut |_, entry| add(entry).map(|len| len > 0))
    }

    fn readdirplus(
        &self,
        _: &Context,
        _inode: u64,
        handle: u64,
        _size: u32,
        offset: u64,
        add: &mut dyn FnMut(DirEntry<'_>, Entry) -> io::Result<usize>,
    ) -> io::Result<()> {
        directories::read(self, handle, offset, &mut |parent, entry| {
            // Without an inode the guest looks the name up itself when it needs it.
            let found = directories::known(self, parent, entry.name).unwrap_or_default();
            let fits = add(entry, found).map(|len| len > 0);
            if found.inode != 0 && !matches!(fits, Ok(true)) {
                self.inodes.forget(found.inode, 1);
            }
            fits
        })
    }

    fn fsyncdir(&self, context: &Context, inode: u64, datasync: bool, handle: u64) -> io::Result<()> {
        match self.handle(handle)?.is_root() {
            true => Ok(()),
            false => self.fsync(context, inode, datasync, handle),
        }
    }

    fn releasedir(&self, _: &Context, _inode: u64, _flags: u32, handle: u64) -> io::Result<()> {
        self.handles.remove(handle)
    }

    fn lseek(&self, _: &Context, _inode: u64, handle: u64, offset: u64, whence: u32) -> io::Result<u64> {
        let whence = match i32::try_from(whence) {
            Ok(libc::SEEK_DATA) => SeekFrom::Data(offset),
            Ok(libc::SEEK_HOLE) => SeekFrom::Hole(offset),
            // The others are the guest kernel's own.
            _ => return Err(errno(libc::EINVAL)),
        };
        Ok(rustix::fs::seek(self.handle(handle)?.file()?.as_fd(), whence)?)
    }
}
