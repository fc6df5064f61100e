//! Standard streams of processes: pipes or a terminal on one side, vsock connections on
//! the other.
//!
//! A stream exists from Create to Delete, whether or not the shim has connected: what a
//! process writes waits in the pipe, which blocks it when full, as on any machine. A
//! stream takes one connection at a time. When a connection breaks before its stream has
//! ended, the stream waits for the next one, with the bytes that were not yet sent.
//!
//! * [`make`]: makes pipes and wires terminals.
//! * [`pump`]: moves bytes between two descriptors.
//! * [`streams`]: which streams there are and who is attached.
//! * [`listener`] accepts connections on `STDIO_PORT`.

pub mod listener;
pub mod make;
pub mod pump;
pub mod streams;
