//! The file of a VM's state: a header of 32 bytes, then one JSON document.
//!
//! ```text
//!  0  8  "SPOREVM\0"
//!  8  4  format version
//! 12  4  0
//! 16  8  bytes of the document
//! 24  4  CRC-32 of the document
//! 28  4  CRC-32 of the 28 bytes before
//! ```
//!
//! Numbers are little-endian. Everything is verified in this order before the document is decoded: size, magic, header,
//! version, length, checksum. JSON because it names its fields: what a newer build adds has a default for an older
//! file, and a person can read it. serde_json bounds its own recursion, and a document of [`MAX_DOCUMENT`] bytes what it can allocate.
//! The checksums find damage, not forgery: what is decoded is untrusted and is checked part by part.

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::FileExt;

use serde::Serialize;
use serde::de::DeserializeOwned;

const MAGIC: [u8; 8] = *b"SPOREVM\0";
/// What this build writes, and the newest that it reads.
pub const VERSION: u32 = 1;
const HEADER: usize = 32;
/// Most bytes of a document. 32 vCPUs with AVX-512 and all extents make about 2 MiB.
pub const MAX_DOCUMENT: u64 = 16 << 20;

/// A file is no snapshot's state that this build can read.
#[derive(Debug, thiserror::Error)]
pub enum FormatError {
    #[error("snapshot state: reading the file: {0}")]
    Read(#[source] io::Error),
    #[error("snapshot state: the file has {found} bytes; its header alone has {HEADER}")]
    Short { found: u64 },
    #[error("snapshot state: the file does not begin as a snapshot's state does; is it another file?")]
    Magic,
    #[error(
        "snapshot state: the header's checksum is {found:#010x}, and should be {expected:#010x}; the file is damaged"
    )]
    Header { found: u32, expected: u32 },
    #[error(
        "snapshot state: format version {found}; this VMM reads up to {VERSION}: use the VMM that wrote the snapshot, or a newer one"
    )]
    Newer { found: u32 },
    #[error("snapshot state: the document has {found} bytes; at most {MAX_DOCUMENT} are allowed")]
    TooLong { found: u64 },
    #[error(
        "snapshot state: the file has {found} bytes, and its header says {expected}; it is cut off or has been added to"
    )]
    Length { found: u64, expected: u64 },
    #[error(
        "snapshot state: the document's checksum is {found:#010x}, and should be {expected:#010x}; the file is damaged"
    )]
    Checksum { found: u32, expected: u32 },
    #[error("snapshot state: the document cannot be decoded: {0}")]
    Decode(#[source] serde_json::Error),
}

/// The whole file for `document`.
pub fn encode<T: Serialize>(document: &T) -> Result<Vec<u8>, serde_json::Error> {
    let mut bytes = vec![0; HEADER];
    serde_json::to_writer(&mut bytes, document)?;
    let (header, body) = bytes.split_at_mut(HEADER);
    let mut fields = Vec::with_capacity(HEADER);
    fields.extend_from_slice(&MAGIC);
    fields.extend_from_slice(&VERSION.to_le_bytes());
    fields.extend_from_slice(&[0; 4]);
    fields.extend_from_slice(&(body.len() as u64).to_le_bytes());
    fields.extend_from_slice(&crc32fast::hash(body).to_le_bytes());
    let sum = crc32fast::hash(&fields);
    fields.write_all(&sum.to_le_bytes()).map_err(serde_json::Error::io)?;
    header.copy_from_slice(&fields);
    Ok(bytes)
}

/// Verifies and decodes a file, whatever its position is.
pub fn decode<T: DeserializeOwned>(file: &File) -> Result<T, FormatError> {
    let found = file.metadata().map_err(FormatError::Read)?.len();
    if found < HEADER as u64 {
        return Err(FormatError::Short { found });
    }
    let mut header = [0; HEADER];
    file.read_exact_at(&mut header, 0).map_err(FormatError::Read)?;
    let length = check_header(&header)?;
    let expected = length + HEADER as u64;
    if found != expected {
        return Err(FormatError::Length { found, expected });
    }
    let mut body = vec![0; usize::try_from(length).map_err(|_| FormatError::TooLong { found: length })?];
    file.read_exact_at(&mut body, HEADER as u64).map_err(FormatError::Read)?;
    let (found, expected) = (crc32fast::hash(&body), u32_at(&header, 24));
    if found != expected {
        return Err(FormatError::Checksum { found, expected });
    }
    serde_json::from_slice(&body).map_err(FormatError::Decode)
}

/// The document's length.
fn check_header(header: &[u8; HEADER]) -> Result<u64, FormatError> {
    if header[..8] != MAGIC {
        return Err(FormatError::Magic);
    }
    let (found, expected) = (crc32fast::hash(&header[..28]), u32_at(header, 28));
    if found != expected {
        return Err(FormatError::Header { found, expected });
    }
    let version = u32_at(header, 8);
    if version == 0 || version > VERSION {
        return Err(FormatError::Newer { found: version });
    }
    let length = u64::from(u32_at(header, 16)) | u64::from(u32_at(header, 20)) << 32;
    if length > MAX_DOCUMENT {
        return Err(FormatError::TooLong { found: length });
    }
    Ok(length)
}

fn u32_at(header: &[u8; HEADER], at: usize) -> u32 {
    u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(bytes: &[u8]) -> File {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(bytes, 0).unwrap();
        file
    }

    fn whole() -> Vec<u8> {
        encode(&vec!["some", "words"]).unwrap()
    }

    fn refused(bytes: &[u8]) -> FormatError {
        decode::<Vec<String>>(&file(bytes)).unwrap_err()
    }

    #[test]
    fn what_was_written_is_read() {
        assert_eq!(decode::<Vec<String>>(&file(&whole())).unwrap(), ["some", "words"]);
    }

    #[test]
    fn every_flipped_bit_and_every_cut_is_found() {
        let whole = whole();
        for bit in 0..whole.len() * 8 {
            let mut bytes = whole.clone();
            bytes[bit / 8] ^= 1 << (bit % 8);
            refused(&bytes);
        }
        for length in 0..whole.len() {
            refused(&whole[..length]);
        }
        assert!(matches!(refused(&[whole, vec![b' ']].concat()), FormatError::Length { .. }));
    }

    #[test]
    fn a_newer_format_is_said_to_be_newer() {
        let mut bytes = whole();
        bytes[8] = 2;
        let sum = crc32fast::hash(&bytes[..28]);
        bytes[28..32].copy_from_slice(&sum.to_le_bytes());
        assert!(matches!(refused(&bytes), FormatError::Newer { found: 2 }));
    }

    #[test]
    fn a_length_beyond_the_cap_allocates_nothing() {
        let mut bytes = whole();
        bytes[16..24].copy_from_slice(&u64::MAX.to_le_bytes());
        let sum = crc32fast::hash(&bytes[..28]);
        bytes[28..32].copy_from_slice(&sum.to_le_bytes());
        assert!(matches!(refused(&bytes), FormatError::TooLong { .. }));
    }
}
