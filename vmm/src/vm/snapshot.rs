#![allow(unsafe_code)] // forks, at the quiescent point that it has made sure of
//! The VM's part in a snapshot: its state into memory, a child that writes it, and its disks captured.

use std::sync::PoisonError;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use super::{StateError, Vm};
use crate::api::{CapturedDisk, SnapshotTimes, VmState};
use crate::arch;
use crate::fork::Child;
use crate::snapshot::writer::{self, Target};
use crate::snapshot::{MachineState, layers};
use crate::vcpu::VcpuHandle;

pub(super) const MEND: &str = "a snapshot is made of a running or paused VM";

/// A snapshot that is being written.
#[derive(Debug)]
pub struct Taken {
    pub child: Child,
    pub times: SnapshotTimes,
    pub disks: Vec<CapturedDisk>,
}

fn nanoseconds(since: Instant) -> u64 {
    u64::try_from(since.elapsed().as_nanos()).unwrap_or(u64::MAX)
}

impl Vm {
    /// Saves a paused VM, forks the child that writes it, and captures the disks. The VM stays as it is: nothing is
    /// written in here, and what fails leaves the disks as they were.
    pub fn snapshot(&mut self, target: &Target) -> Result<Taken, StateError> {
        self.require("snapshot", &[VmState::Paused], MEND)?;
        let requests = self.in_flight();
        if requests > 0 {
            return Err(StateError::InFlight { requests, seconds: 0 });
        }
        self.require_staged()?;
        let begun = Instant::now();
        let state = self.save()?;
        let save_ns = nanoseconds(begun);
        let discard = self.parts.discard.lock().unwrap_or_else(PoisonError::into_inner);
        // Where nothing lies below, anonymous memory needs no telling.
        let zero = if self.parts.origin.extents.is_empty() { Vec::new() } else { discard.anonymous() };
        drop(discard);
        let begun = Instant::now();
        // SAFETY: this is the event loop's thread, between two rounds, so no device is at work and it holds no lock; the VM
        // is paused, which it only becomes when every vCPU thread was seen parked.
        let child = unsafe { writer::start(target, state, &self.parts.ram, &self.parts.origin, &zero) };
        let fork_ns = nanoseconds(begun);
        let child = child.map_err(StateError::Fork)?;
        // Last, as it alone cannot fail. It is the same instant: the guest and the devices stand still, and the child
        // does not know the disks.
        let begun = Instant::now();
        let disks = self.switch_disks();
        let switch_ns = nanoseconds(begun);
        let times =
            SnapshotTimes { pid: child.pid(), save_ns, fork_ns, switch_ns, ..SnapshotTimes::default() };
        Ok(Taken { child, times, disks })
    }

    /// Everything of a paused VM but its memory.
    fn save(&self) -> Result<MachineState, StateError> {
        let deadline = Instant::now() + super::state::PATIENCE;
        // Each on its own thread, so at the same time.
        self.parts.vcpus.iter().for_each(VcpuHandle::save);
        let vcpus = self.parts.vcpus.iter().map(|vcpu| vcpu.saved(deadline)).collect::<Result<_, _>>()?;
        let platform = arch::save_platform(&self.parts.fd).map_err(StateError::Platform)?;
        let saved = self.parts.parts.iter().map(|(name, part)| Ok((name.clone(), part.save()?)));
        let parts = saved.collect::<Result<_, StateError>>()?;
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Ok(MachineState {
            written_by: env!("CARGO_PKG_VERSION").to_owned(),
            saved_at_ns: u64::try_from(now.as_nanos()).unwrap_or(u64::MAX),
            shape: self.parts.shape.clone(),
            platform,
            vcpus,
            parts,
            memory: layers::MemoryMap::default(),
        })
    }
}
