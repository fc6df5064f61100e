//! Registers of a vCPU: the state in which the boot processor enters the kernel, and a dump
//! for error messages.

use std::fmt::Write;

use kvm_bindings::{kvm_fpu, kvm_regs, kvm_segment};
use kvm_ioctls::VcpuFd;
use vm_memory::{Address, Bytes};

use super::{SetupError, kvm_error, layout};
use crate::memory::{Gpa, GuestRam};

/// Where and how the boot processor enters the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Entry {
    /// The 64-bit Linux boot protocol: long mode, identity map, RSI at the zero page.
    Linux64 { rip: u64 },
    /// PVH: 32-bit protected mode without paging, EBX at the start info.
    Pvh { rip: u64 },
}

const CR0_PE: u64 = 1;
const CR0_MP: u64 = 1 << 1;
const CR0_ET: u64 = 1 << 4;
const CR0_NE: u64 = 1 << 5;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
const RFLAGS_RESERVED: u64 = 1 << 1;

const SEGMENT_CODE: u8 = 0xb;
const SEGMENT_DATA: u8 = 0x3;
const SEGMENT_TSS_BUSY: u8 = 0xb;
/// `__BOOT_CS`, `__BOOT_DS` of the boot protocol, and a task segment after them.
const CODE_SELECTOR: u16 = 0x10;
const DATA_SELECTOR: u16 = 0x18;
const TSS_SELECTOR: u16 = 0x20;

const PAGE_PRESENT_WRITABLE: u64 = 3;
const PAGE_LARGE: u64 = 1 << 7;

fn segment(selector: u16, kind: u8, long: bool) -> kvm_segment {
    let system = kind == SEGMENT_TSS_BUSY && selector == TSS_SELECTOR;
    kvm_segment {
        base: 0,
        limit: if system { 0x67 } else { 0xffff_ffff },
        selector,
        type_: kind,
        present: 1,
        dpl: 0,
        db: u8::from(!long && !system),
        s: u8::from(!system),
        l: u8::from(long && !system),
        g: u8::from(!system),
        ..Default::default()
    }
}

/// The descriptor-table form of `segment`.
fn descriptor(s: &kvm_segment) -> u64 {
    let limit = u64::from(if s.g == 1 { s.limit >> 12 } else { s.limit });
    let flags = u64::from(s.type_)
        | u64::from(s.s) << 4
        | u64::from(s.dpl) << 5
        | u64::from(s.present) << 7
        | u64::from(s.l) << 13
        | u64::from(s.db) << 14
        | u64::from(s.g) << 15;
    limit & 0xffff | (s.base & 0xff_ffff) << 16 | flags << 40 | (limit >> 16 & 0xf) << 48 | s.base >> 24 << 56
}

/// Puts the boot processor at `entry` and writes the tables that it needs there.
pub(super) fn set_entry(vcpu: &VcpuFd, entry: &Entry, ram: &GuestRam) -> Result<(), SetupError> {
    let mut sregs = vcpu.get_sregs().map_err(kvm_error("reading segment registers"))?;
    let long = matches!(entry, Entry::Linux64 { .. });
    let code = segment(CODE_SELECTOR, SEGMENT_CODE, long);
    let data = segment(DATA_SELECTOR, SEGMENT_DATA, false);
    let task = segment(TSS_SELECTOR, SEGMENT_TSS_BUSY, false);
    let gdt = [0, 0, descriptor(&code), descriptor(&data), descriptor(&task)];
    write(ram, layout::GDT, &gdt, "the descriptor table")?;
    sregs.gdt.base = layout::GDT;
    sregs.gdt.limit = 8 * 5 - 1;
    sregs.idt.base = 0;
    sregs.idt.limit = 0;
    sregs.cs = code;
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.tr = task;
    sregs.cr0 = CR0_PE | CR0_MP | CR0_ET | CR0_NE;
    let mut regs = kvm_regs { rflags: RFLAGS_RESERVED, ..Default::default() };
    match *entry {
        Entry::Linux64 { rip } => {
            write_identity_map(ram)?;
            sregs.cr0 |= CR0_PG;
            sregs.cr3 = layout::PAGE_TABLES;
            sregs.cr4 |= CR4_PAE;
            sregs.efer |= EFER_LME | EFER_LMA;
            (regs.rip, regs.rsi) = (rip, layout::ZERO_PAGE);
            (regs.rsp, regs.rbp) = (layout::BOOT_STACK, layout::BOOT_STACK);
        }
        Entry::Pvh { rip } => {
            sregs.cr4 = 0;
            (regs.rip, regs.rbx) = (rip, layout::PVH_START_INFO);
        }
    }
    vcpu.set_sregs(&sregs).map_err(kvm_error("setting segment registers"))?;
    vcpu.set_regs(&regs).map_err(kvm_error("setting registers"))
}

/// Identity-maps the first 4 GiB in 2 MiB pages.
fn write_identity_map(ram: &GuestRam) -> Result<(), SetupError> {
    let page = |n: u64| layout::PAGE_TABLES + n * 0x1000;
    write(ram, page(0), &[page(1) | PAGE_PRESENT_WRITABLE], "page tables")?;
    let directories: [u64; 4] = std::array::from_fn(|i| page(2 + i as u64) | PAGE_PRESENT_WRITABLE);
    write(ram, page(1), &directories, "page tables")?;
    let entries: Vec<u64> = (0..2048).map(|i| i << 21 | PAGE_LARGE | PAGE_PRESENT_WRITABLE).collect();
    write(ram, page(2), &entries, "page tables")
}

