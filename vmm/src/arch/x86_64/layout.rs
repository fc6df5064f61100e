//! The guest's physical address space, port space and interrupt lines.
//!
//! ```text
//! 0x0000_0000  boot structures (below), RAM from here on
//! 0x000e_0000  ACPI tables; 0x000f_f000 generation id; 0x000f_fff0 reset vector
//! 0x0010_0000  kernel, initramfs towards the end of RAM below the hole
//! 0xc000_0000  hole: no RAM up to 4 GiB
//! 0xd000_0000  virtio-mmio slots
//! 0xfec0_0000  I/O APIC      0xfee0_0000  local APIC      0xfffb_c000  KVM's own pages
//! 0x1_0000_0000  the rest of RAM
//! ```

use std::ops::Range;

pub const MIB: u64 = 1 << 20;

/// Where no RAM may lie.
pub const HOLE: Range<u64> = 0xc000_0000..0x1_0000_0000;
/// First virtio-mmio slot.
pub const MMIO_SLOTS: u64 = 0xd000_0000;
/// Interrupt lines that virtio-mmio slots share.
pub const SLOT_GSIS: Range<u32> = 6..24;
pub(super) const IO_APIC: u32 = 0xfec0_0000;
pub(super) const LOCAL_APIC: u32 = 0xfee0_0000;
/// Four pages that KVM needs on Intel hosts: one of page tables for real mode, three of TSS.
pub(super) const IDENTITY_MAP: u64 = 0xfffb_c000;
pub(super) const TSS: usize = 0xfffb_d000;

/// COM1: eight ports.
pub const SERIAL_PORT: u16 = 0x3f8;
pub const SERIAL_PORTS: u16 = 8;
pub const SERIAL_GSI: u32 = 4;
/// ACPI sleep control, sleep status and reset registers, one byte each.
pub const POWER_PORT: u16 = 0x600;
pub const POWER_PORTS: u16 = 3;
/// Interrupt of the generic event device, which carries the power button.
pub const POWER_BUTTON_GSI: u32 = 5;
/// Interrupt of the generic event device for a new generation id.
pub const GENERATION_ID_GSI: u32 = 3;
/// The keyboard controller's command port, by which old software resets a PC.
pub const KEYBOARD_COMMAND_PORT: u16 = 0x64;

pub(super) const GDT: u64 = 0x500;
pub(super) const PVH_START_INFO: u64 = 0x6000;
pub(super) const PVH_MODULES: u64 = 0x6040;
pub(super) const PVH_MEMORY_MAP: u64 = 0x6080;
pub(super) const ZERO_PAGE: u64 = 0x7000;
/// PML4, PDPT and four page directories, a page each.
pub(super) const PAGE_TABLES: u64 = 0x9000;
pub(super) const BOOT_STACK: u64 = 0x8ff0;
pub(super) const CMDLINE: u64 = 0x2_0000;
/// End of conventional memory; a PC's firmware keeps the KiB above.
pub(super) const LOW_RAM_END: u64 = 0x9_fc00;
pub(super) const ACPI_TABLES: Range<u64> = 0xe_0000..0xf_f000;
/// Sixteen bytes, which the guest finds by the ACPI tables.
pub const GENERATION_ID: u64 = 0xf_f000;
/// Where a PC's processor starts after a reset, in real mode.
pub(super) const RESET_VECTOR: u64 = 0xf_fff0;
/// Start of memory that is free for a kernel.
pub(super) const HIGH_RAM: u64 = 0x10_0000;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arch::MAX_CMDLINE;

    #[test]
    fn boot_structures_do_not_overlap() {
        let e820_size = 24 * 8;
        let mut ranges = vec![
            (GDT, 5 * 8),
            (PVH_START_INFO, 56),
            (PVH_MODULES, 32),
            (PVH_MEMORY_MAP, e820_size),
            (ZERO_PAGE, 4096),
            (BOOT_STACK - 0x100, 0x100),
            (PAGE_TABLES, 6 * 4096),
            (CMDLINE, MAX_CMDLINE as u64 + 1),
            (LOW_RAM_END, 0x400),
            (ACPI_TABLES.start, ACPI_TABLES.end - ACPI_TABLES.start),
            (GENERATION_ID, 16),
            (RESET_VECTOR, 16),
            (HIGH_RAM, 1),
        ];
        ranges.sort_unstable();
        for pair in ranges.windows(2) {
            assert!(pair[0].0 + pair[0].1 <= pair[1].0, "{pair:x?}");
        }
    }
}
