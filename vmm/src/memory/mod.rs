//! Guest memory: addresses, layout, mappings.

/// An address in guest physical memory.
pub type Gpa = vm_memory::GuestAddress;

/// All RAM of a guest: private mappings, never shared with another process (DESIGN 2).
/// Cloning shares the mapping.
pub type GuestRam = vm_memory::GuestMemoryMmap<()>;
