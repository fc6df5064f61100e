//! Reading and writing pieces of regular files, holes left as they are.

use std::fs::File;
use std::os::unix::fs::FileExt;

use nix::errno::Errno;
use nix::fcntl::{OFlag, openat};
use nix::sys::stat::{FileStat, Mode, fchmod, fstat};
use nix::unistd::{Whence, lseek};
use spore_agent_api::files::MAX_CHUNK;

use super::attributes::{check_mode, set_owner};
use super::root::{Root, errno};
use crate::error::{AgentError, Result};

/// What Read answers.
#[derive(Debug, PartialEq, Eq)]
pub struct Piece {
    pub offset: u64,
    pub data: Vec<u8>,
    pub end: bool,
    pub identity: Identity,
}

/// Device and inode.
pub type Identity = (u64, u64);

/// Whether Write makes the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Create {
    Never,
    IfMissing,
    Always,
}

/// What Write is given.
#[derive(Debug)]
pub struct Write {
    pub path: Vec<u8>,
    pub offset: u64,
    pub data: Vec<u8>,
    pub create: Create,
    pub mode: u32,
    pub owner: (u32, u32),
    pub size: Option<u64>,
}

fn identity(stat: &FileStat) -> Identity {
    (stat.st_dev, stat.st_ino)
}

pub fn read(root: &Root, path: &[u8], offset: u64, length: u32, skip_hole: bool) -> Result<Piece> {
    const VERB: &str = "read";
    let length = usize::try_from(length).unwrap_or(usize::MAX);
    if length == 0 || length > MAX_CHUNK {
        return Err(root.refused(VERB, path, format!("{length} bytes, 1 to {MAX_CHUNK} are allowed")));
    }
    let (file, stat) = root.file(VERB, path, OFlag::O_RDONLY)?;
    let failed = root.failed(VERB, path);
    let identity = identity(&stat);
    let (mut at, mut wanted, mut behind) = (offset, length, None);
    if skip_hole {
        let end = file.metadata().map_err(|error| failed(errno(&error)))?.len();
        match next_data(&file, offset).map_err(&failed)? {
            Next::Data { start, end: hole } => {
                at = start;
                wanted = wanted.min(usize::try_from(hole - start).unwrap_or(usize::MAX));
                behind = Some(end);
            }
            Next::Nothing => {
                return Ok(Piece { offset: end.max(offset), data: Vec::new(), end: true, identity });
            }
            Next::Unknown => {}
        }
    }
    let mut data = vec![0; wanted];
    let mut filled = 0;
    while filled < wanted {
        match file.read_at(&mut data[filled..], at + filled as u64) {
            Ok(0) => break,
            Ok(count) => filled += count,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => return Err(failed(errno(&error))),
        }
    }
    data.truncate(filled);
    let end = filled < wanted || behind.is_some_and(|end| at + filled as u64 >= end);
    Ok(Piece { offset: at, data, end, identity })
}

/// What comes next in a sparse file.
enum Next {
    Data {
        start: u64,
        end: u64,
    },
    /// A hole at most.
    Nothing,
    /// The file system does not know its holes.
    Unknown,
}

fn next_data(file: &File, offset: u64) -> nix::Result<Next> {
    let Ok(from) = i64::try_from(offset) else { return Ok(Next::Nothing) };
    let start = match lseek(file, from, Whence::SeekData) {
        Ok(start) => start,
        Err(Errno::ENXIO) => return Ok(Next::Nothing),
        Err(Errno::EINVAL | Errno::EOPNOTSUPP | Errno::ESPIPE) => return Ok(Next::Unknown),
        Err(error) => return Err(error),
    };
    let end = lseek(file, start, Whence::SeekHole)?;
    match (u64::try_from(start), u64::try_from(end)) {
        (Ok(start), Ok(end)) if start >= offset && end > start => Ok(Next::Data { start, end }),
        // It was cut meanwhile.
        _ => Ok(Next::Unknown),
    }
}

/// Writes, makes the file when that is asked, and sets its size last.
pub fn write(root: &Root, request: &Write) -> Result<Identity> {
    const VERB: &str = "write";
    let Write { path, offset, data, .. } = request;
    if data.len() > MAX_CHUNK {
        let length = data.len();
        return Err(root.refused(VERB, path, format!("{length} bytes, at most {MAX_CHUNK} are allowed")));
    }
    let end = offset.checked_add(data.len() as u64).filter(|end| i64::try_from(*end).is_ok());
    if end.is_none() || request.size.is_some_and(|size| i64::try_from(size).is_err()) {
        return Err(root.refused(VERB, path, "offset or size beyond 2^63 - 1"));
    }
    check_mode(root, VERB, path, request.mode)?;
    let failed = root.failed(VERB, path);
    let file = match request.create {
        Create::Always => make(root, request)?,
        Create::Never => root.file(VERB, path, OFlag::O_WRONLY)?.0,
        Create::IfMissing => match root.file(VERB, path, OFlag::O_WRONLY) {
            Err(AgentError::NotFound(_)) => make(root, request)?,
            other => other?.0,
        },
    };
    if !data.is_empty() {
        file.write_all_at(data, *offset).map_err(|error| failed(errno(&error)))?;
    }
    if let Some(size) = request.size {
        file.set_len(size).map_err(|error| failed(errno(&error)))?;
    }
    fstat(&file).map(|stat| identity(&stat)).map_err(failed)
}

fn make(root: &Root, request: &Write) -> Result<File> {
    const VERB: &str = "create";
    let place = root.place(VERB, &request.path)?;
    let failed = root.failed(VERB, &request.path);
    let flags = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    // Nobody else may open it before it has its owner.
    let file = openat(&place.dir, place.name, flags, Mode::S_IRUSR | Mode::S_IWUSR).map_err(&failed)?;
    set_owner(&file, request.owner).map_err(&failed)?;
    fchmod(&file, Mode::from_bits_truncate(request.mode)).map_err(&failed)?;
    Ok(file.into())
}
