//! boot_params, the memory map, and an allocator that never frees.

use core::sync::atomic::{AtomicU64, Ordering};

unsafe extern "C" {
    static _end: u8;
}

/// The page that the VMM fills in (Linux `struct boot_params`).
#[derive(Clone, Copy)]
pub struct BootParams(pub *const u8);

#[derive(Clone, Copy)]
pub struct Range {
    pub start: u64,
    pub size: u64,
    pub kind: u32,
}

impl BootParams {
    fn read<T: Copy>(self, offset: usize) -> T {
        // SAFETY: offsets below are inside the 4 KiB page.
        unsafe { self.0.add(offset).cast::<T>().read_unaligned() }
    }

    pub fn cmdline(self) -> &'static str {
        let low: u32 = self.read(0x228);
        let high: u32 = self.read(0xc8);
        let address = u64::from(low) | u64::from(high) << 32;
        let mut length = 0;
        // SAFETY: the protocol ends the command line with NUL within 2048 bytes.
        unsafe {
            while length < 2048 && *((address + length) as *const u8) != 0 {
                length += 1;
            }
            core::str::from_utf8(core::slice::from_raw_parts(address as *const u8, length as usize))
                .unwrap_or("")
        }
    }

    pub fn rsdp(self) -> u64 {
        self.read(0x70)
    }

    /// Address and size of the initramfs.
    pub fn ramdisk(self) -> (u64, u64) {
        let (address, size): (u32, u32) = (self.read(0x218), self.read(0x21c));
        let (address_high, size_high): (u32, u32) = (self.read(0xc0), self.read(0xc4));
        (u64::from(address) | u64::from(address_high) << 32, u64::from(size) | u64::from(size_high) << 32)
    }

    pub fn ranges(self) -> impl Iterator<Item = Range> {
        let count: u8 = self.read(0x1e8);
        (0..usize::from(count)).map(move |index| {
            let at = 0x2d0 + index * 20;
            Range { start: self.read(at), size: self.read(at + 8), kind: self.read(at + 16) }
        })
    }
}

static NEXT: AtomicU64 = AtomicU64::new(0);

/// Zeroed memory of `size` bytes, page-aligned, for ever.
pub fn allocate(size: usize) -> &'static mut [u8] {
    if NEXT.load(Ordering::Relaxed) == 0 {
        NEXT.store(&raw const _end as u64, Ordering::Relaxed);
    }
    let size_up = (size as u64 + 4095) & !4095;
    let start = NEXT.fetch_add(size_up, Ordering::Relaxed);
    // SAFETY: from the image's end upwards nobody else hands memory out; the VMM puts the
    // initramfs and its tables at the ends of low memory, far from what a test allocates.
    unsafe {
        core::ptr::write_bytes(start as *mut u8, 0, size);
        core::slice::from_raw_parts_mut(start as *mut u8, size)
    }
}

/// FNV-1a, 64 bits.
pub fn checksum(seed: u64, bytes: &[u8]) -> u64 {
    bytes.iter().fold(seed, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3))
}

pub const CHECKSUM_SEED: u64 = 0xcbf2_9ce4_8422_2325;
