#![allow(clippy::cast_possible_truncation)]
use std::fs::File;
use std::os::unix::fs::FileExt;

use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{Bytes, FileOffset, GuestRegionMmap};

use super::*;
use crate::memory::{RamLayout, map};

const MIB: u64 = 1 << 20;
/// What the files hold.
const OLD: u8 = 0x5a;
/// What the guest wrote.
const NEW: u8 = 0xa5;

/// `size` bytes of RAM at `start`, a private mapping of a file.
fn file_region(file: &File, start: u64, size: usize) -> GuestRegionMmap {
    file.write_all_at(&vec![OLD; size], 0).unwrap();
    let region = MmapRegionBuilder::new(size)
        .with_mmap_prot(mapping::PROTECTION)
        .with_mmap_flags(libc::MAP_PRIVATE | libc::MAP_NORESERVE)
        .with_file_offset(FileOffset::new(file.try_clone().unwrap(), 0))
        .build()
        .unwrap();
    GuestRegionMmap::new(region, Gpa::new(start)).unwrap()
}

/// 4 MiB of a file from address 0 on.
fn restored() -> (GuestRam, File) {
    let file = tempfile::tempfile().unwrap();
    let ram = GuestRam::from_regions(vec![file_region(&file, 0, 4 << 20)]).unwrap();
    (ram, file)
}

/// The byte that all of a page has.
fn page(ram: &GuestRam, at: u64) -> u8 {
    let mut bytes = [0; PAGE as usize];
    ram.read_slice(&mut bytes, Gpa::new(at)).unwrap();
    assert!(bytes.iter().all(|byte| *byte == bytes[0]), "the page at {at:#x} is torn");
    bytes[0]
}

fn fill(ram: &GuestRam, range: Range<u64>) {
    let bytes = vec![NEW; usize::try_from(range.end - range.start).unwrap()];
    ram.write_slice(&bytes, Gpa::new(range.start)).unwrap();
}

/// Pages of a range that this process has in memory.
fn resident(ram: &GuestRam, range: Range<u64>) -> usize {
    let size = usize::try_from(range.end - range.start).unwrap();
    let address = ram.get_slice(Gpa::new(range.start), size).unwrap().ptr_guard_mut().as_ptr();
    let mut pages = vec![0u8; size / PAGE as usize];
    // SAFETY: the range is mapped, and there is one byte for each of its pages.
    assert_eq!(unsafe { libc::mincore(address.cast(), size, pages.as_mut_ptr()) }, 0);
    pages.iter().filter(|page| **page & 1 != 0).count()
}

/// Mappings in which this process has some range.
fn mappings(ram: &GuestRam, range: Range<u64>) -> Vec<String> {
    let size = usize::try_from(range.end - range.start).unwrap();
    let start = ram.get_slice(Gpa::new(range.start), size).unwrap().ptr_guard_mut().as_ptr() as usize;
    let number = |text: &str| usize::from_str_radix(text, 16).unwrap();
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let overlaps = |line: &&str| {
        let (from, to) = line.split_once(' ').unwrap().0.split_once('-').unwrap();
        number(from) < start + size && number(to) > start
    };
    maps.lines().filter(overlaps).map(str::to_owned).collect()
}

#[test]
fn anonymous_pages_leave_and_read_as_zeroes() {
    let ram = map(&RamLayout::around(8 * MIB, 3 * MIB..16 * MIB)).unwrap();
    let mut discard = Discard::new(&ram);
    fill(&ram, 0..3 * MIB);
    fill(&ram, 16 * MIB..21 * MIB);
    assert_eq!(discard.discard(MIB..2 * MIB).unwrap(), MIB);
    assert_eq!(resident(&ram, MIB..2 * MIB), 0);
    for (at, byte) in [(0, NEW), (MIB - PAGE, NEW), (MIB, 0), (2 * MIB - PAGE, 0), (2 * MIB, NEW)] {
        assert_eq!(page(&ram, at), byte, "{at:#x}");
    }
    fill(&ram, MIB..MIB + PAGE);
    assert_eq!(page(&ram, MIB), NEW, "it can be used again");
}

#[test]
fn only_whole_pages_of_ram_go() {
    let ram = map(&RamLayout::around(8 * MIB, 3 * MIB..16 * MIB)).unwrap();
    let mut discard = Discard::new(&ram);
    fill(&ram, 0..3 * MIB);
    fill(&ram, 16 * MIB..21 * MIB);
    // Across the hole, and ragged at both ends.
    let given = discard.discard(3 * MIB - PAGE - 1..16 * MIB + PAGE + 1).unwrap();
    assert_eq!(given, 2 * PAGE);
    assert_eq!((page(&ram, 3 * MIB - 2 * PAGE), page(&ram, 3 * MIB - PAGE)), (NEW, 0));
    assert_eq!((page(&ram, 16 * MIB), page(&ram, 16 * MIB + PAGE)), (0, NEW));
    for nothing in [
        3 * MIB..16 * MIB,
        21 * MIB..u64::MAX,
        u64::MAX - 10..u64::MAX,
        1..PAGE,
        1..2 * PAGE - 1,
        5 * PAGE..5 * PAGE,
        #[allow(clippy::reversed_empty_ranges)] // as a careless caller would
        {
            9 * PAGE..4 * PAGE
        },
    ] {
        assert_eq!(discard.discard(nothing.clone()).unwrap(), 0, "{nothing:x?}");
    }
    assert_eq!(discard.discard(0..u64::MAX).unwrap(), 8 * MIB, "all there is");
    assert_eq!(resident(&ram, 16 * MIB..21 * MIB), 0);
}

