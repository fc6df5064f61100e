#![allow(unsafe_code)] // the PAGEMAP_SCAN ioctl, and reading guest memory in a process that has stopped
//! Which pages of guest memory the VM has written: the anonymous ones.
//!
//! Guest RAM is private (see `mapping`), so a page that the guest or a device wrote is anonymous memory of this process,
//! and a page that nobody wrote is a page of a snapshot's file, or nothing at all. The kernel tells them apart in
//! `/proc/self/pagemap`: by the ioctl PAGEMAP_SCAN (Linux 6.7), else by the words of the file
//! (Documentation/admin-guide/mm/pagemap.rst). Nothing has to be armed or tracked while the VM runs.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use super::{GuestRam, slots};

const PAGE: u64 = 4096;
const PAGE_BYTES: usize = 4096;

/// Categories of a page (linux/fs.h).
const PAGE_IS_FILE: u64 = 1 << 2;
const PAGE_IS_PRESENT: u64 = 1 << 3;
const PAGE_IS_SWAPPED: u64 = 1 << 4;
const PAGE_IS_PFNZERO: u64 = 1 << 5;

/// Bits of a word of the file.
const BIT_FILE: u64 = 1 << 61;
const BIT_SWAPPED: u64 = 1 << 62;
const BIT_PRESENT: u64 = 1 << 63;

/// struct pm_scan_arg.
#[repr(C)]
#[derive(Default)]
struct ScanArguments {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

/// struct page_region.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Region {
    start: u64,
    end: u64,
    categories: u64,
}

vmm_sys_util::ioctl_iowr_nr!(PAGEMAP_SCAN, b'f' as u32, 16, ScanArguments);

/// Regions that one call may return.
const REGIONS: usize = 1024;

/// The page map could not be read.
#[derive(Debug, thiserror::Error)]
#[error("guest memory: reading which pages were written, {operation}: {source}")]
pub struct ScanError {
    operation: &'static str,
    source: io::Error,
}

/// The guest's pages that this process has of its own, as ascending ranges of guest addresses; `pagemap` is
/// the file of this very process.
pub fn written(ram: &GuestRam, pagemap: &File) -> Result<Vec<Range<u64>>, ScanError> {
    let mut found = Vec::new();
    for slot in slots(ram) {
        let hosts = slot.host_address..slot.host_address + slot.size;
        let mut push = |range: Range<u64>| {
            let guest = |host: u64| host - slot.host_address + slot.start.0;
            push(&mut found, guest(range.start)..guest(range.end));
        };
        match scan(pagemap, hosts.clone(), &mut push) {
            // An older kernel.
            Err(error) if matches!(error.raw_os_error(), Some(libc::ENOTTY | libc::EINVAL)) => {
                read_words(pagemap, hosts, &mut push)
                    .map_err(|source| ScanError { operation: "reading the page map", source })?;
            }
            result => result.map_err(|source| ScanError { operation: "PAGEMAP_SCAN", source })?,
        }
    }
    Ok(found)
}

fn push(found: &mut Vec<Range<u64>>, range: Range<u64>) {
    match found.last_mut().filter(|last| last.end == range.start) {
        Some(last) => last.end = range.end,
        None => found.push(range),
    }
}

fn scan(pagemap: &File, hosts: Range<u64>, push: &mut dyn FnMut(Range<u64>)) -> io::Result<()> {
    let mut regions = vec![Region::default(); REGIONS];
    let mut start = hosts.start;
    while start < hosts.end {
        let mut arguments = ScanArguments {
            size: size_of::<ScanArguments>() as u64,
            start,
            end: hosts.end,
            vec: regions.as_mut_ptr() as u64,
            vec_len: regions.len() as u64,
            // Neither a file's page nor the zero page, and there at all.
            category_inverted: PAGE_IS_FILE | PAGE_IS_PFNZERO,
            category_mask: PAGE_IS_FILE | PAGE_IS_PFNZERO,
            category_anyof_mask: PAGE_IS_PRESENT | PAGE_IS_SWAPPED,
            return_mask: PAGE_IS_FILE,
            ..ScanArguments::default()
        };
        // SAFETY: the arguments name a live vector with its length, which the kernel fills in no
        // further than that; nothing else is written but `arguments` itself.
        let count =
            unsafe { vmm_sys_util::ioctl::ioctl_with_mut_ref(pagemap, PAGEMAP_SCAN(), &mut arguments) };
        let Ok(count) = usize::try_from(count) else { return Err(io::Error::last_os_error()) };
        for region in regions.iter().take(count) {
            push(region.start.max(hosts.start)..region.end.min(hosts.end));
        }
        if arguments.walk_end <= start {
            return Err(io::Error::other("the walk did not advance"));
        }
        start = arguments.walk_end;
    }
    Ok(())
}

fn read_words(pagemap: &File, hosts: Range<u64>, push: &mut dyn FnMut(Range<u64>)) -> io::Result<()> {
    let mut words = vec![0u8; 64 * 1024];
    let mut at = hosts.start;
    while at < hosts.end {
        let pages = ((hosts.end - at) / PAGE).min(words.len() as u64 / 8);
        let bytes = usize::try_from(pages * 8).unwrap_or(words.len());
        pagemap.read_exact_at(&mut words[..bytes], at / PAGE * 8)?;
        for word in words[..bytes].as_chunks::<8>().0 {
            let word = u64::from_ne_bytes(*word);
            if word & (BIT_PRESENT | BIT_SWAPPED) != 0 && word & BIT_FILE == 0 {
                push(at..at + PAGE);
            }
            at += PAGE;
        }
    }
    Ok(())
}

