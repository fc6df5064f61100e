//! Starts the other CPUs and reports who they say they are.

use crate::{cpu, say};

const TRAMPOLINE: u64 = 0x8000;

unsafe extern "C" {
    static trampoline: u8;
    static trampoline_end: u8;
    static ap_online: u32;
    static ap_records: [[u32; 4]; 64];
}

fn online() -> u32 {
    // SAFETY: a counter that the other CPUs raise in boot.S.
    unsafe { (&raw const ap_online).read_volatile() }
}

/// Starts `expected` CPUs in all, this one included, and prints each one's identity.
pub fn start(expected: u32) {
    // SAFETY: the trampoline is position-independent up to its far jump; page 8 of low
    // memory holds nothing of the VMM's that is needed after entry.
    unsafe {
        let length = &raw const trampoline_end as usize - &raw const trampoline as usize;
        core::ptr::copy_nonoverlapping(&raw const trampoline, TRAMPOLINE as *mut u8, length);
    }
    cpu::start_others(TRAMPOLINE);
    while online() + 1 < expected {
        cpu::relax();
    }
    let first = cpu::cpuid(1, 0);
    let core = cpu::cpuid(0xb, 1);
    say_cpu([first[1], first[3], cpu::cpuid(0xb, 0)[3], core[1]]);
    for index in 0..online() as usize {
        // SAFETY: record `index` was complete before the counter rose above it, save for
        // CPUs that raced each other, whose records were claimed earlier still.
        say_cpu(unsafe { (&raw const ap_records).cast::<[u32; 4]>().add(index).read_volatile() });
    }
    say!("online={}", online() + 1);
}

fn say_cpu([ebx, edx, x2apic, cores]: [u32; 4]) {
    say!(
        "cpu apic={} x2apic={} logical={} htt={} cores={}",
        ebx >> 24,
        x2apic,
        ebx >> 16 & 0xff,
        edx >> 28 & 1,
        cores & 0xffff
    );
}
