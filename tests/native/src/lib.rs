//! The VMM's own tests: the real `spore-vmm` binary, driven over its control socket, runs
//! the bare-metal guests of `tests/guests` on the host's own KVM.
//!
//! Purpose: everything of the VMM that needs no Linux in the guest, at native speed, on any
//! KVM (TESTBED.md, second ground). Boundary: the VMM is a black box behind `api`; this
//! crate holds what the tests share, the tests themselves are in `tests/`, one behaviour
//! each. Nothing sleeps: every wait is for an event and has a deadline ([`DEADLINE`]).

#![allow(clippy::expect_used)] // The tests' own support: a panic is how a test fails.

mod console;
pub mod control;
pub mod host;
pub mod process;
mod setup;
mod snapshot;
pub mod tap;
mod vm;
pub mod vsock;
mod zygote;

use std::time::Duration;

pub use console::Console;
pub use setup::{Setup, disk_file, file_with};
pub use snapshot::{Pending, Restore, Saved, empty_file};
pub use vm::Vm;
pub use zygote::Zygote;

/// How long a test waits for anything. Generous: the machine may be busy, and a passing
/// test never waits for it.
pub const DEADLINE: Duration = Duration::from_secs(60);
