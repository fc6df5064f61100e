#![allow(unsafe_code)] // forks, at the quiescent point that it has made sure of
//! The VM's part in a snapshot: its state into memory, a child that writes it or keeps it, and its disks captured.

use std::io;
use std::sync::PoisonError;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use super::builder::{Inherited, SavedMemory};
use super::{StateError, Vm, VmParts};
use crate::api::{CapturedDisk, SnapshotTimes, VmState};
use crate::arch;
use crate::fork::{self, Child, Role};
use crate::snapshot::writer::{self, Target};
use crate::snapshot::{MachineState, layers};
use crate::vcpu::VcpuHandle;

pub(super) const MEND: &str = "a snapshot is made of a running or paused VM";

/// A snapshot that is being written, or a zygote.
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
    /// Saves a paused VM, forks the child that writes it, and captures the disks.
    pub fn snapshot(&mut self, target: &Target) -> Result<Taken, StateError> {
        self.take(|state, parts| {
            let discard = parts.discard.lock().unwrap_or_else(PoisonError::into_inner);
            // Where nothing lies below, anonymous memory needs no telling.
            let zero = if parts.origin.extents.is_empty() { Vec::new() } else { discard.anonymous() };
            drop(discard);
            // SAFETY: `take` calls this at the quiescent point.
            unsafe { writer::start(target, state, &parts.ram, &parts.origin, &zero) }
        })
    }

    /// Saves a paused VM, forks a child that does `work` with it, and captures the disks.
    pub fn split(
        &mut self,
        role: Role<'_>,
        work: impl FnOnce(Inherited) -> i32,
    ) -> Result<Taken, StateError> {
        self.take(|state, parts| {
            let discard = parts.discard.lock().unwrap_or_else(PoisonError::into_inner).clone();
            let memory = SavedMemory { ram: parts.ram.clone(), origin: parts.origin.clone(), discard };
            // SAFETY: `take` calls this at the quiescent point. The closure owns what it works with.
            unsafe { fork::split(role, || work(Inherited { state, memory })) }
        })
    }

    /// Saves a paused VM, has a child forked, and captures the disks. The VM stays as it is: nothing is
    /// written in here, and what fails leaves the disks as they were.
    fn take(
        &mut self,
        fork: impl FnOnce(MachineState, &VmParts) -> io::Result<Child>,
    ) -> Result<Taken, StateError> {
        self.require("snapshot", &[VmState::Paused], MEND)?;
        let requests = self.in_flight();
        if requests > 0 {
            return Err(StateError::InFlight { requests, seconds: 0 });
        }
        self.require_staged()?;
        let begun = Instant::now();
        let state = self.save()?;
        let save_ns = nanoseconds(begun);
        let begun = Instant::now();
        // This is the event loop's thread, between two rounds, so no device is at work and it holds no lock; the VM
        // is paused, which it only becomes when every vCPU thread was seen parked: the quiescent point.
        let child = fork(state, &self.parts);
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
