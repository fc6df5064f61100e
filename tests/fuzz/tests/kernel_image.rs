//! Kernel images from a hostile hand: the loader answers with an entry point inside guest
//! memory or a typed error that names the kernel or the initramfs; it never panics, never
//! writes outside what it says it loads, and never allocates by a number in the file.

#![allow(clippy::unwrap_used, clippy::expect_used)] // Helpers of tests fail as tests do.

use std::fs::File;
use std::io::{Seek, Write};

use proptest::prelude::*;
use spore_guests::{ELF, bzimage};
use spore_vmm::arch::{Entry, ImageError, load_image};
use spore_vmm::memory::{Gpa, GuestRam};
use vm_memory::{Address, GuestMemory};

const MEMORY: usize = 64 << 20;

fn load(image: &[u8], initrd: Option<&[u8]>, cmdline: &str) -> Result<Entry, ImageError> {
    let file = |content: &[u8]| {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(content).unwrap();
        file.rewind().unwrap();
        file
    };
    let mut kernel: File = file(image);
    let mut initrd = initrd.map(file);
    let ram = GuestRam::from_ranges(&[(Gpa::new(0), MEMORY)]).unwrap();
    let entry = load_image(&ram, &mut kernel, initrd.as_mut(), cmdline)?;
    let (Entry::Linux64 { rip } | Entry::Pvh { rip }) = entry;
    assert!(ram.address_in_range(Gpa::new(rip)), "entry {rip:#x} lies outside guest memory");
    Ok(entry)
}

/// What every answer must be like.
fn check(result: Result<Entry, ImageError>) -> Result<(), TestCaseError> {
    if let Err(error) = result {
        let message = error.to_string();
        prop_assert!(!message.is_empty() && message.len() < 600, "{}", message);
    }
    Ok(())
}

/// Overwrites `image` at each place with 1 to 8 bytes.
fn damage(image: &mut [u8], edits: &[(usize, u64, u8)]) {
    for (at, value, width) in edits {
        let at = at % image.len();
        let end = image.len().min(at + usize::from(*width));
        let bytes = value.to_le_bytes();
        image[at..end].copy_from_slice(&bytes[..end - at]);
    }
}

/// Numbers that parsers stumble over, and others.
fn number() -> impl Strategy<Value = u64> {
    prop_oneof![
        Just(0),
        Just(1),
        Just(u64::MAX),
        Just(u64::MAX - 0xfff),
        Just(i64::MAX as u64),
        Just(1 << 63),
        Just(0xffff_ffff),
        Just(0x8000_0000),
        Just(0xc000_0000),
        Just(0x10_0000),
        Just(0xf_ffff),
        Just(MEMORY as u64),
        Just(MEMORY as u64 - 1),
        any::<u64>(),
        any::<u32>().prop_map(u64::from),
        any::<u16>().prop_map(u64::from),
    ]
}

fn edits(places: std::ops::Range<usize>) -> impl Strategy<Value = Vec<(usize, u64, u8)>> {
    proptest::collection::vec((places, number(), 1u8..=8), 1..8)
}

/// The fields that the loaders read: offsets and widths.
fn field(table: &'static [(usize, u8)]) -> impl Strategy<Value = Vec<(usize, u64, u8)>> {
    let one = (proptest::sample::select(table), number()).prop_map(|((at, width), value)| (at, value, width));
    proptest::collection::vec(one, 1..5)
}

const ELF_FIELDS: &[(usize, u8)] = &[
    (4, 1),
    (5, 1),
    (16, 2),
    (18, 2),
    (24, 8),
    (32, 8),
    (40, 8),
    (52, 2),
    (54, 2),
    (56, 2),
    (64, 4),
    (72, 8),
    (80, 8),
    (88, 8),
    (96, 8),
    (104, 8),
    (112, 8),
];
const BZIMAGE_FIELDS: &[(usize, u8)] = &[
    (0x1f1, 1),
    (0x1f4, 4),
    (0x1fe, 2),
    (0x200, 2),
    (0x206, 2),
    (0x211, 1),
    (0x214, 4),
    (0x22c, 4),
    (0x230, 4),
    (0x234, 1),
    (0x236, 2),
    (0x238, 4),
    (0x248, 4),
    (0x24c, 4),
    (0x258, 8),
    (0x260, 4),
];

