//! The network device: what it does when, and what it waits for.

use std::io;
use std::os::fd::RawFd;
use std::sync::{Arc, Mutex};

use virtio_queue::Queue;

use super::receive::{self, Receiver};
use super::slot::{NetHandle, Slot, lock};
use super::spec::{self, RX, TX};
use super::transmit::{self, Transmitter};
use crate::backend::gate::Interest;
use crate::devices::virtio::queue::DeviceQueue;
use crate::devices::virtio::{
    ActiveContext, DeviceError, Interrupt, Pending, Saved, VirtioDevice, Watch, read_space,
};
use crate::log;
use crate::snapshot::contract::{PartState, RestoreError, SaveError};

const DEVICE: &str = "net";

/// What a direction waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Waits {
    /// Frames: of the tap, of the guest.
    Source,
    /// Room for them: of the guest, of the tap.
    Room,
    /// The limiter, until this time.
    Rate(u64),
}

struct Active {
    context: ActiveContext,
    receiver: Receiver,
    transmitter: Transmitter,
    to_guest: Waits,
    from_guest: Waits,
    /// Doorbells that the device has asked for itself.
    own_bells: Pending,
}

/// A network device for one slot.
pub struct Net {
    name: String,
    number: u8,
    slot: Arc<Mutex<Slot>>,
    active: Option<Active>,
}

impl std::fmt::Debug for Net {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Net").field("name", &self.name).finish_non_exhaustive()
    }
}

impl Net {
    /// The device of slot `number`, without a tap. It fails when too many descriptors are open.
    pub fn new(number: u8) -> io::Result<Self> {
        let slot = Arc::new(Mutex::new(Slot::new(number)?));
        Ok(Self { name: format!("{DEVICE}{number}"), number, slot, active: None })
    }

    pub fn handle(&self) -> NetHandle {
        NetHandle(Arc::clone(&self.slot))
    }
}

impl Active {
    /// Frames to the guest.
    fn receive(&mut self, name: &str, slot: &mut Slot) -> Result<Pending, DeviceError> {
        let memory = &self.context.memory;
        let stop = self.receiver.run(&mut slot.turn(RX, name, memory))?;
        if self.receiver.needs_interrupt(memory)? {
            slot.metrics.interrupts += 1;
            self.context.interrupt.used();
        }
        let mut pending = Pending::NONE;
        self.to_guest = match stop {
            // With the budget spent the tap still has frames, and is watched for them.
            receive::Stop::Empty | receive::Stop::Budget => Waits::Source,
            receive::Stop::NoBuffers => Waits::Room,
            receive::Stop::BudgetForRoom => {
                pending = Pending::queue(RX);
                Waits::Room
            }
            receive::Stop::Rate(until) => Waits::Rate(until),
            receive::Stop::Broken(error) => {
                slot.give_up(&error);
                Waits::Source
            }
        };
        Ok(pending)
    }

    /// Frames from the guest.
    fn transmit(&mut self, name: &str, slot: &mut Slot) -> Result<Pending, DeviceError> {
        let memory = &self.context.memory;
        let stop = self.transmitter.run(&mut slot.turn(TX, name, memory))?;
        if self.transmitter.needs_interrupt(memory)? {
            slot.metrics.interrupts += 1;
            self.context.interrupt.used();
        }
        let mut pending = Pending::NONE;
        self.from_guest = match stop {
            transmit::Stop::Empty => Waits::Source,
            transmit::Stop::Full => Waits::Room,
            transmit::Stop::Rate(until) => Waits::Rate(until),
            transmit::Stop::Budget => {
                pending = Pending::queue(TX);
                Waits::Source
            }
            transmit::Stop::Broken(error) => {
                slot.give_up(&error);
                pending = Pending::queue(TX);
                Waits::Source
            }
        };
        Ok(pending)
    }

    /// Ends a call: has the event loop wait for what the directions wait for, and ring the bells
    /// that are `pending`.
    fn finish(&mut self, slot: &mut Slot, pending: Pending) -> Result<Pending, DeviceError> {
        let interest =
            Interest { readable: self.to_guest == Waits::Source, writable: self.from_guest == Waits::Room };
        let host = |detail: &str, source| DeviceError::Host { device: DEVICE, detail: detail.into(), source };
        slot.watch(interest).map_err(|source| host("watch the tap", source))?;
        for waits in [self.to_guest, self.from_guest] {
            if let Waits::Rate(until) = waits {
                slot.wake_at(until).map_err(|source| host("set a limiter's timer", source))?;
            }
        }
        self.own_bells = self.own_bells.with(pending);
        Ok(pending)
    }
}

