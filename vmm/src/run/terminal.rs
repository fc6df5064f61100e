//! The user's terminal in raw mode, put back as it was on every way out.

use std::io;

use nix::sys::termios::{SetArg, Termios, cfmakeraw, tcgetattr, tcsetattr};

/// Raw mode for as long as it lives.
#[derive(Debug)]
pub(super) struct RawTerminal(Termios);

impl RawTerminal {
    /// None when standard input is no terminal.
    pub(super) fn new() -> io::Result<Option<Self>> {
        let before = match tcgetattr(io::stdin()) {
            Ok(before) => before,
            Err(nix::Error::ENOTTY | nix::Error::EINVAL | nix::Error::ENODEV) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        let mut raw = before.clone();
        cfmakeraw(&mut raw);
        tcsetattr(io::stdin(), SetArg::TCSANOW, &raw)?;
        Ok(Some(Self(before)))
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        // Nothing better can be done when a terminal that was ours a moment ago is not.
        let _ = tcsetattr(io::stdin(), SetArg::TCSANOW, &self.0);
    }
}
