//! The end of the guest.

use std::time::Duration;

use nix::sys::reboot::{RebootMode, reboot};

use crate::say;

/// What running processes get after the power button or a signal, before they are killed. The
/// VMM's own deadline ends a guest that takes longer than the host wants.
pub const BUTTON_GRACE: Duration = Duration::from_secs(3);

/// Powers the guest off: the VMM sees ACPI S5, an orderly end. Everything must have been
/// unmounted and synced.
pub fn off() -> ! {
    end(RebootMode::RB_POWER_OFF)
}

/// Resets the guest: the VMM takes it for what it is, a failure.
pub fn reset() -> ! {
    end(RebootMode::RB_AUTOBOOT)
}

fn end(mode: RebootMode) -> ! {
    match reboot(mode) {
        Ok(never) => match never {},
        Err(error) => say!("reboot: {error}"),
    }
    // PID 1 that exits makes the kernel panic, which the host sees too.
    std::process::exit(1)
}

/// A panic anywhere in PID 1 is printed and ends the guest: tokio would otherwise catch it
/// and leave a request unanswered for ever.
pub fn reset_on_panic() {
    std::panic::set_hook(Box::new(|panic| {
        say!("{panic}");
        nix::unistd::sync();
        reset();
    }));
}
