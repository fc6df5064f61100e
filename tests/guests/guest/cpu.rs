//! The privileged calls of `boot.S`, device registers, and interrupts.

use core::arch::asm;

/// One call into the CPL0 half.
fn call(number: u64, a: u64, b: u64, c: u64) -> u64 {
    let result;
    // SAFETY: `ud2` traps into boot.S, which clobbers what is listed here and returns to
    // the next instruction. Memory is touched only where a call's own wrapper says so.
    unsafe {
        asm!("ud2", inlateout("rax") number => result, inlateout("rdi") a => _, inlateout("rsi") b => _,
             inlateout("rdx") c => _, lateout("rcx") _, lateout("r8") _, lateout("r9") _);
    }
    result
}

pub fn out8(port: u16, value: u8) {
    call(0, port.into(), value.into(), 0);
}

pub fn in8(port: u16) -> u8 {
    call(1, port.into(), 0, 0) as u8
}

pub fn read_msr(msr: u32) -> u64 {
    call(2, msr.into(), 0, 0)
}

pub fn cpuid(leaf: u32, subleaf: u32) -> [u32; 4] {
    let mut registers = [0u32; 4];
    call(4, leaf.into(), subleaf.into(), registers.as_mut_ptr() as u64);
    registers
}

/// Interrupts off, halted for ever.
pub fn hang() -> ! {
    call(5, 0, 0, 0);
    loop {}
}

pub fn triple_fault() -> ! {
    call(7, 0, 0, 0);
    loop {}
}

/// String output: the VMM sees many bytes in one exit.
pub fn out_bytes(port: u16, bytes: &[u8]) {
    call(8, port.into(), bytes.as_ptr() as u64, bytes.len() as u64);
}

/// Runs whatever stands at `address`, at CPL0.
pub fn jump(address: u64) -> ! {
    call(9, address, 0, 0);
    hang()
}

pub fn relax() {
    core::hint::spin_loop();
}

/// Reads a device register with one plain load, which every KVM can emulate.
pub fn mmio_read(address: u64) -> u32 {
    let value;
    // SAFETY: `address` is a device register in the identity map.
    unsafe { asm!("mov {0:e}, dword ptr [{1}]", out(reg) value, in(reg) address) };
    value
}

pub fn mmio_write(address: u64, value: u32) {
    // SAFETY: as above; memory that the device reads is written before (no `nomem`).
    unsafe { asm!("mov dword ptr [{1}], {0:e}", in(reg) value, in(reg) address) };
}

const IOAPIC: u64 = 0xfec0_0000;
const LAPIC: u64 = 0xfee0_0000;
const FIRST_VECTOR: u32 = 32;

unsafe extern "C" {
    static mut interrupts: u32;
}

/// Lets the I/O APIC's input `gsi` interrupt this CPU as line 0..=15.
pub fn route(gsi: u32, line: u32) {
    mmio_write(LAPIC + 0xf0, 0x1ff);
    let apic_id = mmio_read(LAPIC + 0x20);
    mmio_write(IOAPIC, 0x10 + 2 * gsi + 1);
    mmio_write(IOAPIC + 0x10, apic_id);
    mmio_write(IOAPIC, 0x10 + 2 * gsi);
    mmio_write(IOAPIC + 0x10, FIRST_VECTOR + line);
}

/// Halts until an interrupt of `line` has arrived, and forgets it.
pub fn wait_interrupt(line: u32) {
    loop {
        let word = &raw mut interrupts;
        // SAFETY: boot.S writes this word only inside call 6, on this CPU.
        unsafe {
            if word.read_volatile() & (1 << line) != 0 {
                word.write_volatile(word.read_volatile() & !(1 << line));
                return;
            }
        }
        call(6, 0, 0, 0);
    }
}

/// Sends the start-up sequence to every other CPU.
pub fn start_others(page: u64) {
    mmio_write(LAPIC + 0xf0, 0x1ff);
    mmio_write(LAPIC + 0x300, 0x000c_4500);
    mmio_write(LAPIC + 0x300, 0x000c_4600 | (page >> 12) as u32);
}
