//! The virtio-mmio transport, version 2 (virtio 1.2, 4.2.2): registers, feature negotiation,
//! queue set-up, the status state machine, interrupts.
//!
//! Registers are read and written by vCPU threads, everything else runs on the event-loop
//! thread, all under one lock around the transport. Interrupt state is atomic, so a device
//! raises interrupts, and a guest's handler takes them, without that lock.
//!
//! A driver that breaks the rules gets DEVICE_NEEDS_RESET (2.1.1) and a configuration
//! interrupt; its queues are ignored until it resets the device. A register write that makes
//! no sense in the current state is ignored, and logged rate-limited.

mod interrupt;
mod registers;
mod state;
#[cfg(test)]
mod tests;

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use virtio_queue::{Queue, QueueT};
use vm_memory::GuestAddress;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use self::interrupt::{AckRegister, IrqLine, StatusRegister};
use super::{ActiveContext, DeviceError, Doorbell, Interrupt, Pending, VirtioDevice, Watch, queue};
use crate::bus::MmioRegister;
use crate::log::Limited;
use crate::memory::GuestRam;

/// Device status bits (2.1).
pub mod status {
    pub const ACKNOWLEDGE: u32 = 1;
    pub const DRIVER: u32 = 2;
    pub const DRIVER_OK: u32 = 4;
    pub const FEATURES_OK: u32 = 8;
    pub const NEEDS_RESET: u32 = 64;
    pub const FAILED: u32 = 128;
}

/// VIRTIO_F_VERSION_1: this is no legacy device. Required of every driver.
pub const F_VERSION_1: u64 = 1 << 32;
/// VIRTIO_F_RING_INDIRECT_DESC.
pub const F_INDIRECT_DESC: u64 = 1 << 28;
/// VIRTIO_F_RING_EVENT_IDX.
pub const F_EVENT_IDX: u64 = 1 << 29;

/// Why a transport could not be made.
#[derive(Debug, thiserror::Error)]
pub enum TransportError {
    #[error("virtio device {device}: create an event descriptor: {source} (raise RLIMIT_NOFILE?)")]
    EventFd { device: String, source: io::Error },
    #[error(
        "virtio device {device}: queue {index} has maximum size {size}, which is not a power of two up to 32768"
    )]
    QueueSize { device: String, index: usize, size: u16 },
}

/// What a driver writes about one queue before it sets QueueReady.
#[derive(Debug, Clone, Copy, Default)]
struct QueueSetup {
    size: u32,
    descriptors: u64,
    available: u64,
    used: u64,
    ready: bool,
}

/// One virtio-mmio device: a [`VirtioDevice`] behind its registers.
pub struct MmioTransport {
    device: Box<dyn VirtioDevice>,
    memory: GuestRam,
    irq: Arc<IrqLine>,
    doorbells: Vec<Doorbell>,
    /// Rung when the driver activated or reset the device on a vCPU thread, so that the
    /// event loop looks at the device's watches.
    wake: EventFd,
    /// What the event loop watches now; kept by the subscriber.
    pub(super) registered: Vec<Watch>,
    status: u32,
    device_features_select: u32,
    driver_features_select: u32,
    driver_features: u64,
    queue_select: u32,
    queues: Vec<QueueSetup>,
    failures: Limited,
    /// One for each kind of access, by [`Ignored`].
    ignored: [Limited; 7],
}

/// Accesses that make no sense, by kind: a flood of one does not hide the others.
#[derive(Clone, Copy)]
enum Ignored {
    Status,
    Features,
    QueueReady,
    QueueSetup,
    Read,
    Write,
    Width,
}

impl std::fmt::Debug for MmioTransport {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("MmioTransport")
            .field("device", &self.device.name())
            .field("status", &self.status)
            .finish_non_exhaustive()
    }
}

impl MmioTransport {
    /// Puts `device` behind registers. `irq_line` is written to raise the interrupt.
    pub fn new(
        mut device: Box<dyn VirtioDevice>,
        memory: GuestRam,
        irq_line: EventFd,
    ) -> Result<Self, TransportError> {
        for (index, &size) in device.queue_sizes().iter().enumerate() {
            if Queue::new(size).is_err() {
                return Err(TransportError::QueueSize { device: device.name().into(), index, size });
            }
        }
        let eventfd = || {
            EventFd::new(EFD_NONBLOCK)
                .map_err(|source| TransportError::EventFd { device: device.name().into(), source })
        };
        let count = device.queue_sizes().len();
        let doorbells = (0..count).map(|_| eventfd()).collect::<Result<Vec<_>, _>>()?;
        let wake = eventfd()?;
        let irq = Arc::new(IrqLine::new(irq_line));
        device.connect(irq.clone());
        Ok(Self {
            device,
            memory,
            irq,
            doorbells,
            wake,
            registered: Vec::new(),
            status: 0,
            device_features_select: 0,
            driver_features_select: 0,
            driver_features: 0,
            queue_select: 0,
            queues: vec![QueueSetup::default(); count],
            failures: Limited::new(),
            ignored: Default::default(),
        })
    }