/// Mostly small, for speed; sometimes about as large as the memory.
fn initrd_length() -> impl Strategy<Value = usize> {
    prop_oneof![
        2 => 0usize..3,
        20 => 0usize..200_000,
        1 => MEMORY - (3 << 20)..MEMORY + (3 << 20),
    ]
}

#[test]
fn the_undamaged_images_load() {
    assert!(matches!(load(ELF, None, "x"), Ok(Entry::Linux64 { rip: 0x10_0200 })));
    assert!(matches!(load(&bzimage(), Some(b"initrd"), "x"), Ok(Entry::Linux64 { rip: 0x10_0200 })));
}

proptest! {
    #[test]
    fn arbitrary_bytes(bytes in proptest::collection::vec(any::<u8>(), 0..4096)) {
        check(load(&bytes, None, ""))?;
    }

    #[test]
    fn elf_with_damaged_fields(edits in field(ELF_FIELDS)) {
        let mut image = ELF.to_vec();
        damage(&mut image, &edits);
        check(load(&image, None, ""))?;
    }

    #[test]
    fn elf_with_damaged_headers(edits in edits(4..200), length in 0usize..=ELF.len()) {
        let mut image = ELF[..length.max(200)].to_vec();
        damage(&mut image, &edits);
        check(load(&image, None, ""))?;
    }

    #[test]
    fn bzimage_with_damaged_fields(edits in field(BZIMAGE_FIELDS), initrd in proptest::option::of(1usize..100_000)) {
        let mut image = bzimage();
        damage(&mut image, &edits);
        let initrd = initrd.map(|length| vec![1; length]);
        check(load(&image, initrd.as_deref(), "console=ttyS0"))?;
    }

    #[test]
    fn bzimage_with_damaged_header_cut_short(edits in edits(0x1f1..0x270), length in 0x206usize..10_000) {
        let mut image = bzimage();
        image.truncate(length);
        damage(&mut image, &edits);
        image.get_mut(0x202..0x206).unwrap().copy_from_slice(b"HdrS");
        check(load(&image, None, ""))?;
    }

    /// PVH notes: a note segment of any size and content.
    #[test]
    fn elf_with_a_hostile_note(
        offset in number(), size in number(), align in number(), note in proptest::collection::vec(any::<u8>(), 0..64),
    ) {
        let mut image = ELF.to_vec();
        // A second program header behind the first, over the guest's own padding.
        image[56] = 2;
        let start = 64 + 56;
        let mut header = [0; 56];
        header[..4].copy_from_slice(&4u32.to_le_bytes());
        header[8..16].copy_from_slice(&offset.to_le_bytes());
        header[32..40].copy_from_slice(&size.to_le_bytes());
        header[40..48].copy_from_slice(&size.to_le_bytes());
        header[48..56].copy_from_slice(&align.to_le_bytes());
        image[start..start + 56].copy_from_slice(&header);
        image[start + 56..start + 56 + note.len()].copy_from_slice(&note);
        check(load(&image, None, ""))?;
    }

    #[test]
    fn initramfs_of_any_size_and_any_command_line(length in initrd_length(), cmdline in "[ -~]{0,2047}") {
        let file = tempfile::tempfile().unwrap();
        file.set_len(length as u64).unwrap();
        let ram = GuestRam::from_ranges(&[(Gpa::new(0), MEMORY)]).unwrap();
        let mut kernel = tempfile::tempfile().unwrap();
        kernel.write_all(ELF).unwrap();
        let fits = load_image(&ram, &mut kernel, Some(&mut { file }), &cmdline).is_ok();
        // The guest ends between 1 and 2 MiB; in that range either answer may be right.
        if length == 0 || length > MEMORY - (1 << 20) {
            prop_assert!(!fits, "{} bytes", length);
        } else if length <= MEMORY - (2 << 20) {
            prop_assert!(fits, "{} bytes", length);
        }
    }
}
