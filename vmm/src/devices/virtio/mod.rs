//! Virtio devices (OASIS virtio 1.2) over the MMIO transport.
//!
//! A device is what the guest sees: features, configuration space, virtqueues. It is
//! driven by the transport, which owns registers and negotiation, and by the event loop,
//! which calls [`VirtioDevice::process_queue`] when the guest rings a doorbell and
//! [`VirtioDevice::process_backend`] when a registered backend descriptor is ready.
//! All of it runs under the device's one lock, on the VMM's event-loop thread, save
//! register reads and writes, which come from vCPU threads under the same lock.
//!
//! Devices know guest memory and [`Interrupt`]; they never see KVM. The transport holds the
//! lock order: transport (one per device) → device handle ([`blk::BlkHandle`], [`fs::FsHandle`], [`net::NetHandle`]). An
//! [`Interrupt`] takes no lock.

pub mod balloon;
pub mod blk;
pub mod fs;
pub mod net;
pub mod queue;
pub mod rng;
pub mod subscriber;
#[cfg(test)]
mod testing;
pub mod transport;
pub mod vsock;

use std::os::fd::RawFd;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use virtio_queue::Queue;
use vmm_sys_util::eventfd::EventFd;

use crate::memory::GuestRam;
use crate::snapshot::contract::{PartState, RestoreError, SaveError};

/// Raises a device's interrupt line. Implemented over irqfd; tests use their own.
pub trait Interrupt: Send + Sync {
    /// A used ring moved (InterruptStatus bit 0).
    fn used(&self);
    /// The configuration space changed (InterruptStatus bit 1); bumps ConfigGeneration.
    fn config_changed(&self);
}

/// What a device receives when the driver sets DRIVER_OK.
#[derive(Clone)]
pub struct ActiveContext {
    pub memory: GuestRam,
    pub interrupt: Arc<dyn Interrupt>,
    /// Features that the driver accepted.
    pub features: u64,
}

/// A backend descriptor that the event loop watches on the device's behalf.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Watch {
    pub fd: RawFd,
    pub readable: bool,
    pub writable: bool,
}

#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// The driver broke the specification. The transport sets DEVICE_NEEDS_RESET,
    /// raises a configuration interrupt, and ignores the device's queues until reset.
    #[error("{device}: driver error: {detail}")]
    Driver { device: &'static str, detail: String },
    /// The host failed in a way that the device cannot report in-band.
    #[error("{device}: host error: {detail}: {source}")]
    Host { device: &'static str, detail: String, source: std::io::Error },
}

/// Queues with work left when a device's budget for one call ran out. The transport rings
/// their doorbells again, so that other devices get their turn first.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[must_use]
pub struct Pending(u32);

impl Pending {
    pub const NONE: Self = Self(0);

    pub fn queue(index: u16) -> Self {
        Self(1u32.checked_shl(index.into()).unwrap_or(0))
    }

    pub fn with(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    pub fn without(self, index: u16) -> Self {
        Self(self.0 & !Self::queue(index).0)
    }

    pub fn contains(self, index: u16) -> bool {
        self.0 & Self::queue(index).0 != 0
    }
}

/// Copies what there is of a configuration space from `offset` on.
fn read_space(config: &[u8], offset: u64, data: &mut [u8]) {
    let start = usize::try_from(offset).unwrap_or(usize::MAX).min(config.len());
    let len = data.len().min(config.len() - start);
    data[..len].copy_from_slice(&config[start..start + len]);
}

/// How far a queue has been worked off.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RingPosition {
    /// The next chain of the available ring to take.
    pub next_available: u16,
    /// The next entry of the used ring to fill.
    pub next_used: u16,
}

/// What [`VirtioDevice::save`] gives: of the queues the positions alone, the rest is the transport's.
#[derive(Debug)]
pub struct Saved {
    /// Of all active queues, in order; empty for a device that is not active.
    pub positions: Vec<RingPosition>,
    pub own: PartState,
}

/// One virtio device. Life cycle: created → [restore →] (activate → process* → reset)*.
/// Quiescence is the loop's: nothing is in flight between calls, so a device can be saved between any two.
pub trait VirtioDevice: Send {
    /// Virtio device id (section 5): 1 network, 2 block, 4 entropy, 5 balloon, 19 socket, 26 file system.
    fn device_type(&self) -> u32;
    /// Short name for logs: `blk-ro0`, `vsock`, `rng`.
    fn name(&self) -> &str;
    /// The interrupt that this device will have, given once when the transport takes the
    /// device; for configuration changes that may come before activation.
    fn connect(&mut self, _interrupt: Arc<dyn Interrupt>) {}
    /// Offered features, without VIRTIO_F_VERSION_1, which the transport adds.
    fn features(&self) -> u64;
    /// Maximum size of each queue; the length is the number of queues.
    fn queue_sizes(&self) -> &[u16];
    /// Whether queue `index` exists for a driver that accepted `features`. Those that may not
    /// come last.
    fn needs_queue(&self, _index: u16, _features: u64) -> bool {
        true
    }
    /// Reads configuration space. Bytes beyond its end read as zero.
    fn read_config(&self, offset: u64, data: &mut [u8]);
    /// Writes configuration space. Most devices have nothing writable.
    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}
    /// DRIVER_OK. Queues are validated and ready.
    fn activate(&mut self, context: ActiveContext, queues: Vec<Queue>) -> Result<(), DeviceError>;
    /// The driver wrote 0 to Status; drop queues and guest-visible state.
    fn reset(&mut self);
    /// The device's state between two calls; it goes on as before.
    fn save(&self) -> Result<Saved, SaveError>;
    /// Takes up what [`Self::save`] gave as `own`, in a new device that has what the host attaches to it. If the saved device
    /// was active, `activate` follows, with queues at the saved positions.
    fn restore(&mut self, own: &PartState) -> Result<(), RestoreError>;
    /// The guest rang queue `index`. Does a bounded amount of work.
    fn process_queue(&mut self, index: u16) -> Result<Pending, DeviceError>;
    /// Descriptors to watch now. Asked after every call into the device, so it must be cheap.
    /// A descriptor stays open until the device was asked again without naming it.
    fn watches(&self) -> Vec<Watch> {
        Vec::new()
    }
    /// The watch on `fd` is ready.
    fn process_backend(
        &mut self,
        _fd: RawFd,
        _readable: bool,
        _writable: bool,
    ) -> Result<Pending, DeviceError> {
        Ok(Pending::NONE)
    }
}

/// A doorbell: the transport's queue-notify register, delivered by ioeventfd.
pub type Doorbell = EventFd;
