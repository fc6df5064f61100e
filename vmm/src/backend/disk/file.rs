//! One file of a disk, by open descriptor: a regular file or a block device.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::ops::Range;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt};

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, FcntlArg, OFlag, fallocate, fcntl};
use nix::unistd::{Whence, lseek};
use vm_memory::VolatileSlice;

use super::{DiskError, unsupported};
use crate::backend::guest_io;

/// Zeroes written at once where the file cannot zero a range by itself.
const ZERO_CHUNK: usize = 256 * 1024;

/// See the module. All offsets are in bytes, those of the file.
#[derive(Debug)]
pub(super) struct DiskFile {
    file: File,
    length: u64,
    #[cfg(test)]
    pub(super) tape: Option<super::tape::Tape>,
}

impl DiskFile {
    /// Takes `file` as it is open; `writable` says what it will be used for.
    pub(super) fn new(mut file: File, writable: bool) -> Result<Self, DiskError> {
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
        let length = file.seek(SeekFrom::End(0)).map_err(DiskError::Inspect)?;
        Ok(Self {
            file,
            length,
            #[cfg(test)]
            tape: None,
        })
    }

    /// In bytes, as it was when the file was taken.
    pub(super) fn length(&self) -> u64 {
        self.length
    }

    /// What two descriptors of one file have in common.
    pub(super) fn identity(&self) -> io::Result<(u64, u64)> {
        let metadata = self.file.metadata()?;
        Ok((metadata.dev(), metadata.ino()))
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
    pub(super) fn read(&self, offset: u64, slices: &[VolatileSlice<'_>]) -> io::Result<usize> {
        Self::transfer(slices, offset, io::ErrorKind::UnexpectedEof, |skip, position| {
            guest_io::read_at(self.file.as_fd(), slices, skip, position)
        })
    }

    /// Writes all of `slices`.
    pub(super) fn write(&self, offset: u64, slices: &[VolatileSlice<'_>]) -> io::Result<usize> {
        let done = Self::transfer(slices, offset, io::ErrorKind::WriteZero, |skip, position| {
            guest_io::write_at(self.file.as_fd(), slices, skip, position)
        })?;
        #[cfg(test)]
        self.record(|| super::tape::Step::write(offset, slices));
        Ok(done)
    }

    /// The same with bytes of our own.
    pub(super) fn read_bytes(&self, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(bytes, offset)
    }

    pub(super) fn write_bytes(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.file.write_all_at(bytes, offset)?;
        #[cfg(test)]
        self.record(|| super::tape::Step::Write { offset, bytes: bytes.to_vec() });
        Ok(())
    }

    /// Makes an empty file as long as it shall be, all of it a hole.
    pub(super) fn extend(&mut self, length: u64) -> io::Result<()> {
        self.file.set_len(length)?;
        self.length = length;
        Ok(())
    }

    /// Makes all that was written durable, and the file's length.
    pub(super) fn sync(&self) -> io::Result<()> {
        #[cfg(test)]
        self.tape.as_ref().map_or(Ok(()), super::tape::Tape::sync)?;
        self.file.sync_data()?;
        #[cfg(test)]
        self.record(|| super::tape::Step::Sync);
        Ok(())
    }

    fn allocate(&self, mode: FallocateFlags, offset: u64, len: u64) -> io::Result<()> {
        let invalid = |_| io::Error::from(io::ErrorKind::InvalidInput);
        let at = i64::try_from(offset).map_err(invalid)?;
        let count = i64::try_from(len).map_err(invalid)?;
        fallocate(&self.file, mode | FallocateFlags::FALLOC_FL_KEEP_SIZE, at, count)?;
        #[cfg(test)]
        self.record(|| super::tape::Step::Zero { offset, len });
        Ok(())
    }

    /// Gives the range's storage back; it reads as zeroes after. Where the file
    /// system cannot, [`unsupported`] holds for the error.
    pub(super) fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.allocate(FallocateFlags::FALLOC_FL_PUNCH_HOLE, offset, len)
    }

    /// Zeroes the range, giving its storage back if `unmap` says so and that is possible.
    pub(super) fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
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
            self.write_bytes(offset + done, &zeroes[..count as usize])?;
            done += count;
        }
        Ok(())
    }

    /// The first range at or behind `at` and before `end` that may hold something other than zeroes. What the
    /// file system calls a hole reads as zeroes; what it calls data may do so too.
    pub(super) fn next_data(&self, at: u64, end: u64) -> io::Result<Option<Range<u64>>> {
        if at >= end {
            return Ok(None);
        }
        let from = i64::try_from(at).map_err(io::Error::other)?;
        let start = match lseek(&self.file, from, Whence::SeekData) {
            Ok(start) => start,
            Err(Errno::ENXIO) => return Ok(None),
            // A device, or a file system that does not know its holes.
            Err(Errno::EINVAL | Errno::EOPNOTSUPP) => return Ok(Some(at..end)),
            Err(error) => return Err(error.into()),
        };
        let hole = lseek(&self.file, start, Whence::SeekHole)?;
        let (start, hole) =
            (u64::try_from(start).map_err(io::Error::other)?, u64::try_from(hole).map_err(io::Error::other)?);
        let hole = hole.min(end);
        Ok((start < hole).then_some(start..hole))
    }

    #[cfg(test)]
    fn record(&self, step: impl FnOnce() -> super::tape::Step) {
        if let Some(tape) = &self.tape {
            tape.record(step());
        }
    }
}
