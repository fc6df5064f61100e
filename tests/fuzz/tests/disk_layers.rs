//! Layers of disks from a hostile hand: opening a stack gives a typed error or a disk of which every byte can
//! be read and written; it never panics and never allocates by a number in a file.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

use std::fs::File;
use std::os::unix::fs::FileExt;

use proptest::prelude::*;
use spore_vmm::backend::disk::format::{BLOCK, Geometry, HEADER, Header, MAX_DISK};
use spore_vmm::backend::disk::{Disk, DiskError};
use vm_memory::VolatileSlice;

/// The last block is short.
const DISK: u64 = 70 * BLOCK + 512;

fn file(length: u64) -> File {
    let file = tempfile::tempfile().unwrap();
    file.set_len(length).unwrap();
    file
}

fn again(file: &File) -> File {
    file.try_clone().unwrap()
}

/// A raw layer and two deltas, which have some blocks each.
fn stack() -> Vec<File> {
    let (raw, first, second) = (file(DISK), file(0), file(0));
    let mut disk = Disk::new(again(&raw), true).unwrap();
    let mut bytes = vec![1; 3 * BLOCK as usize];
    for (at, layer) in [(5, &first), (6, &second)] {
        disk.stage(again(layer)).unwrap();
        disk.switch().unwrap();
        disk.write(at * BLOCK + 512, &[VolatileSlice::from(&mut bytes[..])]).unwrap();
    }
    disk.close().unwrap();
    vec![raw, first, second]
}

/// Opens, reads all, writes all, reads all; nothing of it may fail once it is open.
fn exercise(files: &[File]) -> Result<(), DiskError> {
    let (top, below) = files.split_last().unwrap();
    let mut disk = Disk::open(again(top), below.iter().map(again).collect(), true)?;
    let mut bytes = vec![0; DISK as usize];
    assert_eq!(disk.sectors() * 512, DISK);
    disk.read(0, &[VolatileSlice::from(&mut bytes[..])]).unwrap();
    bytes.fill(9);
    disk.write(512, &[VolatileSlice::from(&mut bytes[512..])]).unwrap();
    disk.discard(3 * BLOCK, BLOCK + 512).unwrap();
    disk.flush().unwrap();
    disk.read(0, &[VolatileSlice::from(&mut bytes[..])]).unwrap();
    assert!(bytes[(4 * BLOCK + 512) as usize..].iter().all(|&byte| byte == 9));
    assert!(bytes[(3 * BLOCK) as usize..(4 * BLOCK + 512) as usize].iter().all(|&byte| byte == 0));
    Ok(())
}

fn check(result: Result<(), DiskError>) -> Result<(), TestCaseError> {
    if let Err(error) = result {
        let message = error.to_string();
        prop_assert!(!message.is_empty() && message.len() < 600, "{}", message);
    }
    Ok(())
}

/// Places of the header that are read, and any other.
fn place() -> impl Strategy<Value = usize> {
    prop_oneof![4 => 0usize..64, 1 => 0usize..HEADER, 1 => 508..512usize]
}

#[test]
fn the_undamaged_stack_opens() {
    exercise(&stack()).unwrap();
}

proptest! {
    #[test]
    fn damaged_headers(layer in 1usize..3, edits in proptest::collection::vec((place(), any::<u8>()), 1..5)) {
        let files = stack();
        let mut header = [0; HEADER];
        files[layer].read_exact_at(&mut header, 0).unwrap();
        let before = header;
        for (at, byte) in edits {
            header[at] = byte;
        }
        files[layer].write_all_at(&header, 0).unwrap();
        let result = exercise(&files);
        prop_assert!(result.is_err() || header == before, "a changed header was believed");
        check(result)?;
    }

    /// A checksum keeps nobody from writing what he likes: headers that are sound in themselves.
    #[test]
    fn headers_that_lie(
        layer in 1usize..3, id: [u8; 16], parent: [u8; 16], keep_id: bool, keep_parent: bool,
        size in prop_oneof![Just(DISK), 1u64..200, any::<u64>()],
    ) {
        let files = stack();
        let mut header = [0; HEADER];
        files[layer].read_exact_at(&mut header, 0).unwrap();
        let mut lie = Header::decode(&header).unwrap();
        let before = lie;
        if !keep_id { lie.id = id; }
        if !keep_parent { lie.parent = parent; }
        if let Ok(geometry) = Geometry::of(size.saturating_mul(512).min(MAX_DISK)) { lie.geometry = geometry; }
        files[layer].write_all_at(&lie.encode(), 0).unwrap();
        let result = exercise(&files);
        // The uppermost layer's own name is nobody's concern.
        let harmless = lie == before || (layer == 2 && lie.parent == before.parent && lie.geometry == before.geometry);
        prop_assert!(result.is_err() || harmless, "{:?}", lie);
        check(result)?;
    }

    #[test]
    fn bitmaps_of_any_content(layer in 1usize..3, bits in proptest::collection::vec(any::<u8>(), 1..64), at in 0u64..4096) {
        let files = stack();
        let at = at.min(4096 - bits.len() as u64);
        files[layer].write_all_at(&bits, HEADER as u64 + at).unwrap();
        check(exercise(&files))?;
    }

    #[test]
    fn files_of_any_length_and_order(
        lengths in proptest::collection::vec(proptest::option::of(0u64..600_000), 3),
        order in Just(vec![0usize, 1, 2]).prop_shuffle(), count in 1usize..=3,
    ) {
        let files = stack();
        for (file, length) in files.iter().zip(&lengths) {
            if let Some(length) = length {
                file.set_len(*length).unwrap();
            }
        }
        let chosen: Vec<_> = order.iter().take(count).map(|&at| again(&files[at])).collect();
        let (top, below) = chosen.split_last().unwrap();
        if let Ok(disk) = Disk::open(again(top), below.iter().map(again).collect(), true) {
            // Cut behind what was checked, a raw file cannot be: its length is the disk's.
            prop_assert!(disk.sectors() > 0);
        }
    }
}
