//! What must hold for an ELF kernel before it is loaded (System V ABI, chapter 4 and 5). The
//! file is untrusted: its header and its loaded segments are checked here, so that the loader's
//! own, terser errors about those stay unreachable. Notes, of which one may hold the PVH entry
//! point, are left to the loader.

use std::io::{self, Read, Seek, SeekFrom};

use super::image::ImageError;
use super::layout;

pub(super) const MAGIC: [u8; 4] = *b"\x7fELF";
const CLASS_64: u8 = 2;
const LITTLE_ENDIAN: u8 = 1;
const MACHINE_X86_64: u16 = 62;
const HEADER: usize = 64;
const PROGRAM_HEADER: usize = 56;
const MAX_PROGRAM_HEADERS: u16 = 128;
const LOAD: u32 = 1;

/// The facts that booting needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct ElfFacts {
    pub(super) entry: u64,
    /// The 64-bit entry point lies in a loaded segment.
    pub(super) entry_is_loaded: bool,
    /// First address after everything loaded.
    pub(super) end: u64,
}

/// Checks the headers of a file of `file_size` bytes.
pub(super) fn inspect<F: Read + Seek>(file: &mut F, file_size: u64) -> Result<ElfFacts, ImageError> {
    let mut header = [0u8; HEADER];
    read_at(file, 0, &mut header, "the ELF header")?;
    if header.get(4) != Some(&CLASS_64) || header.get(5) != Some(&LITTLE_ENDIAN) {
        return Err(ImageError::ElfKind { class: header[4], data: header[5] });
    }
    let machine = u16_at(&header, 18);
    if machine != MACHINE_X86_64 {
        return Err(ImageError::Machine { found: machine, wanted: MACHINE_X86_64 });
    }
    let (entry, table, size, count) =
        (u64_at(&header, 24), u64_at(&header, 32), u16_at(&header, 54), u16_at(&header, 56));
    if usize::from(size) != PROGRAM_HEADER || count == 0 || count > MAX_PROGRAM_HEADERS {
        return Err(ImageError::ProgramHeaders { size, count, max: MAX_PROGRAM_HEADERS });
    }
    let mut facts = ElfFacts { entry, entry_is_loaded: false, end: 0 };
    for index in 0..count {
        let mut program = [0u8; PROGRAM_HEADER];
        let at = table.checked_add(u64::from(index) * PROGRAM_HEADER as u64);
        let at = at.ok_or(ImageError::Truncated { what: "the program headers" })?;
        read_at(file, at, &mut program, "the program headers")?;
        if u32_at(&program, 0) == LOAD {
            add_segment(&mut facts, index, &program, file_size)?;
        }
    }
    if facts.end == 0 {
        return Err(ImageError::NothingToLoad);
    }
    Ok(facts)
}

fn add_segment(
    facts: &mut ElfFacts,
    index: u16,
    program: &[u8; PROGRAM_HEADER],
    file_size: u64,
) -> Result<(), ImageError> {
    let (offset, start, in_file, in_memory) =
        (u64_at(program, 8), u64_at(program, 24), u64_at(program, 32), u64_at(program, 40));
    if offset.checked_add(in_file).is_none_or(|end| end > file_size) {
        return Err(ImageError::Truncated { what: "a segment" });
    }
    let bad =
        ImageError::Segment { index, start, size: in_memory, min: layout::HIGH_RAM, max: layout::HOLE.start };
    let end = match start.checked_add(in_memory) {
        Some(end) if start >= layout::HIGH_RAM && end <= layout::HOLE.start && in_file <= in_memory => end,
        _ => return Err(bad),
    };
    facts.entry_is_loaded |= (start..end).contains(&facts.entry);
    facts.end = facts.end.max(end);
    Ok(())
}

fn read_at<F: Read + Seek>(
    file: &mut F,
    offset: u64,
    data: &mut [u8],
    what: &'static str,
) -> Result<(), ImageError> {
    // An offset beyond what lseek takes is beyond any file too.
    file.seek(SeekFrom::Start(offset)).map_err(|_| ImageError::Truncated { what })?;
    file.read_exact(data).map_err(|source| match source.kind() {
        io::ErrorKind::UnexpectedEof => ImageError::Truncated { what },
        _ => ImageError::Read { what, source },
    })
}

