//! ACPI tables (ACPI 6.5): a hardware-reduced platform with nothing but what is here.
//!
//! * FADT: sleep and reset registers in port space; no PC timer, keyboard, CMOS clock, VGA.
//! * MADT: one local APIC per vCPU, one I/O APIC.
//! * DSDT: `_S5`, COM1, the virtio-mmio slots, a power button and the generation id, of which a press and a
//!   change arrive as interrupts of a generic event device.
//!
//! Interrupts are edge-triggered: an irqfd gives pulses. Slots share lines, and every handler
//! on a line runs for each pulse.

use acpi_tables::Aml;
use acpi_tables::aml::{
    Arg, Device, EISAName, Equal, IO, If, Interrupt, Memory32Fixed, Method, Name, Notify, Package, Path,
    ResourceTemplate, Scope,
};
use acpi_tables::fadt::{FADTBuilder, Flags, PmProfile};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use vm_memory::{Address, Bytes};

use super::{SetupError, layout};
use crate::devices::power;
use crate::memory::{Gpa, GuestRam};

/// Where the root pointer lies; the boot structures name it.
pub(super) const RSDP: u64 = layout::ACPI_TABLES.start;
const OEM: [u8; 6] = *b"SPORE ";
const OEM_TABLE: [u8; 8] = *b"SPOREVMM";
const REVISION: u32 = 1;
const FADT_REVISION_MINOR: u8 = 5;
/// FADT boot flags: no VGA, no message-signalled interrupts, no PCIe ASPM, no CMOS clock; and,
/// by being clear, no legacy devices and no keyboard controller.
const BOOT_ARCH: u16 = 1 << 2 | 1 << 3 | 1 << 4 | 1 << 5;
const IO_APIC_ID: u8 = 0;
const SDT_HEADER: u32 = 36;
const DSDT_REVISION: u8 = 6;
const SERIAL_LENGTH: u8 = 8;
/// The notification value of the power button's press and of a generation id's change.
const HAPPENED: u8 = 0x80;
const ONE: u8 = 1;

/// A virtio-mmio slot as the guest is told of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MmioDescription {
    /// Its number, which names it.
    pub slot: usize,
    pub base: u64,
    pub size: u64,
    pub gsi: u32,
}

/// The machine to describe.
#[derive(Debug)]
pub struct Platform<'a> {
    pub vcpus: u8,
    pub slots: &'a [MmioDescription],
}

/// Writes all tables into guest memory, the root pointer at its fixed address.
pub fn write_firmware_tables(ram: &GuestRam, platform: &Platform<'_>) -> Result<(), SetupError> {
    let bytes = build(platform, RSDP);
    let memory = |source| SetupError::Memory { what: "the ACPI tables", source };
    ram.write_slice(&bytes, Gpa::new(RSDP)).map_err(memory)
}

fn bytes_of(table: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    table.to_aml_bytes(&mut bytes);
    bytes
}

/// All tables for the address `base`, root pointer first.
fn build(platform: &Platform<'_>, base: u64) -> Vec<u8> {
    const ALIGN: usize = 16;
    let mut blob = vec![0; Rsdp::len().next_multiple_of(ALIGN)];
    let mut place = |table: Vec<u8>| {
        let address = base + blob.len() as u64;
        blob.extend_from_slice(&table);
        blob.resize(blob.len().next_multiple_of(ALIGN), 0);
        address
    };
    let dsdt = place(dsdt(platform));
    let fadt = place(fadt(dsdt));
    let madt = place(madt(platform));
    let mut xsdt = XSDT::new(OEM, OEM_TABLE, REVISION);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    let xsdt = place(bytes_of(&xsdt));
    let root = bytes_of(&Rsdp::new(OEM, xsdt));
    for (to, from) in blob.iter_mut().zip(root) {
        *to = from;
    }
    blob
}

fn port(offset: u16) -> GAS {
    let address = u64::from(layout::POWER_PORT + offset);
    GAS::new(AddressSpace::SystemIo, 8, 0, AccessSize::ByteAccess, address)
}

fn fadt(dsdt: u64) -> Vec<u8> {
    let mut fadt = FADTBuilder::new(OEM, OEM_TABLE, REVISION)
        .dsdt_64(dsdt)
        .preferred_pm_profile(PmProfile::EnterpriseServer)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::ResetRegSup)
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton)
        .flag(Flags::Headless);
    fadt.fadt_minor_version = FADT_REVISION_MINOR;
    fadt.iapc_boot_arch = BOOT_ARCH.into();
    fadt.sleep_control_reg = port(power::SLEEP_CONTROL);
    fadt.sleep_status_reg = port(power::SLEEP_STATUS);
    fadt.reset_reg = port(power::RESET);
    fadt.reset_value = power::RESET_VALUE;
    fadt.hypervisor_vendor_identity = u64::from_le_bytes(*b"SPORE\0\0\0").into();
    bytes_of(&fadt.finalize())
}

