//! A raw disk image: a regular file or a block device, by open descriptor.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, FileTypeExt};

use nix::fcntl::{FallocateFlags, FcntlArg, OFlag, fallocate, fcntl};
use vm_memory::VolatileSlice;

use super::guest_io;

/// Unit of sizes and offsets, in bytes.
pub const SECTOR: u64 = 512;
/// Zeroes written at once where the file cannot zero a range by itself.
const ZERO_CHUNK: usize = 256 * 1024;

/// Why a file cannot serve as a disk.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    #[error("disk image: inspect the file: {0}")]
    Inspect(#[source] io::Error),
    #[error("disk image is a {found}; give a regular file or a block device")]
    Kind { found: &'static str },
    #[error("disk image is opened for {found}; the slot needs it opened for {needed}")]
    Access { found: &'static str, needed: &'static str },
    #[error(
        "disk image has {size} bytes; it must have at least 512 and a multiple of 512 (truncate -s %512)"
    )]
    Size { size: u64 },
}

/// Whether an error says that the file system or device cannot do such a thing at all.
pub fn unsupported(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::ENOSYS))
}

/// See the module. All offsets are in bytes; the caller keeps them inside [`RawDisk::sectors`].
#[derive(Debug)]
pub struct RawDisk {
    file: File,
    sectors: u64,
}

impl RawDisk {
    /// Takes `file` as it is open; `writable` says what the disk will be used for.
    pub fn new(mut file: File, writable: bool) -> Result<Self, DiskError> {
        let kind = file.metadata().map_err(DiskError::Inspect)?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            let found = if kind.is_dir() {
                "directory"
            } else if kind.is_char_device() {
                "character device"
            } else if kind.is_fifo() {
                "pipe"
            } else {
                "socket or other special file"
            };
            return Err(DiskError::Kind { found });
        }
        let flags = fcntl(&file, FcntlArg::F_GETFL).map_err(|error| DiskError::Inspect(error.into()))?;
        let found = match OFlag::from_bits_truncate(flags) & OFlag::O_ACCMODE {
            OFlag::O_RDONLY => "reading",
            OFlag::O_WRONLY => "writing",
            _ => "reading and writing",
        };
        let fits = if writable { found == "reading and writing" } else { found != "writing" };
        if !fits {
            return Err(DiskError::Access {
                found,
                needed: if writable { "reading and writing" } else { "reading" },
            });
        }
        // The end's position is the size of block devices too. Nothing here uses the position.
        let size = file.seek(SeekFrom::End(0)).map_err(DiskError::Inspect)?;
        if size == 0 || !size.is_multiple_of(SECTOR) || i64::try_from(size).is_err() {
            return Err(DiskError::Size { size });
        }
        Ok(Self { file, sectors: size / SECTOR })
    }

    /// Capacity in sectors of 512 bytes, at least 1.
    pub fn sectors(&self) -> u64 {
        self.sectors
    }

    fn transfer(
        slices: &[VolatileSlice<'_>],
        offset: u64,
        short: io::ErrorKind,
        mut call: impl FnMut(usize, i64) -> io::Result<usize>,
    ) -> io::Result<usize> {
        let total: usize = slices.iter().map(VolatileSlice::len).sum();
        let mut done = 0;
        while done < total {
            let position = i64::try_from(offset.saturating_add(done as u64))
                .map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
            match call(done, position)? {
                0 => return Err(short.into()),
                count => done += count,
            }
        }
        Ok(done)
    }

    /// Fills all of `slices`. A file that has shrunk gives `UnexpectedEof`.
    pub fn read(&self, offset: u64, slices: &[VolatileSlice<'_>]) -> io::Result<usize> {
        Self::transfer(slices, offset, io::ErrorKind::UnexpectedEof, |skip, position| {
            guest_io::read_at(self.file.as_fd(), slices, skip, position)
        })
    }

    /// Writes all of `slices`.
    pub fn write(&self, offset: u64, slices: &[VolatileSlice<'_>]) -> io::Result<usize> {
        Self::transfer(slices, offset, io::ErrorKind::WriteZero, |skip, position| {
            guest_io::write_at(self.file.as_fd(), slices, skip, position)
        })
    }

    /// Makes everything that was written durable.
    pub fn flush(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    fn allocate(&self, mode: FallocateFlags, offset: u64, len: u64) -> io::Result<()> {
        let invalid = |_| io::Error::from(io::ErrorKind::InvalidInput);
        let offset = i64::try_from(offset).map_err(invalid)?;
        let len = i64::try_from(len).map_err(invalid)?;
        Ok(fallocate(&self.file, mode | FallocateFlags::FALLOC_FL_KEEP_SIZE, offset, len)?)
    }

    /// Gives the range's storage back; it reads as zeroes after. Where the file
    /// system cannot, [`unsupported`] holds for the error.
    pub fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.allocate(FallocateFlags::FALLOC_FL_PUNCH_HOLE, offset, len)
    }

    /// Zeroes the range, giving its storage back if `unmap` says so and that is possible.
    pub fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        if unmap {
            match self.discard(offset, len) {
                Err(error) if unsupported(&error) => {}
                other => return other,
            }
        }
        match self.allocate(FallocateFlags::FALLOC_FL_ZERO_RANGE, offset, len) {
            Err(error) if unsupported(&error) => {}
            other => return other,
        }
        let zeroes = vec![0; ZERO_CHUNK.min(usize::try_from(len).unwrap_or(ZERO_CHUNK))];
        let mut done = 0;
        while done < len {
            let count = (len - done).min(zeroes.len() as u64);
            #[allow(clippy::cast_possible_truncation)] // at most ZERO_CHUNK
            self.file.write_all_at(&zeroes[..count as usize], offset + done)?;
            done += count;
        }
        Ok(())
    }
}
