//! The tables of a server, written down and taken up again: what a guest whose volumes are
//! mounted needs to go on with another server (DESIGN 5).
//!
//! Files are written down by their path below their export and found again by it: that is what
//! survives a move to other storage. A file that has no path any more (unlinked, but open in the
//! guest), or that is not there at the restore, gives ESTALE from then on. Files of the save are
//! untrusted: every number is checked, and a path cannot leave its export.

use std::fs::File;
use std::io::{self, BufReader, BufWriter, Read, Write};
use std::os::fd::OwnedFd;

use rustix::fs::{CWD, FileType, Mode, OFlags, ResolveFlags, openat2, readlinkat};
use serde::{Deserialize, Serialize};

use containerd_shim_spore::protocol::MAX_TABLES;

use super::directories;
use super::handles::{self, Handle};
use super::inodes::{Device, Inode, ROOT, Saved, status};
use super::{Tree, errno};

const VERSION: u32 = 1;

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct StateV1 {
    version: u32,
    files: Vec<FileV1>,
    handles: Vec<HandleV1>,
    /// Export, device, and the place that keeps its inode numbers apart from others'.
    devices: Vec<(Device, u64)>,
    last_file: u64,
    last_handle: u64,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct FileV1 {
    number: u64,
    export: u32,
    lookups: u64,
    /// Below the export; any bytes but NUL. None: it had none when it was saved.
    path: Option<Vec<u8>>,
    /// The kind's bits of st_mode: a path that is another kind of file by now is another file.
    kind: u32,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct HandleV1 {
    number: u64,
    file: u64,
    flags: u32,
}

/// Writes the tables into `file`. No request may be under way.
pub(crate) fn save(tree: &Tree, file: File) -> io::Result<()> {
    let Saved { known, devices, last: last_file } = tree.inodes.saved();
    let (open, last_handle) = tree.handles.saved();
    let files = known.iter().map(|(inode, lookups)| FileV1 {
        number: inode.number(),
        export: inode.export(),
        lookups: *lookups,
        path: path_of(tree, inode),
        kind: inode.kind().as_raw_mode(),
    });
    let handles = open.iter().map(|(number, handle)| HandleV1 {
        number: *number,
        file: handle.inode(),
        flags: handles::kept(handle.flags()),
    });
    let state = StateV1 {
        version: VERSION,
        files: files.collect(),
        handles: handles.collect(),
        devices,
        last_file,
        last_handle,
    };
    let mut writer = BufWriter::new(Capped { file, left: MAX_TABLES });
    serde_json::to_writer(&mut writer, &state)?;
    writer.flush()
}

/// A file that does not grow beyond what a restore takes: how many files a guest knows is up to the guest.
struct Capped {
    file: File,
    left: u64,
}

impl Write for Capped {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let too_many = || {
            let detail = format!("the guest knows more files than {MAX_TABLES} bytes can say");
            io::Error::new(io::ErrorKind::FileTooLarge, detail)
        };
        self.left = self.left.checked_sub(bytes.len() as u64).ok_or_else(too_many)?;
        self.file.write_all(bytes)?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

/// A file's path below its export, if that path leads to it.
fn path_of(tree: &Tree, inode: &Inode) -> Option<Vec<u8>> {
    let fd = inode.fd().ok()?;
    let root = tree.inodes.export_of(inode.export()).ok()?;
    let whole = readlinkat(CWD, tree.path_of(fd), Vec::new()).ok()?.into_bytes();
    let top = readlinkat(CWD, tree.path_of(root.fd().ok()?), Vec::new()).ok()?.into_bytes();
    let below = whole.strip_prefix(top.as_slice())?;
    let path = below.strip_prefix(b"/").unwrap_or(below).to_vec();
    let found = status(std::os::fd::AsFd::as_fd(&below_export(&root, &path).ok()?)).ok()?;
    let this = status(fd).ok()?;
    ((found.st_dev, found.st_ino) == (this.st_dev, this.st_ino)).then_some(path)
}

/// Opens a path below an export's root, never leaving it and following no link.
fn below_export(root: &Inode, path: &[u8]) -> io::Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    Ok(openat2(root.fd()?, path, flags, Mode::empty(), resolve)?)
}

/// Takes the tables over that [`save`] wrote.
pub(crate) fn restore(tree: &Tree, file: File) -> io::Result<()> {
    let invalid = |detail: String| io::Error::new(io::ErrorKind::InvalidData, detail);
    let length = file.metadata()?.len();
    if length > MAX_TABLES {
        return Err(invalid(format!("{length} bytes; at most {MAX_TABLES} are allowed")));
    }
    let state: StateV1 = serde_json::from_reader(BufReader::new(file.take(MAX_TABLES)))?;
    if state.version != VERSION {
        return Err(invalid(format!("version {}; this server knows {VERSION}", state.version)));
    }
    tree.inodes.restore_numbers(&state.devices, state.last_file);
    tree.handles.restore_last(state.last_handle);
    for file in state.files {
        let found = file.path.as_deref().and_then(|path| find(tree, file.export, path, file.kind));
        tree.inodes.restore(file.number, file.export, found, file.lookups)?;
    }
    for HandleV1 { number, file, flags } in state.handles {
        let handle = reopen(tree, file, flags).unwrap_or_else(|_| Handle::empty(file, flags));
        tree.handles.restore(number, handle)?;
    }
    Ok(())
}

fn find(tree: &Tree, export: u32, path: &[u8], kind: u32) -> Option<OwnedFd> {
    let root = tree.inodes.export_of(export).ok()?;
    let found = below_export(&root, path).ok()?;
    let same = FileType::from_raw_mode(status(std::os::fd::AsFd::as_fd(&found)).ok()?.st_mode)
        == FileType::from_raw_mode(kind);
    same.then_some(found)
}

fn reopen(tree: &Tree, number: u64, flags: u32) -> io::Result<Handle> {
    if number == ROOT {
        return Ok(Handle::empty(ROOT, flags));
    }
    let inode = tree.inodes.get(number)?;
    let file = match inode.kind() {
        FileType::Directory => directories::readable(&inode)?,
        FileType::RegularFile => handles::open(tree, &inode, handles::kept(flags))?,
        _ => return Err(errno(libc::ENXIO)),
    };
    Ok(Handle::new(number, flags, file))
}
