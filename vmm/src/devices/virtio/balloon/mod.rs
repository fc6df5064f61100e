//! Memory balloon (virtio 1.2, 5.5): memory that the guest does not use goes back to the host.
//!
//! Two ways. *Free page reporting*: the driver tells of free memory by itself, some seconds after
//! it became free, and takes it again without asking. *The balloon*: the host sets a target, the
//! driver takes that many pages away from the guest, and gives them to the guest again when the
//! target falls or the guest would run out of memory (DEFLATE_ON_OOM).
//!
//! Rooms: `spec` what the guest sees, `device` the device and its handle, `pages` from a
//! driver's page numbers to ranges. [`crate::memory::Discard`] takes the pages out.
//!
//! Not offered: the statistics queue (the agent tells more), free page hinting (it is for
//! migration), page poisoning (a driver that poisons free pages then reports none).
//!
//! Work is done on the event-loop thread and nothing is in flight between two calls. What a saved
//! device consists of: the target, the driver's `actual`, the queues.

mod device;
mod pages;
mod spec;
mod state;
#[cfg(test)]
mod tests;

pub use device::{Balloon, BalloonHandle};
