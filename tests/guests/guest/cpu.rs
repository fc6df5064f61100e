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

/// Fills all vector registers, says `!`, waits for a byte on the serial line, which it leaves there, and fails unless the
/// registers are as they were.
pub fn keep_vectors() -> Result<(), &'static str> {
    let before: [[u64; 2]; 16] = core::array::from_fn(|n| [0x0123_4567_89ab_cdef ^ n as u64, !(n as u64)]);
    let mut after = [[0u64; 2]; 16];
    // SAFETY: as in `call`; the buffers are ours, of 16 registers of 16 bytes each.
    unsafe {
        asm!(
            "movups xmm0, [r12]", "movups xmm1, [r12+16]", "movups xmm2, [r12+32]", "movups xmm3, [r12+48]",
            "movups xmm4, [r12+64]", "movups xmm5, [r12+80]", "movups xmm6, [r12+96]", "movups xmm7, [r12+112]",
            "movups xmm8, [r12+128]", "movups xmm9, [r12+144]", "movups xmm10, [r12+160]", "movups xmm11, [r12+176]",
            "movups xmm12, [r12+192]", "movups xmm13, [r12+208]", "movups xmm14, [r12+224]", "movups xmm15, [r12+240]",
            "mov eax, 0", "mov edi, 0x3f8", "mov esi, 33", "ud2",
            "2:", "mov eax, 1", "mov edi, 0x3fd", "ud2", "test al, 1", "jz 2b",
            "movups [r13], xmm0", "movups [r13+16], xmm1", "movups [r13+32], xmm2", "movups [r13+48], xmm3",
            "movups [r13+64], xmm4", "movups [r13+80], xmm5", "movups [r13+96], xmm6", "movups [r13+112], xmm7",
            "movups [r13+128], xmm8", "movups [r13+144], xmm9", "movups [r13+160], xmm10", "movups [r13+176], xmm11",
            "movups [r13+192], xmm12", "movups [r13+208], xmm13", "movups [r13+224], xmm14", "movups [r13+240], xmm15",
            in("r12") before.as_ptr(), in("r13") after.as_mut_ptr(),
            out("rax") _, out("rdi") _, out("rsi") _, out("rdx") _, out("rcx") _, out("r8") _, out("r9") _,
            out("xmm0") _, out("xmm1") _, out("xmm2") _, out("xmm3") _, out("xmm4") _, out("xmm5") _,
            out("xmm6") _, out("xmm7") _, out("xmm8") _, out("xmm9") _, out("xmm10") _, out("xmm11") _,
            out("xmm12") _, out("xmm13") _, out("xmm14") _, out("xmm15") _,
        );
    }
    if before == after { Ok(()) } else { Err("vector registers have changed") }
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
