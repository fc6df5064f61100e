//! The ustar format (POSIX.1-1988), enough for the layers of our small images: paths of at
//! most 100 bytes, files below 8 GiB, owner root, time 0.

use std::io::{self, Write};

const BLOCK: usize = 512;

/// Writes an archive; [`Writer::finish`] ends it.
pub struct Writer<W: Write> {
    out: W,
}

enum Kind<'a> {
    File,
    HardLink(&'a str),
    SymbolicLink(&'a str),
    Directory,
}

impl<W: Write> Writer<W> {
    pub fn new(out: W) -> Self {
        Self { out }
    }

    pub fn directory(&mut self, path: &str, mode: u32) -> io::Result<()> {
        self.header(&format!("{}/", path.trim_end_matches('/')), mode, 0, &Kind::Directory)
    }

    pub fn file(&mut self, path: &str, mode: u32, content: &[u8]) -> io::Result<()> {
        self.header(path, mode, content.len(), &Kind::File)?;
        self.out.write_all(content)?;
        self.out.write_all(&[0; BLOCK][..content.len().wrapping_neg() % BLOCK])
    }

    pub fn symbolic_link(&mut self, path: &str, target: &str) -> io::Result<()> {
        self.header(path, 0o777, 0, &Kind::SymbolicLink(target))
    }

    pub fn hard_link(&mut self, path: &str, target: &str) -> io::Result<()> {
        self.header(path, 0o755, 0, &Kind::HardLink(target))
    }

    pub fn finish(mut self) -> io::Result<W> {
        self.out.write_all(&[0; 2 * BLOCK])?;
        Ok(self.out)
    }

    fn header(&mut self, path: &str, mode: u32, size: usize, kind: &Kind<'_>) -> io::Result<()> {
        let (flag, target) = match kind {
            Kind::File => (b'0', ""),
            Kind::HardLink(target) => (b'1', *target),
            Kind::SymbolicLink(target) => (b'2', *target),
            Kind::Directory => (b'5', ""),
        };
        let mut block = [0_u8; BLOCK];
        put(&mut block, 0, 100, path)?;
        put(&mut block, 100, 8, &format!("{mode:07o}"))?;
        put(&mut block, 108, 8, "0000000")?;
        put(&mut block, 116, 8, "0000000")?;
        put(&mut block, 124, 12, &format!("{size:011o}"))?;
        put(&mut block, 136, 12, "00000000000")?;
        put(&mut block, 148, 8, "        ")?;
        block[156] = flag;
        put(&mut block, 157, 100, target)?;
        put(&mut block, 257, 8, "ustar\u{0}00")?;
        let sum: u32 = block.iter().map(|&byte| u32::from(byte)).sum();
        put(&mut block, 148, 8, &format!("{sum:06o}\u{0} "))?;
        self.out.write_all(&block)
    }
}

fn put(block: &mut [u8; BLOCK], at: usize, room: usize, text: &str) -> io::Result<()> {
    if text.len() > room {
        return Err(io::Error::other(format!(
            "\"{text}\" takes {} bytes, a tar header has room for {room}",
            text.len()
        )));
    }
    block[at..at + text.len()].copy_from_slice(text.as_bytes());
    Ok(())
}
