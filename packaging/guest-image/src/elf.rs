//! The little that must be known of ELF files: that the agent is a static x86_64
//! executable, that a module or a kernel is an x86_64 object, and what of the agent the
//! guest's kernel reads, or of the kernel the VMM. Format: System V ABI, chapter 4 and 5. Input is untrusted.

use crate::error::ElfError;

const HEADER: usize = 64;
const PROGRAM_HEADER: u16 = 56;
const X86_64: u16 = 62;
const ET_REL: u16 = 1;
const ET_EXEC: u16 = 2;
const ET_DYN: u16 = 3;
const PT_LOAD: u32 = 1;
const PT_INTERP: u32 = 3;

type Result<T> = std::result::Result<T, ElfError>;

/// A loadable or interpreter segment's place in the file.
struct Segment {
    kind: u32,
    /// Where its program header is.
    header: usize,
    offset: u64,
    size: u64,
}

/// Checks that `data` is a relocatable object (a kernel module).
pub(crate) fn check_module(data: &[u8]) -> Result<()> {
    match header(data)? {
        ET_REL => Ok(()),
        found => Err(ElfError::Type { found, expected: "1 (relocatable)" }),
    }
}

/// Checks that `data` is a kernel image as unpacked from a bzImage, and leaves what booting it
/// needs: neither what stands behind the ELF (relocations) nor the zeroes at the end of a segment,
/// which is memory that the loader need not write. The BSS of Debian's kernel is 11 MiB of them.
pub(crate) fn lean_kernel(mut data: Vec<u8>) -> Result<Vec<u8>> {
    match header(&data)? {
        ET_EXEC | ET_DYN => {}
        found => return Err(ElfError::Type { found, expected: "2 (executable) or 3 (shared)" }),
    }
    let mut needed = HEADER;
    for segment in segments(&data)? {
        let bytes = range(&segment, data.len());
        let end = match segment.kind {
            PT_LOAD => {
                bytes.start + data[bytes].iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1)
            }
            _ => bytes.end,
        };
        if segment.kind == PT_LOAD {
            let size = (end as u64).saturating_sub(segment.offset);
            data[segment.header + 32..segment.header + 40].copy_from_slice(&size.to_le_bytes());
        }
        needed = needed.max(end);
    }
    Ok(without_symbols(&data, needed))
}

/// Checks that `data` is a static executable; gives the number of leading bytes that
/// running it needs (what follows are symbols and section headers).
pub(crate) fn check_agent(data: &[u8]) -> Result<usize> {
    match header(data)? {
        ET_EXEC | ET_DYN => {}
        found => return Err(ElfError::Type { found, expected: "2 (executable) or 3 (static-pie)" }),
    }
    let segments = segments(data)?;
    let mut needed = HEADER;
    for segment in &segments {
        let bytes = range(segment, data.len());
        if segment.kind == PT_INTERP {
            let name = String::from_utf8_lossy(&data[bytes.start..bytes.end.min(bytes.start + 256)]);
            return Err(ElfError::Dynamic { interpreter: name.trim_end_matches('\0').to_owned() });
        }
        needed = needed.max(bytes.end);
    }
    Ok(needed)
}

/// A segment's bytes in a file of `length`; in range, for `segments` has checked it.
fn range(segment: &Segment, length: usize) -> std::ops::Range<usize> {
    let at = |offset: u64| usize::try_from(offset).unwrap_or(usize::MAX).min(length);
    at(segment.offset)..at(segment.offset + segment.size)
}

/// The file without what running it does not need: symbols and section headers.
pub(crate) fn without_symbols(data: &[u8], needed: usize) -> Vec<u8> {
    let mut out = data[..needed.min(data.len())].to_vec();
    if out.len() >= HEADER {
        out[40..48].fill(0); // e_shoff
        out[58..64].fill(0); // e_shentsize, e_shnum, e_shstrndx
    }
    out
}

/// Validates the ELF header; gives the type.
fn header(data: &[u8]) -> Result<u16> {
    if data.len() < HEADER {
        return Err(ElfError::Short { found: data.len(), min: HEADER });
    }
    let magic = [data[0], data[1], data[2], data[3]];
    if magic != *b"\x7fELF" {
        return Err(ElfError::Magic { found: magic });
    }
    if (data[4], data[5]) != (2, 1) {
        return Err(ElfError::Class { class: data[4], order: data[5] });
    }
    match u16_at(data, 18) {
        X86_64 => Ok(u16_at(data, 16)),
        found => Err(ElfError::Machine { found }),
    }
}

/// The program headers that matter here, each inside the file.
fn segments(data: &[u8]) -> Result<Vec<Segment>> {
    let (offset, size, count) = (u64_at(data, 32), u16_at(data, 54), u16_at(data, 56));
    let malformed = ElfError::ProgramHeaders { offset, count, size };
    let table = usize::from(count) * usize::from(size);
    let Some(start) = usize::try_from(offset).ok().filter(|start| {
        size == PROGRAM_HEADER && start.checked_add(table).is_some_and(|end| end <= data.len())
    }) else {
        return Err(malformed);
    };
    let mut found = Vec::new();
    let mut loadable = false;
    for index in 0..count {
        let at = start + usize::from(index) * usize::from(size);
        let segment = Segment {
            kind: u32_at(data, at),
            header: at,
            offset: u64_at(data, at + 8),
            size: u64_at(data, at + 32),
        };
        if segment.kind != PT_LOAD && segment.kind != PT_INTERP {
            continue;
        }
        if segment.offset.checked_add(segment.size).is_none_or(|end| end > data.len() as u64) {
            return Err(ElfError::Segment { index });
        }
        loadable |= segment.kind == PT_LOAD;
        found.push(segment);
    }
    if !loadable {
        return Err(ElfError::NoSegment);
    }
    // The table itself is read from the file too.
    found.push(Segment { kind: 0, header: start, offset, size: table as u64 });
    Ok(found)
}

// The callers have checked that the fields are inside `data`.
fn u16_at(data: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([data[at], data[at + 1]])
}

fn u32_at(data: &[u8], at: usize) -> u32 {
    u32::from(u16_at(data, at)) | u32::from(u16_at(data, at + 2)) << 16
}

fn u64_at(data: &[u8], at: usize) -> u64 {
    u64::from(u32_at(data, at)) | u64::from(u32_at(data, at + 4)) << 32
}

#[cfg(test)]
#[path = "elf_tests.rs"]
pub(crate) mod tests;
