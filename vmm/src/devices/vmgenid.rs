//! The generation counter of a virtual machine (Microsoft, "Virtual Machine Generation ID", 2018): 16 bytes of guest memory, which the
//! ACPI tables point to and which differ whenever the machine goes on from a snapshot. Linux mixes them into its random numbers and
//! reseeds these at once.
//!
//! The bytes are random ones of the host's. What tells the guest that they are others now is an interrupt, by the generic event
//! device. There is no state: the bytes are guest memory.

use std::io;

use vm_memory::{Bytes, GuestMemoryError};
use vmm_sys_util::eventfd::EventFd;

use crate::backend::entropy;
use crate::memory::{Gpa, GuestRam};
use crate::snapshot::contract::{PartState, Persist, RestoreError, SaveError};

/// Its name in snapshots.
pub const NAME: &str = "vmgenid";
/// Bytes of an identifier.
pub const SIZE: usize = 16;
const VERSION: u32 = 1;

#[derive(Debug, thiserror::Error)]
pub enum GenerationError {
    #[error("generation id: random bytes of the host: {0}")]
    Entropy(io::Error),
    #[error("generation id: {address:#x} is not guest memory: {source}")]
    Memory { address: u64, source: GuestMemoryError },
    #[error("generation id: its interrupt: {0}")]
    Interrupt(io::Error),
}

/// See the module.
#[derive(Debug)]
pub struct GenerationId {
    /// KVM forgets an interrupt whose descriptor is closed.
    _line: Option<EventFd>,
}

impl GenerationId {
    /// Of a machine that boots.
    pub fn new(ram: &GuestRam, at: Gpa) -> Result<Self, GenerationError> {
        renew(ram, at)?;
        Ok(Self { _line: None })
    }

    /// Of a machine that goes on from a snapshot: another id, of which `line` tells the guest.
    pub fn restore(ram: &GuestRam, at: Gpa, line: EventFd) -> Result<Self, GenerationError> {
        renew(ram, at)?;
        line.write(1).map_err(GenerationError::Interrupt)?;
        Ok(Self { _line: Some(line) })
    }

    /// Refuses what a newer build has saved.
    pub fn check(state: &PartState) -> Result<(), RestoreError> {
        state.check_version(NAME, VERSION)
    }
}

impl Persist for GenerationId {
    fn save(&self) -> Result<PartState, SaveError> {
        Ok(PartState::none())
    }
}

fn renew(ram: &GuestRam, at: Gpa) -> Result<(), GenerationError> {
    let mut id = [0; SIZE];
    entropy::fill(&mut id).map_err(GenerationError::Entropy)?;
    ram.write_slice(&id, at).map_err(|source| GenerationError::Memory { address: at.0, source })
}

#[cfg(test)]
mod tests {
    use vmm_sys_util::eventfd::EFD_NONBLOCK;

    use super::*;
    use crate::memory::{RamLayout, map};

    const AT: Gpa = vm_memory::GuestAddress(0xf_f000);

    #[test]
    fn a_restored_machine_gets_another_and_is_told() {
        let ram = map(&RamLayout::around(64 << 20, 3 << 30..4 << 30)).unwrap();
        let id = || ram.read_obj::<[u8; SIZE]>(AT).unwrap();
        let line = EventFd::new(EFD_NONBLOCK).unwrap();
        GenerationId::new(&ram, AT).unwrap();
        let first = id();
        assert_ne!(first, [0; SIZE]);
        GenerationId::restore(&ram, AT, line.try_clone().unwrap()).unwrap();
        assert_ne!(id(), first);
        assert_eq!(line.read().unwrap(), 1);
    }
}
