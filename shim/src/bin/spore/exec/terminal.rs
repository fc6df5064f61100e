#![allow(unsafe_code)] // TIOCGWINSZ has no safe wrapper in nix 0.31.
//! The caller's terminal while the command has one of its own.

use std::io;

use nix::sys::termios::{SetArg, Termios, cfmakeraw, tcgetattr, tcsetattr};

use crate::failure::Failure;

/// The terminal passes every key on as it is. Ends with the value.
pub(super) struct RawMode {
    before: Termios,
}

impl RawMode {
    pub(super) fn enter() -> Result<Self, Failure> {
        let failed = |error: nix::Error| Failure::Host {
            operation: "make raw",
            path: "the terminal".into(),
            source: error.into(),
        };
        let before = tcgetattr(io::stdin()).map_err(failed)?;
        let mut raw = before.clone();
        cfmakeraw(&mut raw);
        tcsetattr(io::stdin(), SetArg::TCSANOW, &raw).map_err(failed)?;
        Ok(Self { before })
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        let _ = tcsetattr(io::stdin(), SetArg::TCSANOW, &self.before);
    }
}

/// Columns and rows of the terminal on standard output, or else on standard input.
pub(super) fn size() -> Option<(u32, u32)> {
    [libc::STDOUT_FILENO, libc::STDIN_FILENO].into_iter().find_map(|fd| {
        let mut size = libc::winsize { ws_row: 0, ws_col: 0, ws_xpixel: 0, ws_ypixel: 0 };
        // SAFETY: TIOCGWINSZ writes one winsize, which outlives the call.
        let done = unsafe { libc::ioctl(fd, libc::TIOCGWINSZ, &mut size) };
        (done == 0 && size.ws_col > 0).then(|| (size.ws_col.into(), size.ws_row.into()))
    })
}
