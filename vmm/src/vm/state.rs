//! A VM's life: configured → running ⇄ paused → ended, and what may be asked of it when.
//!
//! Owned by the event loop, on which every device does its work: when a call is served here,
//! no device is at work, and while the VM is paused the loop lets none work. So "vCPUs parked
//! and nothing in flight to the file server" is the quiescent point, and it lasts.

use std::collections::BTreeMap;
use std::io;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use kvm_ioctls::VmFd;
use vmm_sys_util::eventfd::EventFd;

use super::DiskSlot;
use crate::api::{
    BalloonMetrics, BootTimes, EndReason, FsMetrics, MIN_MEMORY_MIB, Metrics, NetMetrics, SnapshotMetrics,
    VmState, VsockMetrics,
};
use crate::arch;
use crate::config::Network;
use crate::end::EndLatch;
use crate::log;
use crate::memory::{self, Discard, GuestRam};
use crate::snapshot::writer::Origin;
use crate::snapshot::{Persist, SaveError, Shape};
use crate::vcpu::{self, ExitCounters, VcpuError, VcpuHandle};

/// How long vCPUs may take to leave the guest. An exit's device access is the longest part.
pub(super) const PATIENCE: Duration = Duration::from_secs(5);

/// A call that the VM cannot serve as it is.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    #[error("{call}: the VM is {state:?}; {mend}")]
    WrongState { call: &'static str, state: VmState, mend: &'static str },
    #[error("attach: all {max} {kind} disk slots are taken")]
    Exhausted { kind: &'static str, max: usize },
    #[error(
        "pause: the file server did not answer {requests} requests within {seconds} s; is its storage stuck?"
    )]
    InFlight { requests: usize, seconds: u64 },
    #[error("attach a file server: the VM was configured without a file system device")]
    NoFilesystem,
    #[error("resume: the saved VM had a file server, and this one has none yet; attach one first")]
    NoFileServer,
    #[error("{call}: network slot {slot}; the VM was configured with {count} slots, counted from 0")]
    NoNetworkSlot { call: &'static str, slot: u8, count: usize },
    #[error(transparent)]
    Attach(Refusal),
    #[error("there is no writable disk in a slot {serial:?}; the reply to AttachDisk names the slot")]
    NoDisk { serial: String },
    #[error(
        "snapshot: disk {serial} has no file to go on in; give an empty one for every writable disk that is attached"
    )]
    NotStaged { serial: String },
    #[error(
        "balloon: a target of {target_mib} MiB; of this guest's {memory_mib} MiB at most {max_mib} can be given up"
    )]
    Balloon { target_mib: u64, memory_mib: u64, max_mib: u64 },
    #[error("snapshot: {0}")]
    Platform(#[source] arch::SaveStateError),
    #[error(transparent)]
    Part(#[from] SaveError),
    #[error("forking a copy of the VM: {0}; the VM goes on")]
    Fork(#[source] io::Error),
    #[error("power button: {0}")]
    Button(#[source] io::Error),
    #[error(transparent)]
    Vcpu(#[from] VcpuError),
}

/// Why a device's handle refuses.
pub type Refusal = Box<dyn std::error::Error + Send + Sync>;

/// A place for a file server.
pub trait FilesystemSlot {
    fn attach(&self, sockets: Vec<UnixStream>) -> Result<(), Refusal>;
    /// Whether the guest had a server before it was restored, and has none yet.
    fn awaits_server(&self) -> bool;
    /// While held, requests stay in their queue.
    fn hold(&self, held: bool);
    /// Requests that the server has not answered.
    fn in_flight(&self) -> usize;
    fn metrics(&self) -> FsMetrics;
}

/// A place for a network.
pub trait NetworkSlot {
    fn attach(&self, network: Network) -> Result<(), Refusal>;
    fn detach(&self) -> Result<(), Refusal>;
    fn metrics(&self) -> NetMetrics;
}

/// What the VM reads of its devices and tells them.
pub trait Gauges {
    fn vsock(&self) -> VsockMetrics;
    fn balloon(&self) -> BalloonMetrics;
    /// What the balloon shall hold.
    fn set_balloon(&self, mib: u64);
    /// Bytes that the guest has sent and host peers have not taken.
    fn unsent(&self) -> u64;
    /// The VM goes on after a pause.
    fn resumed(&self);
    /// Bytes written, bytes dropped.
    fn console(&self) -> (u64, u64);
}

/// What the builder made.
pub struct VmParts {
    pub fd: VmFd,
    pub ram: GuestRam,
    pub vcpus: Vec<VcpuHandle>,
    pub counters: Arc<ExitCounters>,
    pub end: Arc<EndLatch>,
    pub disks: Vec<Box<dyn DiskSlot>>,
    pub filesystem: Option<Box<dyn FilesystemSlot>>,
    pub networks: Vec<Box<dyn NetworkSlot>>,
    pub gauges: Box<dyn Gauges>,
    /// Raises the generic event device's interrupt.
    pub power_button: EventFd,
    pub shape: Shape,
    /// What has state, by name.
    pub parts: BTreeMap<String, Box<dyn Persist>>,
    /// What guest memory was restored from.
    pub origin: Origin,
    /// What of guest memory is anonymous; shared with the balloon.
    pub discard: Arc<Mutex<Discard>>,
}

/// A VM. Dropping it stops its vCPUs first.
pub struct Vm {
    state: VmState,
    pub(super) parts: VmParts,
}

impl std::fmt::Debug for Vm {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Vm").field("state", &self.state).finish_non_exhaustive()
    }
}

impl Vm {
    pub fn new(parts: VmParts) -> Self {
        Self { state: VmState::Configured, parts }
    }

    /// A VM that goes on where it was saved: paused.
    pub fn restored(parts: VmParts) -> Self {
        let vm = Self { state: VmState::Paused, parts };
        vm.hold(true);
        vm
    }

    pub fn state(&self) -> VmState {
        if self.parts.end.is_set() { VmState::Ended } else { self.state }
    }

    /// Whether it was paused last, also if it has ended since.
    pub fn is_paused(&self) -> bool {
        self.state == VmState::Paused
    }

    /// Bytes that the guest has sent and host peers have not taken.
    pub fn unsent(&self) -> u64 {
        self.parts.gauges.unsent()
    }

    pub(super) fn require(
        &self,
        call: &'static str,
        allowed: &[VmState],
        mend: &'static str,
    ) -> Result<(), StateError> {
        let state = self.state();
        if allowed.contains(&state) { Ok(()) } else { Err(StateError::WrongState { call, state, mend }) }
    }

    pub fn boot(&mut self) -> Result<(), StateError> {
        self.require("boot", &[VmState::Configured], "a VM boots once, after its configuration")?;
        self.run();
        Ok(())
    }

    pub fn pause(&mut self) -> Result<(), StateError> {
        self.require("pause", &[VmState::Running, VmState::ShuttingDown], "only a running VM can be paused")?;
        self.parts.vcpus.iter().for_each(VcpuHandle::pause);
        let deadline = Instant::now() + PATIENCE;
        if let Err(error) = self.parts.vcpus.iter().try_for_each(|vcpu| vcpu.wait(deadline)) {
            // As it was before the call.
            self.parts.vcpus.iter().for_each(VcpuHandle::resume);
            return Err(error.into());
        }
        self.hold(true);
        self.state = VmState::Paused;
        Ok(())
    }

    /// Requests that were under way when the VM was paused, and still are.
    pub fn in_flight(&self) -> usize {
        self.parts.filesystem.as_ref().map_or(0, |filesystem| filesystem.in_flight())
    }

    fn hold(&self, held: bool) {
        if let Some(filesystem) = &self.parts.filesystem {
            filesystem.hold(held);
        }
    }

    /// Continues; `shutting_down` says that the power button was pressed before the pause.
    pub fn resume(&mut self, shutting_down: bool) -> Result<(), StateError> {
        self.require("resume", &[VmState::Paused], "only a paused VM can be resumed")?;
        if self.parts.filesystem.as_ref().is_some_and(|filesystem| filesystem.awaits_server()) {
            return Err(StateError::NoFileServer);
        }
        self.parts.gauges.resumed();
        self.hold(false);
        self.run();
        if shutting_down {
            self.state = VmState::ShuttingDown;
        }
        Ok(())
    }

    fn run(&mut self) {
        self.parts.vcpus.iter().for_each(VcpuHandle::resume);
        self.state = VmState::Running;
    }

    /// Tells the guest that its power button was pressed.
    pub fn press_power_button(&mut self) -> Result<(), StateError> {
        let allowed = [VmState::Running, VmState::ShuttingDown];
        self.require("shutdown", &allowed, "resume it first, or use deadline 0 to end it by force")?;
        self.parts.power_button.write(1).map_err(StateError::Button)?;
        self.state = VmState::ShuttingDown;
        Ok(())
    }

    /// Ends the VM whatever the guest does.
    pub fn force_end(&self) {
        self.parts.end.set(EndReason::Forced);
    }

    /// Gives the file system device its server.
    pub fn attach_filesystem(&mut self, sockets: Vec<UnixStream>) -> Result<(), StateError> {
        self.require_living("attach")?;
        let slot = self.parts.filesystem.as_ref().ok_or(StateError::NoFilesystem)?;
        slot.attach(sockets).map_err(StateError::Attach)
    }

    /// Gives a network slot its tap.
    pub fn attach_network(&mut self, network: Network) -> Result<(), StateError> {
        let slot = self.network("attach a network", network.slot)?;
        slot.attach(network).map_err(StateError::Attach)
    }

    /// Takes a network slot's tap away.
    pub fn detach_network(&mut self, slot: u8) -> Result<(), StateError> {
        self.network("detach a network", slot)?.detach().map_err(StateError::Attach)
    }

    fn network(&self, call: &'static str, slot: u8) -> Result<&dyn NetworkSlot, StateError> {
        self.require_living(call)?;
        let networks = &self.parts.networks;
        let found = networks.get(usize::from(slot)).map(|network| &**network);
        found.ok_or(StateError::NoNetworkSlot { call, slot, count: networks.len() })
    }

    pub(super) fn require_living(&self, call: &'static str) -> Result<(), StateError> {
        let living = [VmState::Configured, VmState::Running, VmState::Paused, VmState::ShuttingDown];
        self.require(call, &living, "the guest has ended")
    }

    /// Sets how much of its memory the guest shall give up.
    pub fn set_balloon(&mut self, target_mib: u64) -> Result<(), StateError> {
        self.require_living("balloon")?;
        let memory_mib = memory::slots(self.ram()).iter().map(|slot| slot.size).sum::<u64>() >> 20;
        let max_mib = memory_mib.saturating_sub(MIN_MEMORY_MIB);
        if target_mib > max_mib {
            return Err(StateError::Balloon { target_mib, memory_mib, max_mib });
        }
        self.parts.gauges.set_balloon(target_mib);
        Ok(())
    }

    /// Counters; the times that are not the VM's own are for the caller to fill in.
    pub fn metrics(&self) -> Metrics {
        let (console_bytes, console_dropped) = self.parts.gauges.console();
        Metrics {
            boot: BootTimes { entered_ns: self.parts.counters.entered_ns(), ..Default::default() },
            exits: self.parts.counters.exits(),
            blk: self.parts.disks.iter().filter(|disk| !disk.is_free()).map(|disk| disk.metrics()).collect(),
            vsock: self.parts.gauges.vsock(),
            filesystem: self.parts.filesystem.as_ref().map(|slot| slot.metrics()).unwrap_or_default(),
            balloon: self.parts.gauges.balloon(),
            networks: self.parts.networks.iter().map(|network| network.metrics()).collect(),
            // The server's own.
            snapshots: SnapshotMetrics::default(),
            console_bytes,
            console_dropped,
        }
    }

    pub fn ram(&self) -> &GuestRam {
        &self.parts.ram
    }

    pub fn fd(&self) -> &VmFd {
        &self.parts.fd
    }

    /// Before boot only: the builder's last step.
    pub(super) fn add_vcpu(&mut self, vcpu: VcpuHandle) {
        self.parts.vcpus.push(vcpu);
    }

    /// Stops the vCPUs for good.
    pub fn stop(&mut self) -> Result<(), VcpuError> {
        vcpu::stop_all(&mut self.parts.vcpus, PATIENCE)
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        if let Err(error) = self.stop() {
            // Guest memory must not be unmapped, and perhaps reused, under a running vCPU.
            log::error("vm", format_args!("{error}; the process exits at once"));
            std::process::exit(1);
        }
    }
}
