//! libcontainer, at arm's length.
//!
//! libcontainer forks and goes on running Rust in the child, which is sound only in a
//! process with one thread. The server therefore starts its own binary once per container
//! as a helper ([`HELPER_COMMAND`]), asks it to create, later to start, and lets it go. The container's
//! init is cloned with CLONE_PARENT, so it is PID 1's own child from the first moment and
//! the reaper gets its status whatever becomes of the helper.
//!
//! A further process in a container is our own work ([`exec`]), in a helper of its own for the
//! same reason: libcontainer's way drops the container's seccomp filter.
//!
//! * [`protocol`]: the requests and their answers, on a SEQPACKET socket pair.
//! * [`client`]: the server's side.
//! * [`helper`]: the helper's side, with [`executor`] (runs in the container's init),
//!   [`lookup`] (finds the executable as runc does) and [`trace`] (keeps libcontainer's error
//!   log for the error message).

pub mod client;
pub mod exec;
pub mod executor;
pub mod helper;
pub mod lookup;
pub mod protocol;
pub mod trace;

/// First argument of the helper process.
pub const HELPER_COMMAND: &str = "oci-runtime";

/// An error and its causes in one line.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let next = error.to_string();
        if !text.ends_with(&next) {
            text = format!("{text}: {next}");
        }
        cause = error.source();
    }
    text
}
