//! What device and control plane share of a network slot, and the latter's handle.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::limiter::Limiter;
use super::spec;
use super::turn::{Budget, Turn};
use crate::api::{NetMetrics, RateLimit};
use crate::backend::gate::{Gate, Interest};
use crate::backend::tap::{Offloads, Tap, TapError};
use crate::clock::monotonic_ns;
use crate::devices::virtio::Interrupt;
use crate::log;
use crate::memory::GuestRam;

/// Why a tap could not be attached or detached. The slot is as it was.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    #[error("attach a tap to network slot {slot}: the slot has one already; detach it first")]
    Occupied { slot: u8 },
    #[error("attach a tap to network slot {slot}: {source}")]
    Tap { slot: u8, source: TapError },
    #[error("attach a tap to network slot {slot}: watch it: {source}")]
    Watch { slot: u8, source: io::Error },
    #[error("detach the tap of network slot {slot}: the slot has none")]
    Free { slot: u8 },
}

/// See the module.
pub(super) struct Slot {
    number: u8,
    tap: Option<Tap>,
    /// Its interface was taken away; it waits for being detached.
    gone: bool,
    /// The tap, as far as it is waited for, and the time that a limiter waits for.
    gate: Gate,
    interest: Interest,
    /// What the driver accepted, while there is one.
    features: Option<u64>,
    to_guest: Limiter,
    from_guest: Limiter,
    pub(super) metrics: NetMetrics,
    /// Set when a transport took the device.
    interrupt: Option<Arc<dyn Interrupt>>,
}

impl Slot {
    pub(super) fn new(number: u8) -> io::Result<Self> {
        Ok(Self {
            number,
            tap: None,
            gone: false,
            gate: Gate::new()?,
            interest: Interest::default(),
            features: None,
            to_guest: Limiter::default(),
            from_guest: Limiter::default(),
            metrics: NetMetrics { slot: number, ..NetMetrics::default() },
            interrupt: None,
        })
    }

    pub(super) fn connect(&mut self, interrupt: Arc<dyn Interrupt>) {
        self.interrupt = Some(interrupt);
    }

    pub(super) fn fd(&self) -> RawFd {
        self.gate.as_raw_fd()
    }

    pub(super) fn is_up(&self) -> bool {
        self.tap.is_some() && !self.gone
    }

    /// The tap, while it is of use.
    pub(super) fn usable(&self) -> Option<&Tap> {
        self.tap.as_ref().filter(|_| !self.gone)
    }

