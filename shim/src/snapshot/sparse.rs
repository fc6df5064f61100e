//! Sparse files as content: where their data is, and a digest that does not depend on how many holes
//! a file system keeps.
//!
//! The digest is SHA-256 over `spore-sparse-1`, the file's length, and for every piece of 64 KiB that is not all
//! zeroes (the last one may be shorter) its number and its bytes; numbers are 8 bytes, little-endian.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use sha2::{Digest, Sha256};

use super::manifest::hex;
use crate::rootfs::next_data;
use crate::rootfs::sparse::reflink;

pub(super) const PIECE: u64 = 64 * 1024;
#[allow(clippy::cast_possible_truncation)]
const PIECE_BYTES: usize = PIECE as usize;

/// Calls `found` with offset and bytes of every piece that may be other than zeroes.
fn pieces(file: &File, mut found: impl FnMut(u64, &[u8]) -> io::Result<()>) -> io::Result<u64> {
    let length = file.metadata()?.len();
    let mut buffer = vec![0; PIECE_BYTES];
    let mut at = 0;
    while let Some(data) = next_data(file, at, length)? {
        at = at.max(data.start - data.start % PIECE);
        while at < data.end {
            let count = usize::try_from(length - at).unwrap_or(PIECE_BYTES).min(PIECE_BYTES);
            file.read_exact_at(&mut buffer[..count], at)?;
            found(at, &buffer[..count])?;
            at += count as u64;
        }
    }
    Ok(length)
}

pub(super) fn is_zero(bytes: &[u8]) -> bool {
    // Word by word: bytes one after the other take eight times as long.
    let (words, rest) = bytes.as_chunks::<8>();
    words.iter().all(|word| *word == [0; 8]) && rest.iter().all(|&byte| byte == 0)
}

/// See the module.
pub(crate) fn digest(file: &File) -> io::Result<String> {
    let length = file.metadata()?.len();
    let mut hash = Sha256::new();
    hash.update(b"spore-sparse-1");
    hash.update(length.to_le_bytes());
    pieces(file, |at, bytes| {
        if !is_zero(bytes) {
            hash.update((at / PIECE).to_le_bytes());
            hash.update(bytes);
        }
        Ok(())
    })?;
    Ok(hex(&hash.finalize()))
}

/// Makes `to`, which is new and empty, an equal of `from`, which may have no holes where it could: by reflink where that can
/// be, else what is not zeroes is written.
pub(super) fn copy(from: &File, to: &File) -> io::Result<()> {
    if reflink(from, to) { Ok(()) } else { write_data(from, to) }
}

pub(super) fn write_data(from: &File, to: &File) -> io::Result<()> {
    to.set_len(from.metadata()?.len())?;
    pieces(from, |at, bytes| if is_zero(bytes) { Ok(()) } else { to.write_all_at(bytes, at) }).map(drop)
}

/// Offset and length of the data, in whole pieces, ascending and apart from each other; at most `max`, for which gaps are
/// closed where need be.
pub(super) fn extents(file: &File, max: usize) -> io::Result<Vec<(u64, u64)>> {
    let length = file.metadata()?.len();
    let mut grain = PIECE;
    loop {
        let mut list: Vec<(u64, u64)> = Vec::new();
        let mut at = 0;
        while list.len() <= max
            && let Some(data) = next_data(file, at, length)?
        {
            let start = data.start - data.start % grain;
            let end = data.end.next_multiple_of(grain).min(length);
            match list.last_mut() {
                Some((first, count)) if start <= *first + *count => *count = end - *first,
                _ => list.push((start, end - start)),
            }
            at = end;
        }
        if list.len() <= max {
            return Ok(list);
        }
        grain *= 4;
    }
}
