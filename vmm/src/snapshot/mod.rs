//! Snapshots: a VM's whole state in files, and back.
//!
//! Rooms: `contract` what every part with state agrees to, `format` the state file's container, `layers` where
//! memory lies, `machine` the document, `writer` what a forked child does with it. The VMM opens nothing by
//! path: files come as descriptors, and which snapshots there are is the peer's to know.

pub mod contract;
pub mod format;
pub mod layers;
pub mod machine;
pub mod writer;

pub use contract::{PartState, Persist, RestoreError, SaveError};
pub use machine::{MachineState, Shape};
