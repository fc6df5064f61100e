//! A transport's interrupt: InterruptStatus and ConfigGeneration (4.2.2), and the line.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use vmm_sys_util::eventfd::EventFd;

use crate::bus::MmioRegister;
use crate::devices::virtio::Interrupt;

const USED: u32 = 1;
const CONFIG: u32 = 2;

/// Lock-free, so that a device raises it from any thread.
#[derive(Debug)]
pub(super) struct IrqLine {
    line: EventFd,
    status: AtomicU32,
    generation: AtomicU32,
    /// DRIVER_OK was set; before that nothing is sent (3.1.1).
    live: AtomicBool,
    /// A configuration change that waits for DRIVER_OK. Without it, a driver that has read
    /// the capacity but is not yet listening would never learn of a disk attached in between.
    config_waits: AtomicBool,
}

impl IrqLine {
    pub(super) fn new(line: EventFd) -> Self {
        Self {
            line,
            status: AtomicU32::new(0),
            generation: AtomicU32::new(0),
            live: AtomicBool::new(false),
            config_waits: AtomicBool::new(false),
        }
    }

    pub(super) fn status(&self) -> u32 {
        self.status.load(Ordering::SeqCst)
    }

    pub(super) fn acknowledge(&self, bits: u32) {
        self.status.fetch_and(!bits, Ordering::SeqCst);
    }

    pub(super) fn generation(&self) -> u32 {
        self.generation.load(Ordering::SeqCst)
    }

    pub(super) fn set_live(&self, live: bool) {
        self.live.store(live, Ordering::SeqCst);
        if live && self.config_waits.swap(false, Ordering::SeqCst) {
            self.raise(CONFIG);
        }
    }

    pub(super) fn reset(&self) {
        self.live.store(false, Ordering::SeqCst);
        self.config_waits.store(false, Ordering::SeqCst);
        self.status.store(0, Ordering::SeqCst);
    }

    pub(super) fn config_waits(&self) -> bool {
        self.config_waits.load(Ordering::SeqCst)
    }

    /// Before [`Self::set_live`]: nothing is sent.
    pub(super) fn restore(&self, status: u32, generation: u32, config_waits: bool) {
        self.status.store(status & (USED | CONFIG), Ordering::SeqCst);
        self.generation.store(generation, Ordering::SeqCst);
        self.config_waits.store(config_waits, Ordering::SeqCst);
    }

    /// Sends what the guest has not acknowledged once more.
    pub(super) fn raise_again(&self, status: u32) {
        if self.live.load(Ordering::SeqCst) && status & (USED | CONFIG) != 0 {
            self.raise(status & (USED | CONFIG));
        }
    }

    fn raise(&self, bit: u32) {
        // The bit first: the handler that the line starts must find it.
        self.status.fetch_or(bit, Ordering::SeqCst);
        // It fails only when the counter is full; then an interrupt is pending anyway.
        let _ = self.line.write(1);
    }
}

/// InterruptStatus, for the bus: an interrupt handler does not wait for the device's work.
#[derive(Debug)]
pub(super) struct StatusRegister(pub(super) Arc<IrqLine>);

impl MmioRegister for StatusRegister {
    fn read(&self) -> Option<u32> {
        Some(self.0.status())
    }

    fn write(&self, _: u32) -> bool {
        false
    }
}

/// InterruptACK, likewise.
#[derive(Debug)]
pub(super) struct AckRegister(pub(super) Arc<IrqLine>);

impl MmioRegister for AckRegister {
    fn read(&self) -> Option<u32> {
        None
    }

    fn write(&self, bits: u32) -> bool {
        self.0.acknowledge(bits);
        true
    }
}

impl Interrupt for IrqLine {
    fn used(&self) {
        if self.live.load(Ordering::SeqCst) {
            self.raise(USED);
        }
    }

    fn config_changed(&self) {
        self.generation.fetch_add(1, Ordering::SeqCst);
        self.config_waits.store(true, Ordering::SeqCst);
        if self.live.load(Ordering::SeqCst) && self.config_waits.swap(false, Ordering::SeqCst) {
            self.raise(CONFIG);
        }
    }
}