/// MADV_DONTNEED alone would bring the file's bytes back.
#[test]
fn pages_of_a_file_become_zeroes_too_and_the_file_stays() {
    let (ram, file) = restored();
    let mut discard = Discard::new(&ram);
    assert_eq!(page(&ram, MIB), OLD);
    fill(&ram, 2 * MIB..3 * MIB);
    let before = ram.get_slice(Gpa::new(MIB), 1).unwrap().ptr_guard_mut().as_ptr();
    for _ in 0..2 {
        assert_eq!(discard.discard(MIB..2 * MIB + PAGE).unwrap(), MIB + PAGE);
        assert_eq!((page(&ram, MIB), page(&ram, 2 * MIB)), (0, 0));
        assert_eq!((page(&ram, MIB - PAGE), page(&ram, 2 * MIB + PAGE)), (OLD, NEW));
        fill(&ram, MIB..MIB + PAGE);
        assert_eq!(page(&ram, MIB), NEW, "it can be used again");
    }
    let after = ram.get_slice(Gpa::new(MIB), 1).unwrap().ptr_guard_mut().as_ptr();
    assert_eq!(before, after, "KVM's slot names this address");
    let mut bytes = [0; 2 * PAGE as usize];
    file.read_exact_at(&mut bytes, MIB).unwrap();
    assert_eq!(bytes, [OLD; 2 * PAGE as usize]);
}

#[test]
fn neighbours_in_a_file_join_into_one_mapping() {
    let (ram, _file) = restored();
    let mut discard = Discard::new(&ram);
    // In this order the third closes the gap between the first two.
    for at in [MIB, MIB + 2 * PAGE, MIB + PAGE, MIB - PAGE] {
        discard.discard(at..at + PAGE).unwrap();
    }
    assert_eq!(discard.anonymous, BTreeMap::from([(MIB - PAGE, MIB + 3 * PAGE)]));
    let hole = mappings(&ram, MIB - PAGE..MIB + 3 * PAGE);
    assert_eq!(hole.len(), 1, "{hole:#?}");
    assert!(hole[0].trim_end().ends_with(" 0"), "{hole:?} is a file");
    assert_eq!(mappings(&ram, 0..4 * MIB).len(), 3);
}

#[test]
fn holes_in_a_file_are_bounded() {
    let (ram, _file) = restored();
    let mut discard = Discard { replaceable: 3, ..Discard::new(&ram) };
    for at in [0, 4, 8] {
        discard.discard(at * PAGE..(at + 1) * PAGE).unwrap();
    }
    let refused = discard.discard(12 * PAGE..13 * PAGE);
    assert!(matches!(refused, Err(DiscardError::Scattered { .. })), "{refused:?}");
    assert_eq!(page(&ram, 12 * PAGE), OLD, "it stays as it is");
    fill(&ram, 4 * PAGE..5 * PAGE);
    assert_eq!(discard.discard(4 * PAGE..5 * PAGE).unwrap(), PAGE, "what is anonymous already goes");
    assert_eq!(page(&ram, 4 * PAGE), 0);
}

/// As a restore may leave it: some runs of files, some anonymous.
#[test]
fn runs_of_both_kinds() {
    let file = tempfile::tempfile().unwrap();
    let size = 1 << 20;
    let low = MmapRegionBuilder::new(size)
        .with_mmap_prot(mapping::PROTECTION)
        .with_mmap_flags(mapping::FLAGS)
        .build()
        .unwrap();
    let low = GuestRegionMmap::new(low, Gpa::new(0)).unwrap();
    let ram = GuestRam::from_regions(vec![low, file_region(&file, MIB, size)]).unwrap();
    let mut discard = Discard::new(&ram);
    assert_eq!(discard.anonymous, BTreeMap::from([(0, MIB)]));
    fill(&ram, 0..2 * MIB);
    assert_eq!(discard.discard(MIB - PAGE..MIB + PAGE).unwrap(), 2 * PAGE);
    let around = [MIB - 2 * PAGE, MIB - PAGE, MIB, MIB + PAGE].map(|at| page(&ram, at));
    assert_eq!(around, [NEW, 0, 0, NEW]);
}
