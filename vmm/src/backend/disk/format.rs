//! A delta: the file of a layer that has some of a disk's blocks.
//!
//! ```text
//! 0x0000  header, 4096 bytes
//! 0x1000  bitmap: bit b (bit b % 8 of byte b / 8) is set when the layer has block b; zeroes up to
//!         a multiple of 4096 bytes
//! data    block b is at data + b * 4096, where data is the bitmap's end rounded up to 64 KiB;
//!         the file ends with the disk
//! ```
//!
//! | header bytes | what (little-endian) |
//! |---|---|
//! | 0-7 | magic `SPORDLTA` |
//! | 8-11 | version, 1 |
//! | 12-15 | flags, none are defined |
//! | 16-19 | bytes of a block, 4096 |
//! | 20-23 | zero |
//! | 24-31 | bytes of the disk, a multiple of 512 |
//! | 32-47 | the layer's id, random |
//! | 48-63 | the id of the layer below; zeroes when that is the raw one |
//! | 64-507 | zero |
//! | 508-511 | CRC-32C of the bytes before: what says something is in one sector, which is written whole or not at all |
//! | 512-4095 | zero |
//!
//! A block that the layer has and that is a hole in the file is zeroes: so a discard hides what is below.
//! The file is sparse and needs nothing of its file system but that; holes are no statement, the
//! bitmap is. The header is written once, and durable before the first bit is set: a file without header and bits is a
//! layer that nothing was ever flushed to, and means one that has nothing. Bits are only ever set, and only after the block's
//! data is durable, so that a bitmap which a loss of power left half-written is a right one. What a block's place
//! holds while its bit is not set means nothing.
//!
//! Blocks of 4 KiB are what file systems write; they make copying rare: only a write of a part of a block
//! that the top does not have costs one. A 10 GiB disk has a bitmap of 320 KiB.

use std::io;

use super::SECTOR;

/// In bytes, of the disk.
pub const BLOCK: u64 = BLOCK_BYTES as u64;
pub const BLOCK_BYTES: usize = 4096;
/// Bytes of the header.
pub const HEADER: usize = 4096;
/// Bytes of the bitmap that are read and written at once.
pub const PAGE: usize = 4096;
/// Blocks that a page of the bitmap tells of.
pub const PAGE_BLOCKS: u64 = PAGE as u64 * 8;

const MAGIC: [u8; 8] = *b"SPORDLTA";
const VERSION: u32 = 1;
/// The data begins at a multiple of this, so that blocks do not straddle what file systems keep together.
const ALIGN: u64 = 64 * 1024;
/// Of the header, its first sector: all that is not zero.
const SAID: usize = 512;
const CHECKSUM: usize = SAID - 4;
/// Largest disk. A sparse file can be no longer on ext4 than 16 TiB, its bitmap included.
pub const MAX_DISK: u64 = 15 << 40;

/// A layer's name.
pub type LayerId = [u8; 16];
/// What stands for the raw layer where a delta names the one below.
pub const RAW: LayerId = [0; 16];

/// A file is not the delta that belongs there.
#[derive(Debug, thiserror::Error)]
pub enum FormatError {
    #[error("read: {0}")]
    Read(#[from] io::Error),
    #[error("not a delta: it begins with {found:02x?}, not with \"SPORDLTA\"")]
    Magic { found: [u8; 8] },
    #[error("a delta of version {found}; this VMM knows version {VERSION}: use the release that made it")]
    Version { found: u32 },
    #[error("a damaged header: its checksum is {found:#010x}, its content's {computed:#010x}")]
    Checksum { found: u32, computed: u32 },
    #[error("a bad header: {field} is {found}, {allowed}")]
    Field { field: &'static str, found: u64, allowed: &'static str },
    #[error("it is of a disk of {found} bytes, the layer below of one of {expected}")]
    DiskSize { found: u64, expected: u64 },
    #[error("it was made above layer {found}, but stands above layer {expected}")]
    Parent { found: String, expected: String },
    #[error("the file has {found} bytes, a delta of this disk has {expected}: it was cut or is another's")]
    Length { found: u64, expected: u64 },
    #[error("a bad bitmap: it has blocks behind the disk's last, {last}")]
    Bitmap { last: u64 },
}

/// Where things are in the delta of a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Geometry {
    /// Bytes of the disk.
    pub disk: u64,
    pub blocks: u64,
    /// Bytes of the bitmap, from [`HEADER`] on.
    pub bitmap: u64,
    /// Where block 0 is.
    pub data: u64,
    /// Bytes of the file.
    pub length: u64,
}

impl Geometry {
    /// Of a disk of `disk` bytes: a multiple of 512, from 512 to [`MAX_DISK`].
    pub fn of(disk: u64) -> Result<Self, FormatError> {
        if disk == 0 || !disk.is_multiple_of(SECTOR) || disk > MAX_DISK {
            let allowed = "a multiple of 512 from 512 to 15 TiB is allowed";
            return Err(FormatError::Field { field: "the disk's size", found: disk, allowed });
        }
        let blocks = disk.div_ceil(BLOCK);
        let bitmap = blocks.div_ceil(PAGE_BLOCKS) * PAGE as u64;
        let data = (HEADER as u64 + bitmap).next_multiple_of(ALIGN);
        Ok(Self { disk, blocks, bitmap, data, length: data + disk })
    }

