//! What the `spore` command and the shim say to each other: a ttrpc service (`proto/spore/shim/v1`) on the socket of the
//! Task service, beside the guest's Files, which the shim relays.

// Generated code keeps its generator's habits.
#[allow(
    clippy::all,
    clippy::pedantic,
    clippy::unwrap_used,
    clippy::expect_used,
    rust_2018_idioms,
    unreachable_pub,
    missing_docs
)]
pub mod v1 {
    include!(concat!(env!("OUT_DIR"), "/mod.rs"));
}