fn madt(platform: &Platform<'_>) -> Vec<u8> {
    let address = LocalInterruptController::Address(layout::LOCAL_APIC);
    let mut madt = MADT::new(OEM, OEM_TABLE, REVISION, address);
    for index in 0..platform.vcpus {
        madt.add_structure(ProcessorLocalApic::new(index, index, EnabledStatus::Enabled));
    }
    madt.add_structure(IoApic::new(IO_APIC_ID, layout::IO_APIC, 0));
    bytes_of(&madt)
}

fn dsdt(platform: &Platform<'_>) -> Vec<u8> {
    let mut body = bytes_of(&Name::new("_S5_".into(), &Package::new(vec![&power::SLEEP_TYPE_S5])));
    let mut devices = [serial(), power_button(), generation_id(), events()].concat();
    for slot in platform.slots {
        devices.extend(virtio_slot(slot));
    }
    body.extend(Scope::raw("\\_SB_".into(), devices));
    let mut table = Sdt::new(*b"DSDT", SDT_HEADER, DSDT_REVISION, OEM, OEM_TABLE, REVISION);
    table.append_slice(&body);
    table.as_slice().to_vec()
}

/// An edge-triggered, active-high line.
fn interrupt(gsi: u32, shared: bool) -> Interrupt {
    Interrupt::new(true, true, false, shared, gsi)
}

fn serial() -> Vec<u8> {
    bytes_of(&Device::new(
        "COM1".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0501")),
            &Name::new("_UID".into(), &1u8),
            &Name::new(
                "_CRS".into(),
                &ResourceTemplate::new(vec![
                    &interrupt(layout::SERIAL_GSI, false),
                    &IO::new(layout::SERIAL_PORT, layout::SERIAL_PORT, 1, SERIAL_LENGTH),
                ]),
            ),
        ],
    ))
}

fn power_button() -> Vec<u8> {
    bytes_of(&Device::new(
        "PWRB".into(),
        vec![&Name::new("_HID".into(), &EISAName::new("PNP0C0C")), &Name::new("_UID".into(), &0u8)],
    ))
}

/// Microsoft's "Virtual Machine Generation ID" has its names and `ADDR`: the low and the high half of an address.
fn generation_id() -> Vec<u8> {
    // The layout puts it below a MiB.
    let address = u32::try_from(layout::GENERATION_ID).unwrap_or(0);
    bytes_of(&Device::new(
        "VGEN".into(),
        vec![
            &Name::new("_HID".into(), &"SPOR0001"),
            &Name::new("_CID".into(), &"VM_Gen_Counter"),
            &Name::new("_DDN".into(), &"VM_Gen_Counter"),
            &Name::new("_UID".into(), &0u8),
            &Name::new("ADDR".into(), &Package::new(vec![&address, &0u32])),
        ],
    ))
}

/// The event device: what happened to which (5.6.9).
fn events() -> Vec<u8> {
    let [button, generation] = ["PWRB", "VGEN"].map(Path::new);
    let happened = |device| Notify::new(device, &HAPPENED);
    let (pressed, changed) = (happened(&button), happened(&generation));
    bytes_of(&Device::new(
        "GED_".into(),
        vec![
            &Name::new("_HID".into(), &"ACPI0013"),
            &Name::new("_UID".into(), &0u8),
            &Name::new(
                "_CRS".into(),
                &ResourceTemplate::new(vec![
                    &interrupt(layout::POWER_BUTTON_GSI, false),
                    &interrupt(layout::GENERATION_ID_GSI, false),
                ]),
            ),
            &Method::new(
                "_EVT".into(),
                1,
                true,
                vec![
                    &If::new(&Equal::new(&Arg(0), &layout::POWER_BUTTON_GSI), vec![&pressed]),
                    &If::new(&Equal::new(&Arg(0), &layout::GENERATION_ID_GSI), vec![&changed]),
                ],
            ),
        ],
    ))
}

