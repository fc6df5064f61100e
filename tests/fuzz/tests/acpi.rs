//! Firmware tables for any machine that can be configured: they stay in their area, every
//! checksum is right, every pointer leads to a whole table, and the lists have as many
//! entries as the machine has parts. (The VMM writes ACPI and never reads it; the reader
//! here is the guest's.)

#![allow(clippy::unwrap_used, clippy::expect_used)] // Helpers of tests fail as tests do.

use proptest::prelude::*;
use spore_vmm::arch::{MmioDescription, Platform, write_firmware_tables};
use spore_vmm::memory::{Gpa, GuestRam};
use vm_memory::{Address, Bytes};

const AREA: std::ops::Range<u64> = 0xe_0000..0x10_0000;
/// Pieces that only ACPI may touch.
const FILL: u8 = 0xa5;

fn ram() -> GuestRam {
    let ram = GuestRam::from_ranges(&[(Gpa::new(0), 2 << 20)]).unwrap();
    ram.write_slice(&vec![FILL; 2 << 20], Gpa::new(0)).unwrap();
    ram
}

fn read(ram: &GuestRam, at: u64, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    ram.read_slice(&mut bytes, Gpa::new(at)).unwrap();
    bytes
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

fn sum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
}

/// A whole table at `at`, its checksum proven.
fn table(ram: &GuestRam, at: u64, signature: &[u8; 4]) -> Result<Vec<u8>, TestCaseError> {
    prop_assert!(AREA.contains(&at), "{signature:?} at {at:#x}");
    let length = u32_at(&read(ram, at, 36), 4);
    prop_assert!(length >= 36 && at + u64::from(length) <= AREA.end, "{signature:?} of {length} bytes");
    let bytes = read(ram, at, length as usize);
    prop_assert_eq!(&bytes[..4], signature);
    prop_assert_eq!(sum(&bytes), 0, "checksum of {:?}", signature);
    Ok(bytes)
}

fn slots() -> impl Strategy<Value = Vec<MmioDescription>> {
    let slot = (0usize..100, 0u64..0x1000, 5u32..24).prop_map(|(slot, page, gsi)| MmioDescription {
        slot,
        base: 0xd000_0000 + page * 0x1000,
        size: 0x1000,
        gsi,
    });
    proptest::collection::vec(slot, 0..40)
}

proptest! {
    #[test]
    fn tables_are_sound_for_every_machine(vcpus in 1u8..=32, slots in slots()) {
        let ram = ram();
        write_firmware_tables(&ram, &Platform { vcpus, slots: &slots }).unwrap();

        let rsdp = read(&ram, AREA.start, 36);
        prop_assert_eq!(&rsdp[..8], b"RSD PTR ");
        prop_assert_eq!((sum(&rsdp[..20]), sum(&rsdp)), (0, 0));
        let xsdt = table(&ram, u64_at(&rsdp, 24), b"XSDT")?;
        let pointers: Vec<u64> = xsdt[36..].chunks_exact(8).map(|chunk| u64_at(chunk, 0)).collect();
        prop_assert_eq!(pointers.len(), 2);
        let find = |signature: &[u8; 4]| {
            pointers.iter().copied().find(|at| read(&ram, *at, 4) == signature)
        };
        let fadt = table(&ram, find(b"FACP").unwrap(), b"FACP")?;
        prop_assert!(u32_at(&fadt, 112) & 1 << 20 != 0, "hardware-reduced");
        let dsdt = table(&ram, u64_at(&fadt, 140), b"DSDT")?;
        let madt = table(&ram, find(b"APIC").unwrap(), b"APIC")?;

        let (mut at, mut lapics, mut ioapics) = (44, Vec::new(), 0);
        while at < madt.len() {
            let length = usize::from(madt[at + 1]);
            prop_assert!(length >= 2 && at + length <= madt.len());
            match madt[at] {
                0 => lapics.push(madt[at + 3]),
                1 => ioapics += 1,
                _ => {}
            }
            at += length;
        }
        prop_assert_eq!(lapics, (0..vcpus).collect::<Vec<_>>());
        prop_assert_eq!(ioapics, 1);
        let count = |what: &[u8]| dsdt.windows(what.len()).filter(|bytes| *bytes == what).count();
        prop_assert_eq!(count(b"LNRO0005"), slots.len());
        prop_assert_eq!(count(b"_S5_"), 1);
    }

    #[test]
    fn tables_touch_nothing_outside_their_area(vcpus in 1u8..=32, slots in slots()) {
        let ram = ram();
        write_firmware_tables(&ram, &Platform { vcpus, slots: &slots }).unwrap();
        let all = read(&ram, 0, 2 << 20);
        let (start, end) = (usize::try_from(AREA.start).unwrap(), usize::try_from(AREA.end).unwrap());
        prop_assert!(all[..start].iter().chain(&all[end..]).all(|byte| *byte == FILL));
    }
}
