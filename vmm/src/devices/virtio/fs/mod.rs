//! File system device (virtio 1.2, 5.11): FUSE messages between a virtqueue and the sockets of
//! a file server.
//!
//! Rooms: `spec` what the guest sees, `device` the device and its handle, `connection` one
//! socket and the one message that is under way on it, `state` what is saved.
//!
//! The device knows nothing of files. A request goes out on an idle socket as the guest wrote
//! it, only that the length in its header is made the true one; the server answers every
//! request, also those that FUSE leaves unanswered, with exactly one message, whose header
//! says its length. So there is no framing beside FUSE's own, and nothing to tell replies
//! apart by: a socket carries one request at a time, and the number of sockets is the number
//! of requests in flight.
//!
//! Without a server every request is answered with ENOTCONN; what a server that goes away
//! leaves unanswered, with EIO. Bytes go from and to guest memory without a copy, never
//! blocking, on the event-loop thread.
//!
//! Saved are the queues, and whether there was a server: in a pause what was asked is answered first, so no request
//! is under way, and those that wait in a queue are the restored device's. A guest that had a server is not
//! resumed without one, which would answer its open files with ENOTCONN: the VM asks
//! [`FsHandle::awaits_server`].

mod connection;
mod device;
mod spec;
mod state;
#[cfg(test)]
mod tests;

pub use device::{AttachError, Fs, FsHandle};
