//! The VMM's log: one line per event on stderr, which the shim collects.
//!
//! `spore-vmm <level> <component>: <message>`, written with a single `write(2)` so that lines
//! of several threads do not mix. A failure to write is ignored: there is nowhere to say so.

use std::fmt;
use std::io::Write;
use std::sync::atomic::{AtomicU64, Ordering};

fn line(level: &str, component: &str, message: fmt::Arguments<'_>) {
    let mut text = format!("spore-vmm {level} {component}: {message}").replace('\n', " ");
    text.push('\n');
    let _ = std::io::stderr().write_all(text.as_bytes());
}

/// Something the operator may want to know.
pub fn info(component: &str, message: fmt::Arguments<'_>) {
    line("info", component, message);
}

/// Something is wrong, and the VM goes on.
pub fn warn(component: &str, message: fmt::Arguments<'_>) {
    line("warn", component, message);
}

/// Something failed.
pub fn error(component: &str, message: fmt::Arguments<'_>) {
    line("error", component, message);
}

/// A warning that the guest can provoke at will: the 1st, 2nd, 4th, 8th … occurrence is
/// logged, with the count. One for each kind of warning: what shares one hides each other.
#[derive(Debug, Default)]
pub struct Limited(AtomicU64);

impl Limited {
    pub const fn new() -> Self {
        Self(AtomicU64::new(0))
    }

    pub fn warn(&self, component: &str, message: fmt::Arguments<'_>) {
        let count = self.0.fetch_add(1, Ordering::Relaxed).wrapping_add(1);
        if count == 1 {
            line("warn", component, message);
        } else if count.is_power_of_two() {
            line("warn", component, format_args!("{message} ({count} times)"));
        }
    }
}
