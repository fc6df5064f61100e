//! A sparse file without its holes, for what does not keep them: tar, copies, registries.
//!
//! ```text
//! 0   magic "SPORPACK"
//! 8   version, 1 (4 bytes), then 4 zero bytes
//! 16  bytes of the sparse file
//! 24  number of extents
//! 32  the extents: offset and length, 8 bytes each; ascending, apart from each other, not empty
//!     the extents' bytes, one after the other
//! ```
//!
//! Numbers are little-endian. What no extent has is zeroes.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::fs::FileExt;

use super::sparse::{self, PIECE, is_zero};

const MAGIC: [u8; 8] = *b"SPORPACK";
const VERSION: u32 = 1;
const HEADER: u64 = 32;
/// Most extents: 64 MiB of them in memory.
const MAX_EXTENTS: usize = 4 << 20;
const MAX_LENGTH: u64 = 16 << 40;

/// A packed file that is none.
#[derive(Debug, thiserror::Error)]
pub enum PackError {
    #[error("not a packed file")]
    Magic,
    #[error("a packed file of version {0}; this build knows version {VERSION}")]
    Version(u32),
    #[error("{what}: {found}, at most {max}")]
    TooLarge { what: &'static str, found: u64, max: u64 },
    #[error("extent {0} is empty, overlaps the one before it, or lies beyond the file")]
    Extent(u64),
    #[error("its extents have {data} bytes, {there} are there")]
    Size { data: u64, there: u64 },
    #[error("read: {0}")]
    Read(#[source] io::Error),
    #[error("write: {0}")]
    Write(#[source] io::Error),
}

/// A file about to be packed; it must not change.
pub(super) struct Packed<'a> {
    file: &'a File,
    length: u64,
    extents: Vec<(u64, u64)>,
}

impl<'a> Packed<'a> {
    pub(super) fn new(file: &'a File) -> io::Result<Self> {
        let length = file.metadata()?.len();
        Ok(Self { file, length, extents: sparse::extents(file, MAX_EXTENTS)? })
    }

    /// Bytes that [`Self::write`] writes.
    pub(super) fn size(&self) -> u64 {
        HEADER + self.extents.iter().map(|(_, length)| 16 + length).sum::<u64>()
    }

    pub(super) fn write(&self, out: &mut dyn Write) -> io::Result<()> {
        let mut head = Vec::with_capacity(32 + 16 * self.extents.len());
        head.extend(MAGIC);
        head.extend(VERSION.to_le_bytes());
        head.extend([0; 4]);
        head.extend(self.length.to_le_bytes());
        head.extend((self.extents.len() as u64).to_le_bytes());
        for (offset, length) in &self.extents {
            head.extend(offset.to_le_bytes());
            head.extend(length.to_le_bytes());
        }
        out.write_all(&head)?;
        let mut buffer = vec![0; chunk(PIECE * 4)];
        for &(offset, length) in &self.extents {
            let mut done = 0;
            while done < length {
                let part = &mut buffer[..chunk(length - done)];
                self.file.read_exact_at(part, offset + done)?;
                out.write_all(part)?;
                done += part.len() as u64;
            }
        }
        Ok(())
    }
}

/// Bytes moved at once.
fn chunk(left: u64) -> usize {
    usize::try_from(left.min(PIECE * 4)).unwrap_or(0)
}

/// Unpacks the `size` bytes of `input`, from whomever they are, into a new file. Nothing is allocated by what
/// they say but memory below a cap.
pub(super) fn unpack(mut input: impl Read, size: u64, to: &File) -> Result<(), PackError> {
    let mut number = |what: &'static str, max: u64| {
        let mut bytes = [0; 8];
        input.read_exact(&mut bytes).map_err(PackError::Read)?;
        let found = u64::from_le_bytes(bytes);
        if found > max { Err(PackError::TooLarge { what, found, max }) } else { Ok(found) }
    };
    if number("magic", u64::MAX)? != u64::from_le_bytes(MAGIC) {
        return Err(PackError::Magic);
    }
    let version = number("version", u64::MAX)?;
    if version != u64::from(VERSION) {
        return Err(PackError::Version(u32::try_from(version).unwrap_or(u32::MAX)));
    }
    let length = number("length", MAX_LENGTH)?;
    let count = number("extents", (MAX_EXTENTS as u64).min(size / 16))?;
    let (mut extents, mut end, mut data) = (Vec::new(), 0, 0u64);
    for at in 0..count {
        let (offset, bytes) = (number("offset", length)?, number("length", length)?);
        let fits = offset.checked_add(bytes).filter(|end| *end <= length);
        let (Some(next), true) = (fits, bytes > 0 && (at == 0 || offset >= end)) else {
            return Err(PackError::Extent(at));
        };
        end = next;
        data += bytes;
        extents.push((offset, bytes));
    }
    let there = size.saturating_sub(HEADER + 16 * count);
    if data != there {
        return Err(PackError::Size { data, there });
    }
    to.set_len(length).map_err(PackError::Write)?;
    let mut buffer = vec![0; chunk(u64::MAX)];
    for (offset, bytes) in extents {
        let mut done = 0;
        while done < bytes {
            let part = &mut buffer[..chunk(bytes - done)];
            input.read_exact(part).map_err(PackError::Read)?;
            // What the packer could not tell from data becomes a hole again.
            if !is_zero(part) {
                to.write_all_at(part, offset + done).map_err(PackError::Write)?;
            }
            done += part.len() as u64;
        }
    }
    Ok(())
}
