//! What turns a bare kernel into a guest that can run containers: mounts, modules.
//! Everything here runs once, before the agent listens, on the only thread there is.

pub mod modules;
pub mod mounts;
