//! libcontainer, at arm's length.
//!
//! libcontainer forks and goes on running Rust in the child, which is sound only in a
//! process with one thread. The server therefore starts its own binary once per container
//! as a helper ([`HELPER_COMMAND`]), asks it to create, later to start, and lets it go. The container's
//! init is cloned with CLONE_PARENT, so it is PID 1's own child from the first moment and
//! the reaper gets its status whatever becomes of the helper.
//!
//! * [`protocol`]: the two requests and their answers, on a SEQPACKET socket pair.
//! * [`client`]: the server's side.
//! * [`helper`]: the helper's side, with [`executor`] (runs in the container's init),
//!   [`lookup`] (finds the executable as runc does) and [`trace`] (keeps libcontainer's error
//!   log for the error message).

pub mod client;
pub mod executor;
pub mod helper;
pub mod lookup;
pub mod protocol;
pub mod trace;

/// First argument of the helper process.
pub const HELPER_COMMAND: &str = "oci-runtime";