fn virtio_slot(slot: &MmioDescription) -> Vec<u8> {
    // The hole lies below 4 GiB, so both fit; the layout's tests hold that.
    let (base, size) = (u32::try_from(slot.base).unwrap_or(0), u32::try_from(slot.size).unwrap_or(0));
    bytes_of(&Device::new(
        format!("V{:03}", slot.slot).as_str().into(),
        vec![
            &Name::new("_HID".into(), &"LNRO0005"),
            &Name::new("_UID".into(), &slot.slot),
            &Name::new("_CCA".into(), &ONE),
            &Name::new(
                "_CRS".into(),
                &ResourceTemplate::new(vec![
                    &Memory32Fixed::new(true, base, size),
                    &interrupt(slot.gsi, true),
                ]),
            ),
        ],
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::{RamLayout, map};

    const BASE: u64 = RSDP;

    fn platform(slots: &[MmioDescription]) -> Vec<u8> {
        build(&Platform { vcpus: 4, slots }, BASE)
    }

    fn slots() -> Vec<MmioDescription> {
        (0..28)
            .map(|slot| MmioDescription {
                slot,
                base: 0xd000_0000 + slot as u64 * 0x1000,
                size: 0x1000,
                gsi: 6,
            })
            .collect()
    }

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    fn u32_at(bytes: &[u8], at: usize) -> u32 {
        u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
    }

    fn u64_at(bytes: &[u8], at: usize) -> u64 {
        u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
    }

    /// The table at guest address `address`, its length and checksum checked.
    fn table(blob: &[u8], address: u64, signature: &[u8; 4]) -> Vec<u8> {
        let at = usize::try_from(address - BASE).unwrap();
        let length = u32_at(blob, at + 4) as usize;
        let table = blob[at..at + length].to_vec();
        assert_eq!(&table[..4], signature);
        assert_eq!(sum(&table), 0, "checksum of {signature:?}");
        table
    }

    fn walk(blob: &[u8]) -> (Vec<u8>, Vec<u8>, Vec<u8>) {
        assert_eq!(&blob[..8], b"RSD PTR ");
        assert_eq!((sum(&blob[..20]), sum(&blob[..36]), blob[15]), (0, 0, 2));
        let xsdt = table(blob, u64_at(blob, 24), b"XSDT");
        assert_eq!(xsdt.len(), 36 + 2 * 8);
        let fadt = table(blob, u64_at(&xsdt, 36), b"FACP");
        let madt = table(blob, u64_at(&xsdt, 44), b"APIC");
        let dsdt = table(blob, u64_at(&fadt, 140), b"DSDT");
        (fadt, madt, dsdt)
    }

    #[test]
    fn tables_hang_together() {
        let (fadt, madt, dsdt) = walk(&platform(&slots()));
        assert_eq!((fadt.len(), fadt[8], fadt[131]), (276, 6, 5), "length and revision 6.5");
        let flags = u32_at(&fadt, 112);
        assert_eq!(flags >> 20 & 1, 1, "hardware-reduced");
        assert_eq!(flags >> 10 & 1, 1, "reset register");
        assert_eq!(flags >> 4 & 1, 1, "the power button is a control method");
        assert_eq!((fadt[116], u64_at(&fadt, 120), fadt[128]), (1, 0x602, power::RESET_VALUE));
        assert_eq!((fadt[244], u64_at(&fadt, 248)), (1, 0x600), "sleep control");
        assert_eq!((fadt[256], u64_at(&fadt, 260)), (1, 0x601), "sleep status");
        assert_eq!(u32_at(&madt, 36), layout::LOCAL_APIC);
        assert_eq!(madt.len(), 44 + 4 * 8 + 12);
        let apics: Vec<_> = madt[44..76].chunks(8).map(|c| (c[0], c[2], c[3], c[4])).collect();
        assert_eq!(apics, [(0, 0, 0, 1), (0, 1, 1, 1), (0, 2, 2, 1), (0, 3, 3, 1)]);
        assert_eq!((madt[76], u32_at(&madt, 80), u32_at(&madt, 84)), (1, layout::IO_APIC, 0));
        let count = |needle: &[u8]| dsdt.windows(needle.len()).filter(|w| *w == needle).count();
        assert_eq!(count(b"LNRO0005"), 28);
        assert_eq!(count(b"ACPI0013"), 1);
        assert_eq!(count(b"_S5_"), 1);
        assert_eq!(count(b"VM_Gen_Counter\0"), 2);
        let address = [b"ADDR\x12\x08\x02\x0c".as_slice(), &0xf_f000u32.to_le_bytes(), &[0]].concat();
        assert_eq!(count(&address), 1);
        assert_eq!(count(b"V027"), 1);
        assert_eq!(count(&0xd001_b000u32.to_le_bytes()), 1, "the last slot's address");
    }

    #[test]
    fn tables_fit_their_area() {
        let ram = map(&RamLayout::around(64 << 20, layout::HOLE)).unwrap();
        let slots = slots();
        write_firmware_tables(&ram, &Platform { vcpus: 32, slots: &slots }).unwrap();
        let size = build(&Platform { vcpus: 32, slots: &slots }, BASE).len() as u64;
        assert!(size <= layout::ACPI_TABLES.end - layout::ACPI_TABLES.start, "{size} bytes");
    }
}
