//! The balloon device and the handle that the control plane holds.

use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use virtio_queue::Queue;

use super::state::{BalloonStateV1, VERSION};
use super::{pages, spec};
use crate::api::BalloonMetrics;
use crate::devices::virtio::queue::DeviceQueue;
use crate::devices::virtio::{
    ActiveContext, DeviceError, Interrupt, Pending, Saved, VirtioDevice, read_space,
};
use crate::log::Limited;
use crate::memory::Discard;
use crate::snapshot::contract::{PartState, RestoreError, SaveError};

const DEVICE: &str = "balloon";
/// Memory given back in one call before other devices get their turn. Freeing it costs the host
/// some milliseconds where it was made of small pages.
const BUDGET: u64 = 32 << 20;
/// What a request or a range costs of that budget whatever its size.
const CALL_COST: u64 = 64 << 10;

/// What device and handle share.
#[derive(Default)]
struct Shared {
    /// Pages that the host wants the balloon to hold.
    target: u32,
    /// Pages that the driver says it holds: any number, from the guest.
    actual: u32,
    inflated_bytes: u64,
    reported_bytes: u64,
    /// Set when a transport took the device.
    interrupt: Option<Arc<dyn Interrupt>>,
}

fn lock(shared: &Mutex<Shared>) -> MutexGuard<'_, Shared> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The control plane's end of the balloon; cheap to clone, usable from any thread, before and
/// after activation. Lock order: transport → this.
#[derive(Clone)]
pub struct BalloonHandle(Arc<Mutex<Shared>>);

impl BalloonHandle {
    /// Asks the driver for a balloon of `mib` MiB. It follows in its own time.
    pub fn set_target(&self, mib: u64) {
        let pages = u32::try_from((mib << 20) / spec::PAGE).unwrap_or(u32::MAX);
        let mut shared = lock(&self.0);
        shared.target = pages;
        let interrupt = shared.interrupt.clone();
        drop(shared);
        if let Some(interrupt) = interrupt {
            interrupt.config_changed();
        }
    }

    pub fn metrics(&self) -> BalloonMetrics {
        let shared = lock(&self.0);
        BalloonMetrics {
            target_bytes: u64::from(shared.target) * spec::PAGE,
            actual_bytes: u64::from(shared.actual) * spec::PAGE,
            inflated_bytes: shared.inflated_bytes,
            reported_bytes: shared.reported_bytes,
        }
    }
}

/// The memory balloon.
#[derive(Default)]
pub struct Balloon {
    shared: Arc<Mutex<Shared>>,
    active: Option<(ActiveContext, Vec<DeviceQueue>)>,
    /// Given, or made at the first activation, and kept: a reset changes nothing about what RAM consists of.
    discard: Option<Arc<Mutex<Discard>>>,
    warnings: Warnings,
}

/// One limiter for each kind of fault, so that a flood of one does not hide the others.
#[derive(Default)]
struct Warnings {
    not_ram: Limited,
    left_out: Limited,
    host: Limited,
}

impl std::fmt::Debug for BalloonHandle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("BalloonHandle").field(&self.metrics()).finish()
    }
}

impl std::fmt::Debug for Balloon {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Balloon").field("active", &self.active.is_some()).finish_non_exhaustive()
    }
}

impl Balloon {
    pub fn new() -> Self {
        Self::default()
    }

    /// A balloon that shares the book of what its guest's RAM consists of. Lock order: transport → this.
    pub fn with_discard(discard: Arc<Mutex<Discard>>) -> Self {
        Self { discard: Some(discard), ..Self::default() }
    }

    pub fn handle(&self) -> BalloonHandle {
        BalloonHandle(Arc::clone(&self.shared))
    }
}

/// Gives a range back; what it cost of the budget, and the bytes that went.
fn give_back(discard: &mut Discard, range: Range<u64>, warnings: &Warnings) -> (u64, u64) {
    let (start, len) = (range.start, range.end.saturating_sub(range.start));
    let given = match discard.discard(range) {
        Ok(given) => given,
        // The pages stay with the guest, which is as good for it.
        Err(error) => {
            warnings.host.warn(DEVICE, format_args!("{error}"));
            return (CALL_COST, 0);
        }
    };
    if given < len {
        warnings.not_ram.warn(
            DEVICE,
            format_args!(
                "{len:#x} bytes at {start:#x}: only {given:#x} are whole pages of RAM; the rest is ignored"
            ),
        );
    }
    (CALL_COST + given, given)
}

/// One inflate request: page numbers in the readable part.
fn inflate(
    queue: &mut DeviceQueue,
    context: &ActiveContext,
    discard: &mut Discard,
    warnings: &Warnings,
) -> Result<Option<(u64, u64)>, DeviceError> {
    let Some(chain) = queue.pop(&context.memory)? else { return Ok(None) };
    if !chain.writable.is_empty() {
        return Err(queue.driver_error("a list of pages must have readable buffers only"));
    }
    let (numbers, left_out) = pages::numbers(&chain.readable);
    if left_out > 0 {
        warnings.left_out.warn(
            DEVICE,
            format_args!("a request's last {left_out} bytes are ignored: at most {} page numbers of {} bytes are served", spec::MAX_PFNS, spec::PFN),
        );
    }
    let (mut cost, mut given) = (CALL_COST, 0);
    for range in pages::ranges(&numbers) {
        let (more, bytes) = give_back(discard, range, warnings);
        cost += more;
        given += bytes;
    }
    queue.complete(&context.memory, chain.head, 0)?;
    Ok(Some((cost, given)))
}

