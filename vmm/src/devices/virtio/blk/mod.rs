//! Block device (virtio 1.2, 5.2) over a disk of one or several files.
//!
//! Rooms: `spec` what the guest sees, `device` the device and its handle, `request` one
//! request from chain to status, `metrics` counters.
//!
//! A slot exists before its disk does: an empty one has capacity 0, answers GET_ID, and every
//! other request with IOERR. [`BlkHandle::attach`] gives it a disk, at any time, once.
//!
//! Requests are served on the event-loop thread, synchronously and zero-copy. Nothing is in
//! flight between two calls, so there is no state to save beyond the queue's and the disk's, and between two
//! calls a disk can be captured ([`BlkHandle::switch`]).

mod device;
mod metrics;
mod request;
mod spec;
mod state;
#[cfg(test)]
mod tests;

pub use device::{AttachError, Blk, BlkHandle, CaptureError};
