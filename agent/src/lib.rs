//! The guest side of Spore: PID 1 of a microVM, which runs OCI containers for the shim.
//!
//! The library exists so that tests can reach the parts; the product is the binary
//! `spore-agent`, which enters through [`pid1::run`] or, as the short-lived process that
//! drives `libcontainer`, through [`runtime::helper::main`]. See `agent/README.md` and
//! DESIGN section 6. Imports nothing of the workspace but `spore-agent-api`.

pub mod boot;
pub mod bpf;
pub mod changes;
pub mod console;
pub mod container;
pub mod error;
pub mod files;
pub(crate) mod identity;
pub mod netlink;
pub mod network;
pub mod pid1;
pub mod power;
pub mod reaper;
pub mod runtime;
pub mod service;
pub mod stdio;
pub mod sys;
pub mod vsock;
pub mod wait;
