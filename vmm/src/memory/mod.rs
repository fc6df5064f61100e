//! Guest memory: addresses, layout, mappings, and what goes back to the host.
//!
//! A [`Gpa`] is an address that the guest sees. Host addresses stay inside `mapping`,
//! `discard` and `written`, which alone convert between the two.

mod discard;
mod layout;
mod mapping;
mod written;

pub use discard::{Discard, DiscardError};
pub use layout::{RamLayout, RamRange};
pub use mapping::{FileExtent, MapError, RamSlot, map, map_files, prefer_huge_pages, slots};
pub use written::{ScanError, Still, without_zeroes, written};

/// An address in guest physical memory.
pub type Gpa = vm_memory::GuestAddress;

/// All RAM of a guest: private mappings, never shared with another process (DESIGN 2).
/// Cloning shares the mapping.
pub type GuestRam = vm_memory::GuestMemoryMmap<()>;