    /// Pages of the bitmap.
    pub fn pages(&self) -> usize {
        usize::try_from(self.bitmap / PAGE as u64).unwrap_or(usize::MAX)
    }
}

/// What a delta's header says beside its size.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    pub geometry: Geometry,
    pub id: LayerId,
    pub parent: LayerId,
}

impl Header {
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(HEADER);
        bytes.extend(MAGIC);
        bytes.extend(VERSION.to_le_bytes());
        bytes.extend(0u32.to_le_bytes());
        bytes.extend(BLOCK.to_le_bytes());
        bytes.extend(self.geometry.disk.to_le_bytes());
        bytes.extend(self.id);
        bytes.extend(self.parent);
        bytes.resize(CHECKSUM, 0);
        bytes.extend(crc32c(&bytes).to_le_bytes());
        bytes.resize(HEADER, 0);
        bytes
    }

    /// What the bytes mean, if they are a header of this version and undamaged.
    pub fn decode(bytes: &[u8; HEADER]) -> Result<Self, FormatError> {
        let found = array(bytes, 0);
        if found != MAGIC {
            return Err(FormatError::Magic { found });
        }
        // Before the checksum, of which another version may think otherwise.
        let found = u32::from_le_bytes(array(bytes, 8));
        if found != VERSION {
            return Err(FormatError::Version { found });
        }
        let (found, computed) = (u32::from_le_bytes(array(bytes, CHECKSUM)), crc32c(&bytes[..CHECKSUM]));
        if found != computed {
            return Err(FormatError::Checksum { found, computed });
        }
        let flags = u32::from_le_bytes(array(bytes, 12));
        if flags != 0 {
            let allowed = "none is known to this version";
            return Err(FormatError::Field { field: "flags", found: flags.into(), allowed });
        }
        // Together with the four zero bytes behind it.
        let block = u64::from_le_bytes(array(bytes, 16));
        if block != BLOCK {
            return Err(FormatError::Field {
                field: "the block size",
                found: block,
                allowed: "4096 is allowed",
            });
        }
        let geometry = Geometry::of(u64::from_le_bytes(array(bytes, 24)))?;
        let mut reserved = bytes[64..CHECKSUM].iter().chain(&bytes[SAID..]);
        if let Some(&byte) = reserved.find(|&&byte| byte != 0) {
            let allowed = "zero is allowed";
            return Err(FormatError::Field { field: "a reserved byte", found: byte.into(), allowed });
        }
        let (id, parent) = (array(bytes, 32), array(bytes, 48));
        if id == RAW || id == parent {
            let allowed = "one other than zero and than the parent's is allowed";
            return Err(FormatError::Field { field: "the id", found: 0, allowed });
        }
        Ok(Self { geometry, id, parent })
    }
}

fn array<const N: usize>(bytes: &[u8; HEADER], at: usize) -> [u8; N] {
    std::array::from_fn(|i| bytes[at + i])
}

/// An id as text.
pub fn shown(id: &LayerId) -> String {
    if *id == RAW {
        return "raw".to_owned();
    }
    id.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// CRC-32C (Castagnoli, reflected, as in iSCSI and ext4). Bit by bit: it serves headers only.
fn crc32c(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0, |crc, &byte| {
        (0..8).fold(crc ^ u32::from(byte), |crc, _| crc >> 1 ^ if crc & 1 == 1 { 0x82f6_3b78 } else { 0 })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_checksum_is_the_one_that_is_named() {
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
        assert_eq!(crc32c(&[0; 32]), 0x8a91_36aa, "RFC 3720, B.4");
    }

    #[test]
    fn a_header_says_what_it_was_given() {
        for disk in [512, 4096, 5 * 512, 10 << 30, MAX_DISK] {
            let header = Header { geometry: Geometry::of(disk).unwrap(), id: [7; 16], parent: [9; 16] };
            let bytes: [u8; HEADER] = header.encode().try_into().unwrap();
            assert_eq!(Header::decode(&bytes).unwrap(), header);
        }
    }

    #[test]
    fn the_bitmap_has_a_bit_for_every_block_and_data_follows_it() {
        let small = Geometry::of(512).unwrap();
        assert_eq!((small.blocks, small.bitmap, small.data, small.length), (1, 4096, 65536, 65536 + 512));
        let ten = Geometry::of(10 << 30).unwrap();
        assert_eq!((ten.blocks, ten.bitmap, ten.data), (2_621_440, 327_680, 393_216));
        for disk in [0, 511, MAX_DISK + 512, u64::MAX] {
            assert!(Geometry::of(disk).is_err(), "{disk}");
        }
    }
}
