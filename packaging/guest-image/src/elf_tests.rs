use super::*;

/// An ELF file of the given type with one segment of each (kind, offset, size), and
/// `tail` bytes behind what it needs.
pub(crate) fn elf(kind: u16, segments: &[(u32, u64, u64)], tail: usize) -> Vec<u8> {
    let mut data = vec![0_u8; HEADER];
    data[..6].copy_from_slice(b"\x7fELF\x02\x01");
    data[16..18].copy_from_slice(&kind.to_le_bytes());
    data[18..20].copy_from_slice(&X86_64.to_le_bytes());
    data[32..40].copy_from_slice(&64_u64.to_le_bytes());
    data[40..48].copy_from_slice(&0x1000_u64.to_le_bytes());
    data[54..56].copy_from_slice(&PROGRAM_HEADER.to_le_bytes());
    data[56..58].copy_from_slice(&u16::try_from(segments.len()).unwrap().to_le_bytes());
    let mut end = HEADER + segments.len() * usize::from(PROGRAM_HEADER);
    for (kind, offset, size) in segments {
        let mut entry = vec![0_u8; usize::from(PROGRAM_HEADER)];
        entry[..4].copy_from_slice(&kind.to_le_bytes());
        entry[8..16].copy_from_slice(&offset.to_le_bytes());
        entry[32..40].copy_from_slice(&size.to_le_bytes());
        data.extend(entry);
        end = end.max(usize::try_from(offset.saturating_add(*size)).unwrap().min(1 << 20));
    }
    data.resize(end + tail, 0xaa);
    data
}

/// The smallest agent that passes.
pub(crate) fn static_agent() -> Vec<u8> {
    elf(ET_DYN, &[(PT_LOAD, 0, 512)], 100)
}

#[test]
fn a_static_executable_passes_and_loses_its_symbols() {
    let agent = static_agent();
    assert_eq!(check_agent(&agent), Ok(512));
    let stripped = without_symbols(&agent, 512);
    assert_eq!(stripped.len(), 512);
    assert_eq!(check_agent(&stripped), Ok(512));
    assert_eq!(&stripped[40..48], [0; 8]);
    assert_eq!(check_agent(&elf(ET_EXEC, &[(PT_LOAD, 0, 200)], 0)), Ok(200));
}

#[test]
fn other_files_are_refused_with_their_reason() {
    assert_eq!(check_agent(b"#!/bin/sh\n"), Err(ElfError::Short { found: 10, min: 64 }));
    assert_eq!(check_agent(&[b'x'; 100]), Err(ElfError::Magic { found: *b"xxxx" }));
    let mut arm = static_agent();
    arm[18] = 183;
    assert_eq!(check_agent(&arm), Err(ElfError::Machine { found: 183 }));
    let mut narrow = static_agent();
    narrow[4] = 1;
    assert_eq!(check_agent(&narrow), Err(ElfError::Class { class: 1, order: 1 }));
    assert!(matches!(check_agent(&elf(ET_REL, &[], 0)), Err(ElfError::Type { found: 1, .. })));
    let mut dynamic = elf(ET_DYN, &[(PT_LOAD, 0, 300), (PT_INTERP, 200, 10)], 0);
    dynamic[200..210].copy_from_slice(b"/lib/ld.so");
    assert_eq!(check_agent(&dynamic), Err(ElfError::Dynamic { interpreter: "/lib/ld.so".to_owned() }));
    assert_eq!(check_agent(&elf(ET_DYN, &[], 0)), Err(ElfError::NoSegment));
}

#[test]
fn headers_that_point_outside_are_refused() {
    let mut data = static_agent();
    data[32..40].copy_from_slice(&u64::MAX.to_le_bytes());
    assert!(matches!(check_agent(&data), Err(ElfError::ProgramHeaders { .. })));
    let mut data = static_agent();
    data[56..58].copy_from_slice(&u16::MAX.to_le_bytes());
    assert!(matches!(check_agent(&data), Err(ElfError::ProgramHeaders { .. })));
    let data = elf(ET_DYN, &[(PT_LOAD, u64::MAX, 2)], 0);
    assert_eq!(check_agent(&data), Err(ElfError::Segment { index: 0 }));
    let mut data = static_agent();
    data.truncate(300);
    assert_eq!(check_agent(&data), Err(ElfError::Segment { index: 0 }));
}

#[test]
fn modules_and_kernels_are_told_apart() {
    assert_eq!(check_module(&elf(ET_REL, &[], 0)), Ok(()));
    assert!(matches!(check_module(&static_agent()), Err(ElfError::Type { found: 3, .. })));
    assert!(lean_kernel(static_agent()).is_ok());
    assert!(matches!(lean_kernel(elf(ET_REL, &[], 0)), Err(ElfError::Type { found: 1, .. })));
}

#[test]
fn a_kernel_loses_the_zeroes_at_the_end_of_its_segments_and_what_follows() {
    let mut kernel = elf(ET_EXEC, &[(PT_LOAD, 512, 256), (PT_LOAD, 1024, 4096), (PT_LOAD, 8192, 64)], 100);
    kernel[512..8256].fill(0);
    kernel[512 + 255] = 1;
    kernel[1024 + 9] = 2;
    let lean = lean_kernel(kernel.clone()).unwrap();
    let sizes: Vec<_> =
        segments(&lean).unwrap().iter().filter(|s| s.kind == PT_LOAD).map(|s| s.size).collect();
    assert_eq!(sizes, [256, 10, 0], "the third is all zeroes");
    assert_eq!(lean[512..8192], kernel[512..8192]);
    assert_eq!(lean.len(), 8192);
    assert_eq!(lean_kernel(lean.clone()).unwrap(), lean);
}
