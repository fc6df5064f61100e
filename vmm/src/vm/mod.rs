//! One virtual machine: [`builder`] makes it, [`Vm`] is its life, [`slots`] says where its
//! devices are.

pub mod builder;
mod kvm;
pub mod slots;
mod state;

pub use builder::{BuildError, Built, build};
pub use state::{DiskSlot, FilesystemSlot, Gauges, StateError, Vm, VmParts};
