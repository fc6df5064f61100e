#![allow(unsafe_code)] // madvise on the mappings that this module just made
//! Guest RAM as private anonymous mappings.
//!
//! `MAP_NORESERVE`: a guest's size is a promise that most guests never call in; what they do
//! touch is bounded by the VMM's cgroup. The mappings are left out of core dumps, which would
//! otherwise hold guests' secrets. After a restore, parts of them are private mappings of snapshot
//! layers ([`map_files`]): what the guest writes there is anonymous memory as well, and the file
//! never changes.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use vm_memory::mmap::{MmapRegionBuilder, MmapRegionError};
use vm_memory::{GuestMemory, GuestMemoryRegion, GuestRegionMmap};

use super::{Gpa, GuestRam, RamLayout, RamRange};

/// How guest RAM is mapped.
pub(super) const FLAGS: i32 = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
pub(super) const PROTECTION: i32 = libc::PROT_READ | libc::PROT_WRITE;

#[derive(Debug, thiserror::Error)]
pub enum MapError {
    #[error("guest memory: {size} bytes at {start:#x} do not fit this host's address space")]
    TooLarge { start: u64, size: u64 },
    #[error(
        "guest memory: mapping {size} bytes at {start:#x}: {source}; give the VM less memory or the host more"
    )]
    Map { start: u64, size: u64, source: MmapRegionError },
    #[error("guest memory: {bytes:#x} bytes at {start:#x} are not in one run of RAM")]
    NotRam { start: u64, bytes: u64 },
    #[error("guest memory: mapping {bytes:#x} bytes at {start:#x} of a snapshot's layer: {source}")]
    Layer { start: u64, bytes: u64, source: io::Error },
    #[error("guest memory: the layout {layout:?} is not sorted and free of overlap")]
    Layout { layout: RamLayout },
}

/// What KVM is told of one run of RAM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RamSlot {
    pub start: Gpa,
    pub size: u64,
    pub host_address: u64,
}

/// Maps fresh zero memory for all of `layout`.
pub fn map(layout: &RamLayout) -> Result<GuestRam, MapError> {
    let regions = layout.ranges().iter().map(map_range).collect::<Result<Vec<_>, _>>()?;
    GuestRam::from_regions(regions).map_err(|_| MapError::Layout { layout: layout.clone() })
}

fn map_range(range: &RamRange) -> Result<GuestRegionMmap, MapError> {
    let (start, size) = (range.start.0, range.size);
    let length = usize::try_from(size).map_err(|_| MapError::TooLarge { start, size })?;
    let region = MmapRegionBuilder::new(length)
        .with_mmap_prot(PROTECTION)
        .with_mmap_flags(FLAGS)
        .build()
        .map_err(|source| MapError::Map { start, size, source })?;
    // SAFETY: the range is exactly the mapping made above.
    unsafe { leave_out_of_core_dumps(region.as_ptr().cast(), length) };
    GuestRegionMmap::new(region, range.start).ok_or(MapError::TooLarge { start, size })
}

/// Guest memory that begins as a part of a file.
#[derive(Debug, Clone, Copy)]
pub struct FileExtent<'a> {
    /// Guest address, a multiple of the page size, as are the others.
    pub start: u64,
    pub bytes: u64,
    pub file: &'a File,
    pub offset: u64,
}

