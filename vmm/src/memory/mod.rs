//! Guest memory: addresses, layout, mappings, and what goes back to the host.
//!
//! A [`Gpa`] is an address that the guest sees. Host addresses stay inside `mapping` and
//! `discard`, which alone convert between the two.

mod discard;
mod layout;
mod mapping;

pub use discard::{Discard, DiscardError};
pub use layout::{RamLayout, RamRange};
pub use mapping::{MapError, RamSlot, map, slots};

/// An address in guest physical memory.
pub type Gpa = vm_memory::GuestAddress;

/// All RAM of a guest: private mappings, never shared with another process (DESIGN 2).
/// Cloning shares the mapping.
pub type GuestRam = vm_memory::GuestMemoryMmap<()>;