/// A view of guest memory in a process in which nothing changes it any more.
#[derive(Debug)]
pub struct Still<'a>(&'a GuestRam);

impl<'a> Still<'a> {
    /// # Safety
    /// For as long as the result lives, nothing writes the memory behind `ram`: the process has one thread, this one,
    /// which does not, no VM runs on this mapping, and the mapping is private.
    pub unsafe fn new(ram: &'a GuestRam) -> Self {
        Self(ram)
    }

    /// The bytes of a range that lies in one run of RAM.
    pub fn bytes(&self, range: &Range<u64>) -> Option<&[u8]> {
        let slot = slots(self.0).into_iter().find(|slot| {
            slot.start.0 <= range.start && range.start <= range.end && range.end - slot.start.0 <= slot.size
        })?;
        let address = slot.host_address + (range.start - slot.start.0);
        let length = usize::try_from(range.end - range.start).ok()?;
        // SAFETY: by the lines above the range is inside a mapping that `ram` holds, readable for its whole length;
        // by `new` nobody writes it while the reference lives.
        Some(unsafe { std::slice::from_raw_parts(address as *const u8, length) })
    }
}

/// The pages of `ranges` that are not all zero, ascending.
pub fn without_zeroes(memory: &Still<'_>, ranges: &[Range<u64>]) -> Vec<Range<u64>> {
    let mut found = Vec::with_capacity(ranges.len());
    for range in ranges {
        let Some(bytes) = memory.bytes(range) else { continue };
        for (start, page) in (range.start..).step_by(PAGE_BYTES).zip(bytes.chunks(PAGE_BYTES)) {
            if !is_zero(page) {
                push(&mut found, start..start + page.len() as u64);
            }
        }
    }
    found
}

fn is_zero(page: &[u8]) -> bool {
    // SAFETY: any bytes are valid words.
    let (head, words, tail) = unsafe { page.align_to::<u64>() };
    words.iter().all(|word| *word == 0) && head.iter().chain(tail).all(|byte| *byte == 0)
}

#[cfg(test)]
mod tests {
    use vm_memory::{Address, Bytes};

    use super::*;
    use crate::memory::{FileExtent, Gpa, RamLayout, map, map_files};

    const MIB: u64 = 1 << 20;

    fn pagemap() -> File {
        File::open("/proc/self/pagemap").unwrap()
    }

    fn touch(ram: &GuestRam, page: u64, value: u8) {
        ram.write_obj(value, Gpa::new(page * PAGE)).unwrap();
    }

    fn pages(ranges: &[Range<u64>]) -> Vec<u64> {
        ranges.iter().flat_map(|range| range.start / PAGE..range.end / PAGE).collect()
    }

    #[test]
    fn written_pages_are_found_and_read_ones_are_not() {
        let ram = map(&RamLayout::around(4 * MIB, 3 << 30..4 << 30)).unwrap();
        for page in [3, 4, 700] {
            touch(&ram, page, 7);
        }
        touch(&ram, 9, 0);
        assert_eq!(ram.read_obj::<u8>(Gpa::new(20 * PAGE)).unwrap(), 0);
        let found = written(&ram, &pagemap()).unwrap();
        assert_eq!(pages(&found), [3, 4, 9, 700]);
        // SAFETY: nobody else knows this mapping.
        let still = unsafe { Still::new(&ram) };
        assert_eq!(pages(&without_zeroes(&still, &found)), [3, 4, 700]);
    }

    #[test]
    fn pages_of_a_file_are_not_written_ones_until_they_are_written() {
        let layer = tempfile::tempfile().unwrap();
        layer.write_all_at(&vec![5; 64 * 4096], 0).unwrap();
        let extent = FileExtent { start: 0, bytes: 64 * PAGE, file: &layer, offset: 0 };
        let ram = map_files(&RamLayout::around(4 * MIB, 3 << 30..4 << 30), &[extent]).unwrap();
        assert_eq!(ram.read_obj::<u8>(Gpa::new(7 * PAGE)).unwrap(), 5);
        assert_eq!(written(&ram, &pagemap()).unwrap(), []);
        touch(&ram, 8, 6);
        touch(&ram, 100, 6);
        assert_eq!(pages(&written(&ram, &pagemap()).unwrap()), [8, 100]);
        let mut first = [0];
        layer.read_exact_at(&mut first, 8 * PAGE).unwrap();
        assert_eq!(first, [5], "the file is never written");
    }

    #[test]
    fn the_words_of_the_file_tell_the_same() {
        let ram = map(&RamLayout::around(2 * MIB, 3 << 30..4 << 30)).unwrap();
        for page in [0, 1, 511] {
            touch(&ram, page, 1);
        }
        let slot = slots(&ram)[0];
        let mut found = Vec::new();
        let mut each = |range: Range<u64>| {
            push(&mut found, range.start - slot.host_address..range.end - slot.host_address);
        };
        read_words(&pagemap(), slot.host_address..slot.host_address + slot.size, &mut each).unwrap();
        assert_eq!(pages(&found), [0, 1, 511]);
    }
}
