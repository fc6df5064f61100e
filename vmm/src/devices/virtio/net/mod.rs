//! Network device (virtio 1.2, 5.1) on a tap: one pair of queues, checksum and segmentation
//! offloads end to end, mergeable receive buffers, link state.
//!
//! Rooms: `spec` what the guest sees, `device` the device, `slot` what it shares with the handle that
//! the control plane holds, `receive` frames to the guest, `transmit` frames from it, `turn` what a call may use, `limiter` rates.
//!
//! A slot exists before its tap does: the link is down, and what the guest sends is dropped.
//! [`NetHandle::attach`] gives it a tap, at any time, [`NetHandle::detach`] takes and closes it.
//!
//! Frames go between guest memory and the tap in one system call each, header included, without a
//! copy, on the event-loop thread. Nothing is dropped for want of room: without receive buffers the tap
//! is not read until the guest gives some, and a tap that takes no more is waited for. A frame
//! that is malformed is dropped, counted and logged, rate-limited; a queue that is broken costs the device a reset.
//!
//! While the event loop does not run the device, no frame moves, and the rest is between two calls: what
//! a saved device consists of is the queues' indices, less the receive chains that are popped and
//! not used yet, and the tap's end of a frame that has arrived in part (`receive`), if there is one.

mod device;
mod limiter;
mod receive;
mod slot;
mod spec;
#[cfg(test)]
mod tests;
mod transmit;
mod turn;

pub use device::Net;
pub use slot::{AttachError, NetHandle};
