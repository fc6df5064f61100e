//! The agent's log: lines on the console, which the VMM keeps in the sandbox's `console.log`.
//!
//! The console is a serial port, one exit of the VM per byte, so only what a person needs
//! after a failure is written.

use std::io::Write;

/// Writes one line. Failure to write is ignored: there is nowhere else to say it.
pub fn line(message: std::fmt::Arguments<'_>) {
    let text = format!("spore-agent: {message}\n");
    let _ = std::io::stderr().write_all(text.as_bytes());
}

/// `format!`-style shorthand for [`line`].
#[macro_export]
macro_rules! say {
    ($($arg:tt)*) => { $crate::console::line(format_args!($($arg)*)) };
}
