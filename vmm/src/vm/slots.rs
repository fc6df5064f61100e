//! The virtio-mmio slots: which device sits where, at which address, on which line. A guest
//! probes a slot once, at boot, so those that a VM has exist from the start, and disks come later.

use crate::api::{MAX_DISK_SLOTS, MAX_NETWORK_SLOTS};
use crate::arch::layout;

/// Bytes of a slot.
pub const SIZE: u64 = 0x1000;
pub const RNG: usize = 0;
pub const VSOCK: usize = 1;
/// Read-only disks follow the first two slots, writable ones follow the most of them: a slot
/// has the same place whatever the number of slots.
pub const FIRST_READ_ONLY: usize = 2;
pub const FIRST_WRITABLE: usize = FIRST_READ_ONLY + MAX_DISK_SLOTS as usize;
pub const FILESYSTEM: usize = FIRST_WRITABLE + MAX_DISK_SLOTS as usize;
pub const BALLOON: usize = FILESYSTEM + 1;
pub const FIRST_NETWORK: usize = BALLOON + 1;
pub const COUNT: usize = FIRST_NETWORK + MAX_NETWORK_SLOTS as usize;

/// Guest address of a slot's registers.
pub fn address(slot: usize) -> u64 {
    layout::MMIO_SLOTS + slot as u64 * SIZE
}

/// Interrupt line of a slot. There are fewer lines than slots, so they share.
pub fn gsi(slot: usize) -> u32 {
    let lines = layout::SLOT_GSIS.end - layout::SLOT_GSIS.start;
    layout::SLOT_GSIS.start + u32::try_from(slot).unwrap_or(0) % lines
}

/// The serial of the `n`th disk slot of a kind: `ro0`, `rw3`.
pub fn serial(read_only: bool, n: usize) -> String {
    format!("{}{n}", if read_only { "ro" } else { "rw" })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_are_where_the_contract_says() {
        assert_eq!(COUNT, 32);
        assert_eq!((address(0), address(31)), (0xd000_0000, 0xd001_f000));
        assert_eq!((gsi(0), gsi(17), gsi(18), gsi(31)), (6, 23, 6, 19));
        assert_eq!(
            (FIRST_READ_ONLY, FIRST_WRITABLE, FILESYSTEM, BALLOON, FIRST_NETWORK),
            (2, 14, 26, 27, 28)
        );
        assert_eq!((serial(true, 0), serial(false, 11)), ("ro0".into(), "rw11".into()));
    }

    #[test]
    fn slots_lie_in_the_hole_and_below_4_gib() {
        assert!(layout::HOLE.contains(&address(0)));
        assert!(address(COUNT) < 0xfec0_0000);
    }

    #[test]
    fn no_slot_shares_a_line_with_a_legacy_device() {
        for slot in 0..COUNT {
            assert!(gsi(slot) > layout::POWER_BUTTON_GSI && gsi(slot) > layout::SERIAL_GSI);
            assert!(gsi(slot) < 24, "the I/O APIC has 24 pins");
        }
    }
}
