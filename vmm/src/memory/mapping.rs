#![allow(unsafe_code)] // madvise on the mappings that this module just made
//! Guest RAM as private anonymous mappings.
//!
//! `MAP_NORESERVE`: a guest's size is a promise that most guests never call in; what they do
//! touch is bounded by the VMM's cgroup. The mappings are left out of core dumps, which would
//! otherwise hold guests' secrets.

use std::io;

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
