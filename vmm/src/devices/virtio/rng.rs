//! Entropy device (virtio 1.2, 5.4): fills the guest's buffers from the host's generator.
//!
//! It has no state to save: what is in flight between two calls is nothing.

#[cfg(test)]
mod tests;

use virtio_queue::Queue;

use super::queue::DeviceQueue;
use super::transport::{F_EVENT_IDX, F_INDIRECT_DESC};
use super::{ActiveContext, DeviceError, Pending, Saved, VirtioDevice};
use crate::backend::entropy;
use crate::snapshot::contract::{PartState, RestoreError, SaveError};

const DEVICE: &str = "rng";
const DEVICE_TYPE: u32 = 4;
const QUEUE_SIZES: [u16; 1] = [64];
/// Most bytes given for one request. Linux asks for 64 or fewer; a device may give less
/// than the buffer holds (5.4.6.1).
const MAX_REQUEST: usize = 4096;

/// The entropy device.
#[derive(Default)]
pub struct Rng {
    active: Option<(ActiveContext, DeviceQueue)>,
}

impl std::fmt::Debug for Rng {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Rng").field("active", &self.active.is_some()).finish()
    }
}

impl Rng {
    pub fn new() -> Self {
        Self::default()
    }
}

impl VirtioDevice for Rng {
    fn device_type(&self) -> u32 {
        DEVICE_TYPE
    }

    fn name(&self) -> &str {
        DEVICE
    }

    fn features(&self) -> u64 {
        F_INDIRECT_DESC | F_EVENT_IDX
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, _offset: u64, _data: &mut [u8]) {}

    fn activate(&mut self, context: ActiveContext, queues: Vec<Queue>) -> Result<(), DeviceError> {
        self.active = queues.into_iter().next().map(|queue| (context, DeviceQueue::new(queue, 0, DEVICE)));
        Ok(())
    }

    fn reset(&mut self) {
        self.active = None;
    }

    fn save(&self) -> Result<Saved, SaveError> {
        let positions = self.active.iter().map(|(_, queue)| queue.position(0)).collect();
        Ok(Saved { positions, own: PartState::none() })
    }

    fn restore(&mut self, own: &PartState) -> Result<(), RestoreError> {
        own.check_version(DEVICE, 1)
    }

    fn process_queue(&mut self, _index: u16) -> Result<Pending, DeviceError> {
        let Some((context, queue)) = &mut self.active else { return Ok(Pending::NONE) };
        let memory = &context.memory;
        let mut completed = false;
        let mut budget = queue.size();
        let pending = loop {
            let Some(chain) = queue.pop(memory)? else {
                if queue.enable_notification(memory)? {
                    continue;
                }
                break Pending::NONE;
            };
            if chain.writable.is_empty() || !chain.readable.is_empty() {
                return Err(queue.driver_error("a request for entropy must have writable buffers only"));
            }
            let mut bytes = [0; MAX_REQUEST];
            let wanted = chain.writable.len().min(MAX_REQUEST);
            entropy::fill(&mut bytes[..wanted]).map_err(|source| DeviceError::Host {
                device: DEVICE,
                detail: "read entropy".into(),
                source,
            })?;
            let written = chain.writable.write_at(0, &bytes[..wanted]);
            queue.complete(memory, chain.head, written)?;
            completed = true;
            budget -= 1;
            if budget == 0 {
                break Pending::queue(0);
            }
        };
        if completed && queue.needs_interrupt(memory)? {
            context.interrupt.used();
        }
        Ok(pending)
    }
}
