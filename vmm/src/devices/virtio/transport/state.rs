//! A transport's saved state: its registers, its queues, and the device behind them.

use serde::{Deserialize, Serialize};
use virtio_queue::QueueT;

use super::{MmioTransport, QueueSetup, status};
use crate::devices::virtio::{ActiveContext, Interrupt, RingPosition, Saved};
use crate::snapshot::contract::{PartState, RestoreError, SaveError};

/// Newest version that is written and read.
const VERSION: u32 = 1;
/// Bytes of configuration space that are kept, to see whether the guest has to be told of a change.
const CONFIG: usize = 64;

/// Version 1.
#[derive(Debug, Serialize, Deserialize)]
struct TransportStateV1 {
    /// Virtio device id.
    device_type: u32,
    status: u32,
    device_features_select: u32,
    driver_features_select: u32,
    driver_features: u64,
    queue_select: u32,
    queues: Vec<QueueStateV1>,
    /// Of the queues of an active device, in order; empty without one.
    positions: Vec<RingPosition>,
    interrupt_status: u32,
    config_generation: u32,
    config_waits: bool,
    /// What the guest could read.
    config: Vec<u8>,
    device: PartState,
}

#[derive(Debug, Serialize, Deserialize)]
struct QueueStateV1 {
    size: u32,
    descriptors: u64,
    available: u64,
    used: u64,
    ready: bool,
}

impl MmioTransport {
    /// The state of the transport and its device, at the quiescent point.
    pub fn save(&self) -> Result<PartState, SaveError> {
        let Saved { positions, own } = self.device.save()?;
        let queue = |setup: &QueueSetup| QueueStateV1 {
            size: setup.size,
            descriptors: setup.descriptors,
            available: setup.available,
            used: setup.used,
            ready: setup.ready,
        };
        let state = TransportStateV1 {
            device_type: self.device.device_type(),
            status: self.status,
            device_features_select: self.device_features_select,
            driver_features_select: self.driver_features_select,
            driver_features: self.driver_features,
            queue_select: self.queue_select,
            queues: self.queues.iter().map(queue).collect(),
            positions: if self.active() { positions } else { Vec::new() },
            interrupt_status: self.irq.status(),
            config_generation: self.irq.generation(),
            config_waits: self.irq.config_waits(),
            config: self.config_space(),
            device: own,
        };
        PartState::new(self.name(), VERSION, &state)
    }

    fn config_space(&self) -> Vec<u8> {
        let mut config = vec![0; CONFIG];
        self.device.read_config(0, &mut config);
        config
    }

    /// Takes a saved state up. The device is new, with what the host attaches to it; interrupts that the restored
    /// processors and interrupt controllers take are raised here, so those have their state.
    pub fn restore(&mut self, state: &PartState) -> Result<(), RestoreError> {
        let name = self.name().to_owned();
        let state: TransportStateV1 = state.read(&name, VERSION)?;
        self.check(&name, &state)?;
        self.status = state.status;
        self.device_features_select = state.device_features_select;
        self.driver_features_select = state.driver_features_select;
        self.driver_features = state.driver_features;
        self.queue_select = state.queue_select;
        for (setup, saved) in self.queues.iter_mut().zip(&state.queues) {
            let QueueStateV1 { size, descriptors, available, used, ready } = *saved;
            *setup = QueueSetup { size, descriptors, available, used, ready };
        }
        self.irq.restore(state.interrupt_status, state.config_generation, state.config_waits);
        self.device.restore(&state.device)?;
        if self.status & status::DRIVER_OK != 0 {
            self.irq.set_live(true);
        }
        if self.active() {
            self.reactivate(&name, &state.positions)?;
        }
        self.wake_all(state.interrupt_status, &state.config);
        Ok(())
    }

    fn check(&self, name: &str, state: &TransportStateV1) -> Result<(), RestoreError> {
        let invalid = |detail: String| Err(RestoreError::invalid(name, detail));
        let found = state.device_type;
        let kind = self.device.device_type();
        if found != kind {
            return invalid(format!("the saved device is of type {found}, this one of type {kind}"));
        }
        if state.queues.len() != self.queues.len() {
            let (found, needed) = (state.queues.len(), self.queues.len());
            return invalid(format!("{found} queues were saved; this device has {needed}"));
        }
        let known = status::ACKNOWLEDGE
            | status::DRIVER
            | status::FEATURES_OK
            | status::DRIVER_OK
            | status::NEEDS_RESET
            | status::FAILED;
        if state.status & !known != 0 {
            return invalid(format!("status {:#x} has unknown bits", state.status));
        }
        let surplus = state.driver_features & !self.offered();
        if state.status & status::FEATURES_OK != 0 && surplus != 0 {
            return invalid(format!(
                "the guest uses features {surplus:#x}, which this VMM's device does not have"
            ));
        }
        Ok(())
    }

    fn reactivate(&mut self, name: &str, positions: &[RingPosition]) -> Result<(), RestoreError> {
        let mut queues = self.build_queues().map_err(|detail| RestoreError::invalid(name, detail))?;
        if positions.len() != queues.len() {
            let (found, needed) = (positions.len(), queues.len());
            let detail = format!("positions of {found} queues were saved; {needed} are active");
            return Err(RestoreError::invalid(name, detail));
        }
        for (queue, position) in queues.iter_mut().zip(positions) {
            queue.set_next_avail(position.next_available);
            queue.set_next_used(position.next_used);
        }
        let context = ActiveContext {
            memory: self.memory.clone(),
            interrupt: self.irq.clone(),
            features: self.driver_features,
        };
        self.device.activate(context, queues).map_err(|error| RestoreError::invalid(name, error))
    }

    /// What was on its way when the state was saved is set going again: doorbells that were rung, interrupts that KVM had not
    /// delivered. A spurious one costs the guest a look.
    fn wake_all(&self, interrupt_status: u32, config: &[u8]) {
        let _ = self.wake.write(1);
        for index in 0..self.doorbells.len() {
            self.ring(index);
        }
        self.irq.raise_again(interrupt_status);
        if self.config_space() != config {
            self.irq.config_changed();
        }
    }
}