    /// One descriptor per queue, written when the guest notifies that queue; to be registered
    /// as ioeventfd on QueueNotify (base + 0x50) with the queue's index as 32-bit datamatch.
    pub fn doorbells(&self) -> &[Doorbell] {
        &self.doorbells
    }

    /// The registers that interrupt handlers use, by offset: they need no lock, so that a handler
    /// does not wait for a disk.
    pub fn lock_free_registers(&self) -> [(u64, Arc<dyn MmioRegister>); 2] {
        [
            (registers::offset::INTERRUPT_STATUS, Arc::new(StatusRegister(self.irq.clone()))),
            (registers::offset::INTERRUPT_ACK, Arc::new(AckRegister(self.irq.clone()))),
        ]
    }

    /// Short name of the device, for logs.
    pub fn name(&self) -> &str {
        self.device.name()
    }

    /// Descriptor that becomes readable when the device's watches may have changed.
    pub(super) fn wake_fd(&self) -> &EventFd {
        &self.wake
    }

    /// The event loop saw `wake_fd` readable.
    pub(super) fn woken(&mut self) {
        let _ = self.wake.read();
    }

    /// The device's watches now.
    pub(super) fn watches(&self) -> Vec<Watch> {
        self.device.watches()
    }

    fn active(&self) -> bool {
        self.status & (status::DRIVER_OK | status::NEEDS_RESET) == status::DRIVER_OK
    }

    /// The queue whose doorbell is `fd`, if any.
    pub(super) fn queue_of(&self, fd: RawFd) -> Option<u16> {
        let index = self.doorbells.iter().position(|bell| bell.as_raw_fd() == fd)?;
        u16::try_from(index).ok()
    }

    /// The doorbell of queue `index` rang. Public for tests that have no event loop.
    pub fn process_queue(&mut self, index: u16) {
        let Some(bell) = self.doorbells.get(usize::from(index)) else { return };
        // Cleared before the queue is looked at: a ring from now on counts again.
        let _ = bell.read();
        if self.active() {
            let result = self.device.process_queue(index);
            self.settle(result);
        }
    }

    /// The device's watched descriptor `fd` is ready. Public for tests that have no event loop.
    pub fn process_backend(&mut self, fd: RawFd, readable: bool, writable: bool) {
        let result = self.device.process_backend(fd, readable, writable);
        self.settle(result);
    }

    fn settle(&mut self, result: Result<Pending, DeviceError>) {
        match result {
            Ok(Pending::NONE) => {}
            Ok(pending) => {
                for index in (0u16..).take(self.doorbells.len()).filter(|&index| pending.contains(index)) {
                    self.ring(index.into());
                }
            }
            Err(error) => {
                self.fail(format_args!("{error}"));
                // Its queues are not to be touched again, and host peers learn of it.
                self.device.reset();
            }
        }
    }

    fn ring(&self, index: usize) {
        if let Some(bell) = self.doorbells.get(index) {
            // It fails only when the counter is full, which wakes the loop as well.
            let _ = bell.write(1);
        }
    }

    /// Sets DEVICE_NEEDS_RESET (2.1.2).
    fn fail(&mut self, why: std::fmt::Arguments<'_>) {
        self.failures.warn(self.device.name(), format_args!("{why}; the device waits for a reset"));
        self.status |= status::NEEDS_RESET;
        self.irq.config_changed();
    }

    fn ignore(&self, kind: Ignored, why: std::fmt::Arguments<'_>) {
        self.ignored[kind as usize].warn(self.device.name(), format_args!("ignored: {why}"));
    }

    fn offered(&self) -> u64 {
        self.device.features() | F_VERSION_1
    }

    /// The driver wrote Status.
    fn set_status(&mut self, value: u32) {
        if value == 0 {
            return self.reset();
        }
        let had = self.status & !status::NEEDS_RESET;
        if value & had != had {
            return self.ignore(Ignored::Status, format_args!("status {value:#x} clears bits of {had:#x}"));
        }
        let known =
            status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK | status::DRIVER_OK | status::FAILED;
        let mut added = value & known & !had;
        if added & status::FEATURES_OK != 0 && !self.features_acceptable() {
            added &= !status::FEATURES_OK;
        }
        let negotiated = (had | added) & status::FEATURES_OK != 0;
        if added & status::DRIVER_OK != 0 && !negotiated {
            self.ignore(Ignored::Status, format_args!("DRIVER_OK before FEATURES_OK"));
            added &= !status::DRIVER_OK;
        }
        self.status |= added;
        if added & status::DRIVER_OK != 0 && self.status & status::NEEDS_RESET == 0 {
            self.activate();
        }
    }