fn write(ram: &GuestRam, address: u64, words: &[u64], what: &'static str) -> Result<(), SetupError> {
    let bytes: Vec<u8> = words.iter().flat_map(|w| w.to_le_bytes()).collect();
    ram.write_slice(&bytes, Gpa::new(address)).map_err(|source| SetupError::Memory { what, source })
}

/// The x87 and SSE control words as after FNINIT and reset.
pub(super) fn set_fpu(vcpu: &VcpuFd) -> Result<(), SetupError> {
    let fpu = kvm_fpu { fcw: 0x37f, mxcsr: 0x1f80, ..Default::default() };
    vcpu.set_fpu(&fpu).map_err(kvm_error("setting the FPU state"))
}

/// The delivery modes of virtual wire mode: LINT0 takes the PIC's interrupts, LINT1 is the NMI.
/// Masks stay as KVM has them at reset: LINT1's is set until the guest clears it.
pub(super) fn set_local_apic(vcpu: &VcpuFd) -> Result<(), SetupError> {
    const LVT_LINT0: usize = 0x350;
    const LVT_LINT1: usize = 0x360;
    const DELIVERY: i32 = 0x700;
    const EXTINT: i32 = 0x700;
    const NMI: i32 = 0x400;
    let mut lapic = vcpu.get_lapic().map_err(kvm_error("reading the local APIC"))?;
    for (offset, mode) in [(LVT_LINT0, EXTINT), (LVT_LINT1, NMI)] {
        let register = &mut lapic.regs[offset..offset + 4];
        let bytes: [i8; 4] = [register[0], register[1], register[2], register[3]];
        let value = i32::from_le_bytes(bytes.map(i8::cast_unsigned)) & !DELIVERY | mode;
        for (to, from) in register.iter_mut().zip(value.to_le_bytes()) {
            *to = from.cast_signed();
        }
    }
    vcpu.set_lapic(&lapic).map_err(kvm_error("setting the local APIC"))
}

/// A vCPU's registers on a few lines, for a person.
pub fn describe_registers(vcpu: &VcpuFd) -> String {
    let mut text = String::new();
    match vcpu.get_regs() {
        Ok(r) => {
            let _ = write!(
                text,
                "rip={:#x} rflags={:#x} rsp={:#x} rbp={:#x} rax={:#x} rbx={:#x} rcx={:#x} rdx={:#x} \
                 rsi={:#x} rdi={:#x} r8={:#x} r9={:#x} r10={:#x} r11={:#x} r12={:#x} r13={:#x} r14={:#x} r15={:#x}",
                r.rip,
                r.rflags,
                r.rsp,
                r.rbp,
                r.rax,
                r.rbx,
                r.rcx,
                r.rdx,
                r.rsi,
                r.rdi,
                r.r8,
                r.r9,
                r.r10,
                r.r11,
                r.r12,
                r.r13,
                r.r14,
                r.r15
            );
        }
        Err(error) => drop(write!(text, "registers unreadable: {error}")),
    }
    match vcpu.get_sregs() {
        Ok(s) => {
            let _ = write!(
                text,
                " cr0={:#x} cr2={:#x} cr3={:#x} cr4={:#x} efer={:#x} cs={:#x}/{:#x} ss={:#x} gdt={:#x} idt={:#x}",
                s.cr0,
                s.cr2,
                s.cr3,
                s.cr4,
                s.efer,
                s.cs.selector,
                s.cs.base,
                s.ss.selector,
                s.gdt.base,
                s.idt.base
            );
        }
        Err(error) => drop(write!(text, " segment registers unreadable: {error}")),
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_are_the_flat_ones() {
        assert_eq!(descriptor(&segment(CODE_SELECTOR, SEGMENT_CODE, true)), 0x00af_9b00_0000_ffff);
        assert_eq!(descriptor(&segment(CODE_SELECTOR, SEGMENT_CODE, false)), 0x00cf_9b00_0000_ffff);
        assert_eq!(descriptor(&segment(DATA_SELECTOR, SEGMENT_DATA, false)), 0x00cf_9300_0000_ffff);
        assert_eq!(descriptor(&segment(TSS_SELECTOR, SEGMENT_TSS_BUSY, false)), 0x0000_8b00_0000_0067);
    }

    #[test]
    fn identity_map_covers_four_gib() {
        let ram = GuestRam::from_ranges(&[(Gpa::new(0), 1 << 20)]).unwrap();
        write_identity_map(&ram).unwrap();
        for address in [0u64, 0x10_0000, 0x1234_5678, 0xd000_0000, 0xffff_ffff] {
            let mut table = layout::PAGE_TABLES;
            for shift in [39, 30] {
                let entry: u64 = ram.read_obj(Gpa::new(table + (address >> shift & 0x1ff) * 8)).unwrap();
                assert_eq!(entry & 0xfff, PAGE_PRESENT_WRITABLE);
                table = entry & !0xfff;
            }
            let entry: u64 = ram.read_obj(Gpa::new(table + (address >> 21 & 0x1ff) * 8)).unwrap();
            assert_eq!(entry, address & !0x1f_ffff | PAGE_LARGE | PAGE_PRESENT_WRITABLE);
        }
    }
}