/// As [`map`], with the contents of files in `extents`, which do not overlap. Nothing is read before it is touched. A file
/// that becomes shorter later costs the process a SIGBUS: layers are never truncated.
pub fn map_files(layout: &RamLayout, extents: &[FileExtent<'_>]) -> Result<GuestRam, MapError> {
    let ram = map(layout)?;
    for extent in extents {
        map_extent(&ram, extent)?;
    }
    for slot in slots(&ram).into_iter().filter(|_| !extents.is_empty()) {
        let length = usize::try_from(slot.size).unwrap_or(usize::MAX);
        // SAFETY: the whole of one run's mappings, made above.
        unsafe { leave_out_of_core_dumps(slot.host_address as *mut libc::c_void, length) };
    }
    Ok(ram)
}

fn map_extent(ram: &GuestRam, extent: &FileExtent<'_>) -> Result<(), MapError> {
    let FileExtent { start, bytes, file, offset } = *extent;
    let inside = |slot: &RamSlot| {
        start >= slot.start.0 && start.checked_add(bytes).is_some_and(|end| end - slot.start.0 <= slot.size)
    };
    let (Some(slot), Ok(length)) = (slots(ram).into_iter().find(inside), usize::try_from(bytes)) else {
        return Err(MapError::NotRam { start, bytes });
    };
    let address = (slot.host_address + (start - slot.start.0)) as *mut libc::c_void;
    let failed = |source| MapError::Layer { start, bytes, source };
    let offset = libc::off_t::try_from(offset).map_err(|error| failed(io::Error::other(error)))?;
    let flags = libc::MAP_PRIVATE | libc::MAP_NORESERVE | libc::MAP_FIXED;
    // SAFETY: the range lies in a mapping that `ram` owns, which nobody uses yet, and stays a private mapping of the same size
    // that `ram` unmaps by address; the kernel checks alignment.
    let mapped = unsafe { libc::mmap(address, length, PROTECTION, flags, file.as_raw_fd(), offset) };
    if mapped == libc::MAP_FAILED { Err(failed(io::Error::last_os_error())) } else { Ok(()) }
}

/// Asks for huge pages where memory is not a file's. A host that has none to give, or none at all, gives small ones.
pub fn prefer_huge_pages(ram: &GuestRam) {
    for slot in slots(ram) {
        let length = usize::try_from(slot.size).unwrap_or(usize::MAX);
        // SAFETY: mappings that `ram` owns, and MADV_HUGEPAGE changes no content.
        let advised =
            unsafe { libc::madvise(slot.host_address as *mut libc::c_void, length, libc::MADV_HUGEPAGE) };
        if advised != 0 {
            let error = io::Error::last_os_error();
            crate::log::warn("memory", format_args!("guest RAM stays in small pages: {error}"));
        }
    }
}

/// # Safety
/// The range is a mapping of the caller's.
pub(super) unsafe fn leave_out_of_core_dumps(address: *mut libc::c_void, length: usize) {
    // SAFETY: the caller's mapping, and MADV_DONTDUMP changes no content.
    if unsafe { libc::madvise(address, length, libc::MADV_DONTDUMP) } != 0 {
        let error = io::Error::last_os_error();
        crate::log::warn("memory", format_args!("guest RAM stays part of core dumps: {error}"));
    }
}

/// Whether a run of RAM was made as [`map`] makes it, and not of files.
pub(super) fn is_anonymous(region: &GuestRegionMmap) -> bool {
    region.flags() & libc::MAP_ANONYMOUS != 0
}

/// The slots to register with KVM, in ascending order of guest addresses.
pub fn slots(ram: &GuestRam) -> Vec<RamSlot> {
    ram.iter()
        .map(|region| RamSlot {
            start: region.start_addr(),
            size: region.len(),
            host_address: region.as_ptr() as u64,
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use vm_memory::{Address, Bytes};

    use super::*;

    #[test]
    fn maps_six_gib_around_a_hole() {
        const GIB: u64 = 1 << 30;
        let ram = map(&RamLayout::around(6 * GIB, 3 * GIB..4 * GIB)).unwrap();
        let slots = slots(&ram);
        assert_eq!(slots.len(), 2);
        assert_eq!((slots[1].start, slots[1].size), (Gpa::new(4 * GIB), 3 * GIB));
        ram.write_obj(0x55aa_u16, Gpa::new(7 * GIB - 2)).unwrap();
        assert_eq!(ram.read_obj::<u16>(Gpa::new(7 * GIB - 2)).unwrap(), 0x55aa);
        assert!(ram.write_obj(1u8, Gpa::new(3 * GIB)).is_err(), "the hole is not RAM");
        assert!(ram.write_obj(1u64, Gpa::new(7 * GIB - 4)).is_err(), "nor is what lies past the end");
    }
}