impl VirtioDevice for Net {
    fn device_type(&self) -> u32 {
        spec::DEVICE_TYPE
    }

    fn name(&self) -> &str {
        &self.name
    }

    fn connect(&mut self, interrupt: Arc<dyn Interrupt>) {
        lock(&self.slot).connect(interrupt);
    }

    fn features(&self) -> u64 {
        spec::FEATURES
    }

    fn queue_sizes(&self) -> &[u16] {
        &spec::QUEUE_SIZES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let config = spec::config(self.number, lock(&self.slot).is_up());
        read_space(&config, offset, data);
    }

    fn activate(&mut self, context: ActiveContext, queues: Vec<Queue>) -> Result<(), DeviceError> {
        let Ok([rx, tx]) = <[Queue; 2]>::try_from(queues) else {
            let detail = "activated without its two queues".into();
            return Err(DeviceError::Driver { device: DEVICE, detail });
        };
        let features = context.features;
        lock(&self.slot).set_features(Some(features)).map_err(|error| DeviceError::Host {
            device: DEVICE,
            detail: "tell the tap what the driver takes".into(),
            source: io::Error::other(error),
        })?;
        let (rx, tx) = (DeviceQueue::new(rx, RX, DEVICE), DeviceQueue::new(tx, TX, DEVICE));
        let mergeable = features & spec::F_MRG_RXBUF != 0;
        self.active = Some(Active {
            receiver: Receiver::new(rx, &context.memory, mergeable),
            transmitter: Transmitter::new(tx, &context.memory),
            context,
            to_guest: Waits::Source,
            from_guest: Waits::Source,
            // The transport rings them.
            own_bells: Pending::queue(RX).with(Pending::queue(TX)),
        });
        Ok(())
    }

    fn reset(&mut self) {
        self.active = None;
        let mut slot = lock(&self.slot);
        // The next driver's features are set in any case; what fails here is said there.
        let _ = slot.set_features(None);
        if let Err(error) = slot.watch(Interest::default()) {
            log::warn(&self.name, format_args!("watch the tap: {error}"));
        }
    }

    /// The link's state is in the configuration space that the transport keeps, the offloads in the driver's features.
    fn save(&self) -> Result<Saved, SaveError> {
        let positions = self.active.iter().flat_map(|a| [a.receiver.position(), a.transmitter.position()]);
        Ok(Saved { positions: positions.collect(), own: PartState::none() })
    }

    fn restore(&mut self, own: &PartState) -> Result<(), RestoreError> {
        own.check_version(DEVICE, 1)
    }

    fn process_queue(&mut self, index: u16) -> Result<Pending, DeviceError> {
        let Some(active) = &mut self.active else { return Ok(Pending::NONE) };
        let mut slot = lock(&self.slot);
        if active.own_bells.contains(index) {
            active.own_bells = active.own_bells.without(index);
        } else {
            slot.metrics.notifications += 1;
        }
        let pending = match (index, active.to_guest, active.from_guest) {
            (RX, Waits::Room, _) => active.receive(&self.name, &mut slot)?,
            (TX, _, Waits::Source) => active.transmit(&self.name, &mut slot)?,
            // What it waits for wakes it.
            _ => Pending::NONE,
        };
        active.finish(&mut slot, pending)
    }

    fn watches(&self) -> Vec<Watch> {
        vec![Watch { fd: lock(&self.slot).fd(), readable: true, writable: false }]
    }

    fn process_backend(
        &mut self,
        _fd: RawFd,
        _readable: bool,
        _writable: bool,
    ) -> Result<Pending, DeviceError> {
        let mut slot = lock(&self.slot);
        slot.metrics.wakeups += 1;
        // Time for what a limiter held back, or another tap than before.
        let due = slot.take_due();
        let Some(active) = &mut self.active else {
            slot.look_after();
            return Ok(Pending::NONE);
        };
        let receives = active.to_guest == Waits::Source || (due && active.to_guest != Waits::Room);
        let transmits = active.from_guest == Waits::Room || (due && active.from_guest != Waits::Source);
        let mut pending = Pending::NONE;
        if receives {
            pending = pending.with(active.receive(&self.name, &mut slot)?);
        }
        if transmits {
            pending = pending.with(active.transmit(&self.name, &mut slot)?);
        }
        if !receives && !transmits && !due {
            // Nothing was waited for, so the tap has failed.
            slot.look_after();
        }
        active.finish(&mut slot, pending)
    }
}