    /// 3.1.1 step 5: a driver must accept a subset of what is offered, with VERSION_1.
    fn features_acceptable(&self) -> bool {
        let offered = self.offered();
        let surplus = self.driver_features & !offered;
        if surplus != 0 || self.driver_features & F_VERSION_1 == 0 {
            self.ignore(
                Ignored::Features,
                format_args!(
                    "FEATURES_OK with features {:#x} of the offered {offered:#x}",
                    self.driver_features
                ),
            );
            return false;
        }
        true
    }

    fn activate(&mut self) {
        self.irq.set_live(true);
        match self.build_queues() {
            Ok(queues) => {
                let context = ActiveContext {
                    memory: self.memory.clone(),
                    interrupt: self.irq.clone(),
                    features: self.driver_features,
                };
                if let Err(error) = self.device.activate(context, queues) {
                    self.fail(format_args!("{error}"));
                }
            }
            Err(detail) => self.fail(format_args!("{detail}")),
        }
        // The event loop takes up the device's watches; and what was made available before
        // DRIVER_OK (allowed, but without notifications) is looked at.
        let _ = self.wake.write(1);
        for index in 0..self.doorbells.len() {
            self.ring(index);
        }
    }

    fn build_queues(&self) -> Result<Vec<Queue>, String> {
        let sizes = self.device.queue_sizes();
        let mut queues = Vec::with_capacity(sizes.len());
        for (index, (setup, &max)) in (0u16..).zip(self.queues.iter().zip(sizes)) {
            if !self.device.needs_queue(index, self.driver_features) {
                continue;
            }
            if !setup.ready {
                return Err(format!("DRIVER_OK although queue {index} is not ready"));
            }
            queues.push(self.build_queue(setup, max).map_err(|detail| format!("queue {index}: {detail}"))?);
        }
        Ok(queues)
    }

    fn build_queue(&self, setup: &QueueSetup, max: u16) -> Result<Queue, String> {
        let invalid = |error: virtio_queue::Error| error.to_string();
        let mut queue = Queue::new(max).map_err(invalid)?;
        let size = u16::try_from(setup.size).unwrap_or(u16::MAX);
        queue
            .try_set_size(size)
            .map_err(|_| format!("size {} is not a power of two up to {max}", setup.size))?;
        queue.try_set_desc_table_address(GuestAddress(setup.descriptors)).map_err(invalid)?;
        queue.try_set_avail_ring_address(GuestAddress(setup.available)).map_err(invalid)?;
        queue.try_set_used_ring_address(GuestAddress(setup.used)).map_err(invalid)?;
        queue.set_event_idx(self.driver_features & F_EVENT_IDX != 0);
        queue.set_ready(true);
        queue::validate(&queue, &self.memory)?;
        Ok(queue)
    }

    /// The driver wrote QueueReady.
    fn set_queue_ready(&mut self, ready: bool) {
        let index = self.queue_select as usize;
        let (Some(&setup), Some(&max)) = (self.queues.get(index), self.device.queue_sizes().get(index))
        else {
            return self.ignore(
                Ignored::QueueReady,
                format_args!("QueueReady of queue {index}, which does not exist"),
            );
        };
        if self.status & status::DRIVER_OK != 0 {
            return self
                .ignore(Ignored::QueueReady, format_args!("QueueReady of queue {index} after DRIVER_OK"));
        }
        if ready {
            if self.status & status::FEATURES_OK == 0 {
                return self.ignore(
                    Ignored::QueueReady,
                    format_args!("QueueReady of queue {index} before FEATURES_OK"),
                );
            }
            if let Err(detail) = self.build_queue(&setup, max) {
                return self.fail(format_args!("queue {index} refused: {detail}"));
            }
        }
        self.queues[index].ready = ready;
    }

    /// The driver wrote 0 to Status: everything is as new (2.1.2, 4.2.3.1).
    fn reset(&mut self) {
        let used = self.status & status::DRIVER_OK != 0;
        self.status = 0;
        self.device_features_select = 0;
        self.driver_features_select = 0;
        self.driver_features = 0;
        self.queue_select = 0;
        self.queues.fill(QueueSetup::default());
        self.irq.reset();
        if used {
            self.device.reset();
            let _ = self.wake.write(1);
        }
    }
}
