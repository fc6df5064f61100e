//! One virtual machine: [`builder`] makes it, [`Vm`] is its life, [`slots`] says where its
//! devices are.

pub mod builder;
mod disks;
mod kvm;
pub mod slots;
mod snapshot;
mod state;

pub use builder::{BuildError, Built, Inherited, RestoredVm, build, restore};
pub use disks::{DiskSlot, Merging, Replace, Settle};
pub use snapshot::Taken;
pub use state::{FilesystemSlot, Gauges, NetworkSlot, Refusal, StateError, Vm, VmParts};
