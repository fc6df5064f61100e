#![no_std]
#![no_main]
//! A bare-metal guest for the VMM's own tests.
//!
//! It boots as Linux does, runs the commands that its kernel command line gives after
//! `guest=`, each with comma-separated arguments, joined by `;`, and prints what it finds.
//! Each command ends with `ok NAME` or `failed NAME: why`; after the last one, or a
//! failure, the guest powers itself off. Boundary: ours alone, no operating system below,
//! no allocator, no floating point; CPL0 is `boot.S`.

use core::arch::global_asm;
use core::panic::PanicInfo;

mod acpi;
mod commands;
mod cpu;
mod memory;
#[path = "../src/pattern.rs"]
mod pattern;
mod power;
mod serial;
mod services;
mod smp;
mod virtio;

global_asm!(include_str!("boot.S"), options(att_syntax));

#[unsafe(no_mangle)]
extern "C" fn guest_main(boot_params: *const u8) -> ! {
    let boot = memory::BootParams(boot_params);
    power::set_rsdp(boot.rsdp());
    say!("guest: up");
    let script = boot.cmdline().split(' ').find_map(|word| word.strip_prefix("guest=")).unwrap_or("");
    let mut machine = commands::Machine::new(boot);
    for command in script.split(';').filter(|command| !command.is_empty()) {
        if !machine.run(command) {
            break;
        }
    }
    power::off()
}

#[unsafe(no_mangle)]
extern "C" fn guest_fault(vector: u64, error: u64, rip: u64, address: u64) -> ! {
    say!("guest: exception {vector} error={error:#x} rip={rip:#x} cr2={address:#x}");
    cpu::triple_fault()
}

#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    say!("guest: {info}");
    cpu::triple_fault()
}

/// Named by the unwinding tables of `core`, which this image discards.
#[unsafe(no_mangle)]
extern "C" fn rust_eh_personality() {}
