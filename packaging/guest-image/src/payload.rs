//! Reads a bzImage's setup header and unpacks the kernel's ELF file out of it.
//!
//! Specification: the kernel's Documentation/arch/x86/boot.rst ("The Real-Mode Kernel
//! Header"). The file is untrusted: every offset is checked, the size is capped before
//! anything is unpacked, and Debian's own tools do the unpacking.

use std::path::Path;

use crate::elf;
use crate::error::{Error, KernelError, Result};
use crate::tools::{self, Filter};

/// No kernel comes near this when unpacked.
const MAX_UNPACKED: u64 = 256 << 20;
const SECTOR: usize = 512;
const SETUP_SECTS: usize = 0x1f1;
const MAGIC: usize = 0x202;
const VERSION: usize = 0x206;
const KERNEL_VERSION: usize = 0x20e;
const PAYLOAD_OFFSET: usize = 0x248;
const PAYLOAD_LENGTH: usize = 0x24c;
/// The end of the last field read here.
const MIN_HEADER: usize = 0x250;
const MIN_PROTOCOL: u16 = 0x0208;

/// What the setup header says.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Setup<'a> {
    /// `uname -r`.
    pub(crate) release: String,
    payload: &'a [u8],
}

/// Parses the setup header of the bzImage `data`.
pub(crate) fn parse(data: &[u8]) -> std::result::Result<Setup<'_>, KernelError> {
    if data.len() < MIN_HEADER {
        return Err(KernelError::Short { found: data.len(), min: MIN_HEADER });
    }
    let word = |at: usize| u32::from_le_bytes([data[at], data[at + 1], data[at + 2], data[at + 3]]);
    let magic = word(MAGIC).to_le_bytes();
    if magic != *b"HdrS" {
        return Err(KernelError::Magic { found: magic });
    }
    let protocol = u16::from_le_bytes([data[VERSION], data[VERSION + 1]]);
    if protocol < MIN_PROTOCOL {
        return Err(KernelError::Protocol { found: protocol });
    }
    // boot.rst: zero means four, for old kernels.
    let setup_sectors = match data[SETUP_SECTS] {
        0 => 4,
        n => usize::from(n),
    };
    let setup_end = (setup_sectors + 1) * SECTOR;

    let version_at =
        SECTOR + usize::from(u16::from_le_bytes([data[KERNEL_VERSION], data[KERNEL_VERSION + 1]]));
    let release = data
        .get(version_at..setup_end.min(data.len()))
        .and_then(|text| text.split(|byte| *byte == 0 || *byte == b' ').next())
        .filter(|text| !text.is_empty() && text.len() < 128)
        .filter(|text| text.iter().all(|byte| byte.is_ascii_alphanumeric() || b"+-._~".contains(byte)))
        .and_then(|text| std::str::from_utf8(text).ok())
        .filter(|text| *text != "." && *text != "..")
        .ok_or(KernelError::Version { offset: version_at })?;

    let (offset, length) = (u64::from(word(PAYLOAD_OFFSET)), u64::from(word(PAYLOAD_LENGTH)));
    let start = setup_end as u64 + offset;
    let payload = usize::try_from(start)
        .ok()
        .zip(usize::try_from(start + length).ok())
        .and_then(|(start, end)| data.get(start..end))
        .filter(|payload| payload.len() >= 8)
        .ok_or(KernelError::PayloadRange { offset: start, length, size: data.len() as u64 })?;
    Ok(Setup { release: release.to_owned(), payload })
}

impl Setup<'_> {
    /// The kernel's ELF file (`vmlinux` without debugging symbols), as [`elf::lean_kernel`] leaves it.
    pub(crate) fn unpack(&self, path: &Path) -> Result<Vec<u8>> {
        let bad = |source| Error::Kernel { path: path.to_owned(), source };
        let payload = self.payload;
        let (filter, expected) = plan(payload).map_err(bad)?;
        let unpacked = match filter {
            // The trailing size belongs to gzip's own format; elsewhere the kernel's build appends it.
            Some(filter @ Filter::Gzip) => {
                tools::unpack(filter, payload, expected, &path.display().to_string())?
            }
            Some(filter) => {
                tools::unpack(filter, &payload[..payload.len() - 4], expected, &path.display().to_string())?
            }
            None => payload.to_vec(),
        };
        if filter.is_some() && unpacked.len() as u64 != expected {
            return Err(bad(KernelError::PayloadMismatch { found: unpacked.len() as u64, expected }));
        }
        elf::lean_kernel(unpacked).map_err(|source| bad(KernelError::PayloadElf(source)))
    }
}

/// How to unpack `payload` (at least eight bytes long), and the size it announces.
fn plan(payload: &[u8]) -> std::result::Result<(Option<Filter>, u64), KernelError> {
    let head = [payload[0], payload[1], payload[2], payload[3], payload[4], payload[5]];
    let filter = match head {
        [0x1f, 0x8b, ..] => Filter::Gzip,
        [0xfd, b'7', b'z', b'X', b'Z', 0] => Filter::Xz,
        [0x28, 0xb5, 0x2f, 0xfd, ..] => Filter::Zstd,
        [0x02, 0x21, 0x4c, 0x18, ..] => Filter::Lz4,
        [0x7f, b'E', b'L', b'F', ..] => return Ok((None, payload.len() as u64)),
        found => return Err(KernelError::PayloadFormat { found }),
    };
    let end = payload.len();
    let size = u32::from_le_bytes([payload[end - 4], payload[end - 3], payload[end - 2], payload[end - 1]]);
    let size = u64::from(size);
    if size > MAX_UNPACKED {
        return Err(KernelError::PayloadSize { found: size, max: MAX_UNPACKED });
    }
    Ok((Some(filter), size))
}

#[cfg(test)]
#[path = "payload_tests.rs"]
pub(crate) mod tests;