fn bytes_at<const N: usize>(data: &[u8], offset: usize) -> [u8; N] {
    let mut bytes = [0; N];
    for (to, from) in bytes.iter_mut().zip(data.iter().skip(offset)) {
        *to = *from;
    }
    bytes
}

fn u16_at(data: &[u8], offset: usize) -> u16 {
    u16::from_le_bytes(bytes_at(data, offset))
}

fn u32_at(data: &[u8], offset: usize) -> u32 {
    u32::from_le_bytes(bytes_at(data, offset))
}

fn u64_at(data: &[u8], offset: usize) -> u64 {
    u64::from_le_bytes(bytes_at(data, offset))
}

#[cfg(test)]
pub(super) mod tests {
    use std::io::Cursor;

    use super::*;

    /// An ELF file with one segment of `size` bytes in memory at `start`, entered at `entry`.
    pub(in super::super) fn image(entry: u64, start: u64, content: &[u8], size: u64) -> Vec<u8> {
        let mut file = vec![0; 120];
        file[..4].copy_from_slice(&MAGIC);
        (file[4], file[5], file[6]) = (CLASS_64, LITTLE_ENDIAN, 1);
        file[16..18].copy_from_slice(&2u16.to_le_bytes());
        file[18..20].copy_from_slice(&MACHINE_X86_64.to_le_bytes());
        file[24..32].copy_from_slice(&entry.to_le_bytes());
        file[32..40].copy_from_slice(&64u64.to_le_bytes());
        file[54..56].copy_from_slice(&56u16.to_le_bytes());
        file[56..58].copy_from_slice(&1u16.to_le_bytes());
        file[64..68].copy_from_slice(&LOAD.to_le_bytes());
        file[72..80].copy_from_slice(&120u64.to_le_bytes());
        file[88..96].copy_from_slice(&start.to_le_bytes());
        file[96..104].copy_from_slice(&(content.len() as u64).to_le_bytes());
        file[104..112].copy_from_slice(&size.to_le_bytes());
        file.extend_from_slice(content);
        file
    }

    fn check(file: &[u8]) -> Result<ElfFacts, ImageError> {
        inspect(&mut Cursor::new(file), file.len() as u64)
    }

    #[test]
    fn reads_a_good_file() {
        let facts = check(&image(0x10_0010, 0x10_0000, &[0; 32], 0x2000)).unwrap();
        assert_eq!(facts, ElfFacts { entry: 0x10_0010, entry_is_loaded: true, end: 0x10_2000 });
        assert!(!check(&image(0x10_2000, 0x10_0000, &[0; 32], 0x2000)).unwrap().entry_is_loaded);
    }

    #[test]
    fn refuses_each_kind_of_damage() {
        let good = image(0x10_0000, 0x10_0000, &[0; 32], 32);
        let with = |at: usize, value: u8| {
            let mut file = good.clone();
            file[at] = value;
            check(&file).unwrap_err()
        };
        assert!(matches!(with(4, 1), ImageError::ElfKind { class: 1, .. }));
        assert!(matches!(with(18, 183), ImageError::Machine { found: 183, .. }));
        assert!(matches!(with(54, 0), ImageError::ProgramHeaders { .. }));
        assert!(matches!(with(57, 0xff), ImageError::ProgramHeaders { .. }));
        assert!(matches!(with(64, 4), ImageError::NothingToLoad));
        assert!(matches!(with(39, 0xff), ImageError::Truncated { .. }));
        assert!(matches!(with(72, 121), ImageError::Truncated { .. }));
        assert!(matches!(with(103, 0xff), ImageError::Truncated { .. }));
        assert!(matches!(with(90, 0), ImageError::Segment { .. }), "over the boot structures");
        assert!(matches!(with(111, 0xff), ImageError::Segment { .. }), "wraps");
        assert!(matches!(with(104, 1), ImageError::Segment { .. }), "larger in the file than in memory");
        for length in 0..good.len() {
            assert!(check(&good[..length]).is_err(), "cut to {length} bytes");
        }
    }
}