    /// A call's turn in the direction of queue `index`.
    pub(super) fn turn<'a>(&'a mut self, index: u16, name: &'a str, memory: &'a GuestRam) -> Turn<'a> {
        let (limiter, counters) = match index {
            spec::RX => (&mut self.to_guest, &mut self.metrics.to_guest),
            _ => (&mut self.from_guest, &mut self.metrics.from_guest),
        };
        let now = if limiter.is_limited() { monotonic_ns() } else { 0 };
        let tap = self.tap.as_ref().filter(|_| !self.gone);
        Turn { name, memory, tap, limiter, now, counters, budget: Budget::new() }
    }

    /// Waits for the tap as `interest` says, if there is one.
    pub(super) fn watch(&mut self, interest: Interest) -> io::Result<()> {
        if interest != self.interest
            && let Some(tap) = self.usable()
        {
            self.gate.change(tap, interest)?;
            self.interest = interest;
        }
        Ok(())
    }

    /// Wakes the device at `due`, if it is not woken earlier.
    pub(super) fn wake_at(&mut self, due: u64) -> io::Result<()> {
        match self.gate.due() {
            Some(earlier) if earlier <= due => Ok(()),
            _ => self.gate.open_at(due, monotonic_ns()),
        }
    }

    /// Whether it was woken by the time.
    pub(super) fn take_due(&mut self) -> bool {
        self.gate.take_due(monotonic_ns)
    }

    /// Gives the tap up, which the host took away: for the guest the cable is out.
    pub(super) fn give_up(&mut self, why: &dyn std::fmt::Display) {
        if let Some(tap) = self.usable() {
            self.gate.remove(tap);
            self.gone = true;
            let name = format!("net{}", self.number);
            log::error(&name, format_args!("its tap is of no more use: {why}; the link is down"));
            self.tell();
        }
    }

    /// Gives the tap up if its interface has gone.
    pub(super) fn look_after(&mut self) {
        if self.usable().is_some_and(Tap::is_gone) {
            self.give_up(&"its interface was removed");
        }
    }

    /// What the driver takes unfinished; nothing without one.
    fn offloads(&self) -> Offloads {
        self.features.map(spec::offloads).unwrap_or_default()
    }

    /// There is a driver, which accepted these features, or there is none any more.
    pub(super) fn set_features(&mut self, features: Option<u64>) -> Result<(), TapError> {
        self.features = features;
        self.usable().map_or(Ok(()), |tap| tap.set_offloads(self.offloads()))
    }

    fn tell(&self) {
        if let Some(interrupt) = &self.interrupt {
            interrupt.config_changed();
        }
    }

    fn attach(&mut self, fd: OwnedFd, to_guest: RateLimit, from_guest: RateLimit) -> Result<(), AttachError> {
        let slot = self.number;
        if self.tap.is_some() {
            return Err(AttachError::Occupied { slot });
        }
        let refused = |source| AttachError::Tap { slot, source };
        let tap = Tap::new(fd).map_err(refused)?;
        tap.set_offloads(self.offloads()).map_err(refused)?;
        self.install(tap, to_guest, from_guest).map_err(|source| AttachError::Watch { slot, source })
    }

    fn install(&mut self, tap: Tap, to_guest: RateLimit, from_guest: RateLimit) -> io::Result<()> {
        self.gate.add(&tap, Interest::default())?;
        if let Err(error) = self.gate.open() {
            self.gate.remove(&tap);
            return Err(error);
        }
        self.interest = Interest::default();
        (self.to_guest, self.from_guest) = (Limiter::new(to_guest), Limiter::new(from_guest));
        (self.tap, self.gone) = (Some(tap), false);
        self.tell();
        Ok(())
    }

    fn detach(&mut self) -> Result<(), AttachError> {
        let tap = self.tap.take().ok_or(AttachError::Free { slot: self.number })?;
        self.gate.remove(&tap);
        drop(tap);
        (self.to_guest, self.from_guest) = (Limiter::default(), Limiter::default());
        // Frames may wait for the tap that has left. Without a wake-up the guest's next one does it.
        if let Err(error) = self.gate.open() {
            log::warn("net", format_args!("wake slot {}: {error}", self.number));
        }
        self.tell();
        Ok(())
    }
}

pub(super) fn lock(slot: &Mutex<Slot>) -> MutexGuard<'_, Slot> {
    slot.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The control plane's end of a slot; cheap to clone, usable from any thread, before and
/// after activation. Lock order: transport → this.
#[derive(Clone)]
pub struct NetHandle(pub(super) Arc<Mutex<Slot>>);

impl std::fmt::Debug for NetHandle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let slot = lock(&self.0);
        f.debug_struct("NetHandle")
            .field("slot", &slot.number)
            .field("tap", &slot.tap)
            .finish_non_exhaustive()
    }
}

impl NetHandle {
    /// Gives the slot its tap and tells the guest that the link is up.
    pub fn attach(
        &self,
        tap: OwnedFd,
        to_guest: RateLimit,
        from_guest: RateLimit,
    ) -> Result<(), AttachError> {
        lock(&self.0).attach(tap, to_guest, from_guest)
    }

    /// Closes the slot's tap and tells the guest that the link is down.
    pub fn detach(&self) -> Result<(), AttachError> {
        lock(&self.0).detach()
    }

    /// Attaches what only behaves like a tap.
    #[cfg(test)]
    pub(super) fn attach_unchecked(&self, tap: Tap) -> io::Result<()> {
        lock(&self.0).install(tap, RateLimit::default(), RateLimit::default())
    }

    pub fn metrics(&self) -> NetMetrics {
        let slot = lock(&self.0);
        NetMetrics { link_up: slot.is_up(), ..slot.metrics.clone() }
    }
}
