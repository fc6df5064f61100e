//! Host resources behind devices: disk files, Unix sockets, taps, entropy. A backend knows
//! descriptors and slices of memory; it never sees virtqueues or registers.

pub mod disk;
pub mod entropy;
pub mod gate;
pub mod guest_buffers;
mod guest_io;
pub mod poller;
pub mod tap;
pub mod unix_socket;