/// One deflate request. Its pages are in the guest's RAM all the time, and come back when touched.
fn deflate(queue: &mut DeviceQueue, context: &ActiveContext) -> Result<Option<(u64, u64)>, DeviceError> {
    let Some(chain) = queue.pop(&context.memory)? else { return Ok(None) };
    if !chain.writable.is_empty() {
        return Err(queue.driver_error("a list of pages must have readable buffers only"));
    }
    queue.complete(&context.memory, chain.head, 0)?;
    Ok(Some((CALL_COST, 0)))
}

/// One report: the free ranges are the buffers themselves (5.5.6.7).
fn report(
    queue: &mut DeviceQueue,
    context: &ActiveContext,
    discard: &mut Discard,
    warnings: &Warnings,
) -> Result<Option<(u64, u64)>, DeviceError> {
    let Some(chain) = queue.hold(&context.memory)? else { return Ok(None) };
    let (mut cost, mut given, mut left) = (CALL_COST, 0, spec::MAX_REPORT);
    for &(start, len, is_writable) in chain.parts().iter().filter(|(_, len, _)| *len > 0) {
        if !is_writable {
            return Err(queue.driver_error("a report must have writable buffers only"));
        }
        let (start, wanted) = (start.0, len as u64);
        let served = wanted.min(left);
        left -= served;
        if served < wanted {
            warnings.left_out.warn(
                DEVICE,
                format_args!("a report of more than {} bytes: the rest is ignored", spec::MAX_REPORT),
            );
        }
        let (more, bytes) = give_back(discard, start..start + served, warnings);
        cost += more;
        given += bytes;
    }
    queue.complete(&context.memory, chain.head(), 0)?;
    Ok(Some((cost, given)))
}

impl VirtioDevice for Balloon {
    fn device_type(&self) -> u32 {
        spec::DEVICE_TYPE
    }

    fn name(&self) -> &str {
        DEVICE
    }

    fn connect(&mut self, interrupt: Arc<dyn Interrupt>) {
        lock(&self.shared).interrupt = Some(interrupt);
    }

    fn features(&self) -> u64 {
        spec::FEATURES
    }

    fn queue_sizes(&self) -> &[u16] {
        &spec::QUEUE_SIZES
    }

    fn needs_queue(&self, index: u16, features: u64) -> bool {
        index != spec::REPORTING || features & spec::F_REPORTING != 0
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let shared = lock(&self.shared);
        let config = spec::config(shared.target, shared.actual);
        read_space(&config, offset, data);
    }

    /// Only `actual` is the driver's to write, in one piece.
    fn write_config(&mut self, offset: u64, data: &[u8]) {
        if let (spec::ACTUAL, Ok(actual)) = (offset, <[u8; 4]>::try_from(data)) {
            lock(&self.shared).actual = u32::from_le_bytes(actual);
        }
    }

    fn activate(&mut self, context: ActiveContext, queues: Vec<Queue>) -> Result<(), DeviceError> {
        if self.discard.is_none() {
            self.discard = Some(Arc::new(Mutex::new(Discard::new(&context.memory))));
        }
        let queues = (0u16..).zip(queues).map(|(index, queue)| DeviceQueue::new(queue, index, DEVICE));
        self.active = Some((context, queues.collect()));
        Ok(())
    }

    fn reset(&mut self) {
        self.active = None;
        lock(&self.shared).actual = 0;
    }

    fn save(&self) -> Result<Saved, SaveError> {
        let queues = self.active.iter().flat_map(|(_, queues)| queues);
        let positions = queues.map(|queue| queue.position(0)).collect();
        let shared = lock(&self.shared);
        let state = BalloonStateV1 { target_pages: shared.target, actual_pages: shared.actual };
        Ok(Saved { positions, own: PartState::new(DEVICE, VERSION, &state)? })
    }

    fn restore(&mut self, own: &PartState) -> Result<(), RestoreError> {
        let BalloonStateV1 { target_pages, actual_pages } = own.read(DEVICE, VERSION)?;
        let mut shared = lock(&self.shared);
        (shared.target, shared.actual) = (target_pages, actual_pages);
        Ok(())
    }

    fn process_queue(&mut self, index: u16) -> Result<Pending, DeviceError> {
        let (Some((context, queues)), Some(discard)) = (&mut self.active, &self.discard) else {
            return Ok(Pending::NONE);
        };
        let discard = &mut *discard.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(queue) = queues.get_mut(usize::from(index)) else { return Ok(Pending::NONE) };
        let (mut spent, mut completed) = (0, false);
        let pending = loop {
            let served = match index {
                spec::INFLATE => inflate(queue, context, discard, &self.warnings)?,
                spec::DEFLATE => deflate(queue, context)?,
                _ => report(queue, context, discard, &self.warnings)?,
            };
            let Some((cost, given)) = served else {
                if queue.enable_notification(&context.memory)? {
                    continue;
                }
                break Pending::NONE;
            };
            let mut shared = lock(&self.shared);
            match index {
                spec::INFLATE => shared.inflated_bytes += given,
                _ => shared.reported_bytes += given,
            }
            drop(shared);
            completed = true;
            spent += cost;
            if spent >= BUDGET {
                break Pending::queue(index);
            }
        };
        if completed && queue.needs_interrupt(&context.memory)? {
            context.interrupt.used();
        }
        Ok(pending)
    }
}
