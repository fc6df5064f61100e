//! The Spore virtual machine monitor. `README.md` beside this crate holds the map: the
//! modules, the threads, the device slots, and what may import what.

pub mod api;
pub mod arch;
pub mod backend;
pub mod bus;
pub mod clock;
pub mod config;
pub mod control;
pub mod devices;
pub mod end;
pub mod fork;
pub mod log;
pub mod memory;
pub mod run;
pub mod snapshot;
pub mod vcpu;
pub mod vm;

pub use arch::DEFAULT_CMDLINE;
