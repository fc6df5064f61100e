//! Host resources behind devices: disk files, Unix sockets, entropy. A backend knows
//! descriptors and slices of memory; it never sees virtqueues or registers.

pub mod disk;
pub mod entropy;
mod guest_io;
pub mod poller;
pub mod unix_socket;
