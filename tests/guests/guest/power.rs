//! How the guest ends, by the registers that ACPI names.

use crate::acpi::Tables;
use crate::{cpu, say};
use core::sync::atomic::{AtomicU64, Ordering};

static RSDP: AtomicU64 = AtomicU64::new(0);

pub fn set_rsdp(rsdp: u64) {
    RSDP.store(rsdp, Ordering::Relaxed);
}

/// Enters S5 through the sleep control register (ACPI 6.5, section 4.8.3.7).
pub fn off() -> ! {
    match Tables::find(RSDP.load(Ordering::Relaxed)) {
        Ok(tables) => {
            if let (Some(port), Some(kind)) = (tables.sleep_control(), tables.s5_type()) {
                cpu::out8(port, kind << 2 | 1 << 5);
            } else {
                say!("power: no sleep control register or no _S5");
            }
        }
        Err(why) => say!("power: {why}"),
    }
    cpu::hang()
}

pub fn reset() -> ! {
    match Tables::find(RSDP.load(Ordering::Relaxed)) {
        Ok(tables) => match tables.reset() {
            Some((port, value)) => cpu::out8(port, value),
            None => say!("power: no reset register"),
        },
        Err(why) => say!("power: {why}"),
    }
    cpu::hang()
}

/// A guest that saw something wrong: end at once, so that the test need not wait.
pub fn fail() -> ! {
    say!("guest: failed");
    cpu::triple_fault()
}
