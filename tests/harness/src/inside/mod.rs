//! What runs on the ground, as PID 1: of the outer machine ([`init`]) or of a pid namespace
//! on the host ([`direct`]). Both furnish the root file system alike ([`stage`]) and then run
//! the job ([`execute`]).

pub mod direct;
pub mod execute;
pub mod init;
mod modules;
pub mod stage;
