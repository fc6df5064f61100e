//! Socket device (virtio 1.2, 5.10), answered in user space: guest streams end in Unix
//! sockets of the host.
//!
//! Rooms: `spec` what the guest sees, `device` the three virtqueues, `muxer` all connections,
//! `connection` one of them with its credit and half-closes, `table` where they are kept,
//! `metrics` counters.
//!
//! Host → guest: a client connects to the listener, says `CONNECT <port>\n`, and reads
//! `OK <host port>\n` once the guest has accepted; a refusal closes the connection. Guest →
//! host: only to the ports given, each connection one end of a socket pair.
//!
//! Bytes for the guest are read from the Unix socket straight into its receive buffers, when
//! it has both buffers and credit; until then they wait in the socket. Bytes from the guest
//! are sent straight from its memory; what the socket does not take waits in a buffer no
//! larger than the credit given. So a peer that stands still holds up its own connection
//! only. Connections that have something for the guest take turns, one packet each.
//!
//! The packet type of the `virtio-vsock` crate is not used: it admits at most two descriptors
//! per packet, and Linux 6.7 and later send a payload in many. Connections do not survive a
//! restore (DESIGN 4), so there is no state to save.

mod connection;
mod device;
mod metrics;
mod muxer;
mod spec;
mod table;
#[cfg(test)]
mod tests;

pub use device::{Vsock, VsockError, VsockHandle};
