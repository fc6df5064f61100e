//! Guest memory: addresses, layout, mappings.
//!
//! A [`Gpa`] is an address that the guest sees. Host addresses stay inside `mapping`, which
//! alone converts between the two.

mod layout;
mod mapping;

pub use layout::{RamLayout, RamRange};
pub use mapping::{MapError, RamSlot, map, slots};

/// An address in guest physical memory.
pub type Gpa = vm_memory::GuestAddress;

/// All RAM of a guest: private mappings, never shared with another process (DESIGN 2).
/// Cloning shares the mapping.
pub type GuestRam = vm_memory::GuestMemoryMmap<()>;
