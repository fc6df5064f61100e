//! Takes a process's capabilities away but for a few: what the shim's confined helpers begin with.

use caps::errors::CapsError;
use caps::{CapSet, Capability, CapsHashSet};

/// Leaves the calling thread `needed`, and nothing else to programs that it may start.
pub fn keep_only(needed: &[Capability]) -> Result<(), CapsError> {
    let needed: CapsHashSet = needed.iter().copied().collect();
    for capability in caps::all() {
        if !needed.contains(&capability) && caps::has_cap(None, CapSet::Bounding, capability)? {
            caps::drop(None, CapSet::Bounding, capability)?;
        }
    }
    caps::clear(None, CapSet::Ambient)?;
    caps::clear(None, CapSet::Inheritable)?;
    caps::set(None, CapSet::Effective, &needed)?;
    caps::set(None, CapSet::Permitted, &needed)
}
