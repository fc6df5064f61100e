#![allow(unsafe_code)] // FICLONE has no safe wrapper in nix 0.31.
//! Copies a sparse file: by reflink where the file system shares blocks, else the data
//! between the holes.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use nix::errno::Errno;
use nix::unistd::{Whence, lseek};

/// One read and write.
const CHUNK: usize = 256 * 1024;

/// Makes `to` (new and empty) an equal of `from`.
pub(crate) fn copy(from: &File, to: &File) -> io::Result<()> {
    if reflink(from, to) { Ok(()) } else { copy_data(from, to) }
}

/// The same without writing any data: whether both files share their blocks now, each until it is written to. Not
/// every file system can, and none across two of them.
pub(crate) fn reflink(from: &File, to: &File) -> bool {
    // SAFETY: both descriptors are open for the duration of the call; FICLONE takes the
    // source descriptor as its argument and touches no memory of ours.
    unsafe { libc::ioctl(to.as_raw_fd(), libc::FICLONE, from.as_raw_fd()) == 0 }
}

fn copy_data(from: &File, to: &File) -> io::Result<()> {
    let length = from.metadata()?.len();
    to.set_len(length)?;
    let mut buffer = vec![0; CHUNK];
    let mut at = 0;
    while let Some(data) = next_data(from, at, length)? {
        at = data.end;
        copy_range(from, to, data, &mut buffer)?;
    }
    Ok(())
}

/// The first data at or behind `at` and before `end`. The kernel's position in the file changes.
pub fn next_data(file: &File, at: u64, end: u64) -> io::Result<Option<Range<u64>>> {
    if at >= end {
        return Ok(None);
    }
    let from = i64::try_from(at).map_err(io::Error::other)?;
    let start = match lseek(file, from, Whence::SeekData) {
        Ok(start) => start,
        // Nothing but a hole is left.
        Err(Errno::ENXIO) => return Ok(None),
        // The file system does not know its holes: all of it is data.
        Err(Errno::EINVAL) => from,
        Err(error) => return Err(error.into()),
    };
    let hole = lseek(file, start, Whence::SeekHole).ok().and_then(|hole| u64::try_from(hole).ok());
    let start = u64::try_from(start).map_err(io::Error::other)?;
    let hole = hole.unwrap_or(end).min(end);
    Ok((start < hole).then_some(start..hole))
}

fn copy_range(from: &File, to: &File, data: Range<u64>, buffer: &mut [u8]) -> io::Result<()> {
    let Range { start: mut at, end } = data;
    while at < end {
        let want = usize::try_from(end - at).unwrap_or(CHUNK).min(CHUNK);
        let got = from.read_at(&mut buffer[..want], at)?;
        if got == 0 {
            break;
        }
        to.write_all_at(&buffer[..got], at)?;
        at += got as u64;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    #[test]
    fn data_is_copied_and_holes_stay_holes() {
        let dir = tempfile::tempdir().unwrap();
        let from =
            File::options().read(true).write(true).create_new(true).open(dir.path().join("a")).unwrap();
        from.set_len(10 << 30).unwrap();
        let spots: [(u64, usize); 4] = [(0, 5000), (1 << 20, 1), (5 << 30, 700_000), ((10 << 30) - 3, 3)];
        for (at, length) in spots {
            let pattern: Vec<u8> =
                (0..length).map(|i| u8::try_from((i * 7 + 1) % 251).unwrap() + 1).collect();
            from.write_all_at(&pattern, at).unwrap();
        }
        for reflink_allowed in [false, true] {
            let path = dir.path().join(format!("b{reflink_allowed}"));
            let to = File::options().read(true).write(true).create_new(true).open(path).unwrap();
            if reflink_allowed {
                copy(&from, &to).unwrap()
            } else {
                copy_data(&from, &to).unwrap()
            }
            assert_eq!(to.metadata().unwrap().len(), 10 << 30);
            assert!(to.metadata().unwrap().blocks() * 512 < 4 << 20, "the copy is sparse");
            for (at, length) in spots {
                let (mut a, mut b) = (vec![0; length], vec![0; length]);
                from.read_exact_at(&mut a, at).unwrap();
                to.read_exact_at(&mut b, at).unwrap();
                assert!(a == b, "{length} bytes at {at}");
            }
        }
    }
}
