//! The block device and the handle that the control plane holds.

use std::fs::File;
use std::ops::RangeInclusive;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use virtio_queue::Queue;

use super::request::{self, Outcome, Warnings};
use super::spec;
use super::state::{BlkStateV1, VERSION};
use crate::api::BlkMetrics;
use crate::backend::disk::{Disk, DiskError, Frozen, Merge, MergeError, Merged};
use crate::devices::virtio::queue::DeviceQueue;
use crate::devices::virtio::{
    ActiveContext, DeviceError, Interrupt, Pending, Saved, VirtioDevice, read_space,
};
use crate::snapshot::contract::{PartState, RestoreError, SaveError};

const DEVICE: &str = "blk";
/// Bytes moved in one call before other devices get their turn, and before the guest is told
/// of what is done.
const BUDGET_BYTES: usize = 4 << 20;

/// Why a disk could not be attached. The slot is as it was.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    #[error("attach a disk to slot {serial}: the slot has a disk already; take a free slot")]
    Occupied { serial: String },
    #[error("attach a disk to slot {serial}: {source}")]
    Disk { serial: String, source: DiskError },
}

/// Why a disk could not be captured. It is as it was.
#[derive(Debug, thiserror::Error)]
pub enum CaptureError {
    #[error("capture the disk in slot {serial}: the slot has no disk")]
    Empty { serial: String },
    #[error("capture the disk in slot {serial}: the slot is read-only, so it never changes")]
    ReadOnly { serial: String },
    #[error("stage a layer for the disk in slot {serial}: {source}")]
    Stage { serial: String, source: DiskError },
    #[error("merge layers of the disk in slot {serial}: {source}")]
    Merge { serial: String, source: MergeError },
}

/// What device and handle share.
#[derive(Default)]
pub(super) struct Slot {
    pub(super) serial: String,
    pub(super) read_only: bool,
    pub(super) disk: Option<Disk>,
    pub(super) metrics: BlkMetrics,
    /// Set when a transport took the device.
    interrupt: Option<Arc<dyn Interrupt>>,
}

fn lock(slot: &Mutex<Slot>) -> MutexGuard<'_, Slot> {
    slot.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A block device for one slot.
pub struct Blk {
    name: String,
    read_only: bool,
    slot: Arc<Mutex<Slot>>,
    active: Option<(ActiveContext, DeviceQueue)>,
    warnings: Warnings,
}

/// The control plane's end of a slot; cheap to clone, usable from any thread, before and
/// after activation. Lock order: transport → this.
#[derive(Clone)]
pub struct BlkHandle(Arc<Mutex<Slot>>);

impl BlkHandle {
    /// Gives the slot its disk, `file` over the layers `below` it from the bottom up, and tells the guest of
    /// the new capacity.
    pub fn attach(&self, file: File, below: Vec<File>) -> Result<(), AttachError> {
        let mut slot = lock(&self.0);
        if slot.disk.is_some() {
            return Err(AttachError::Occupied { serial: slot.serial.clone() });
        }
        let disk = Disk::open(file, below, !slot.read_only)
            .map_err(|source| AttachError::Disk { serial: slot.serial.clone(), source })?;
        slot.disk = Some(disk);
        if let Some(interrupt) = slot.interrupt.clone() {
            drop(slot);
            interrupt.config_changed();
        }
        Ok(())
    }

    /// Makes `file`, new and empty, the layer that the next [`Self::switch`] goes on in.
    pub fn stage(&self, file: File) -> Result<(), CaptureError> {
        self.writable(|serial, disk| {
            disk.stage(file).map_err(|source| CaptureError::Stage { serial, source })
        })
    }

    /// Forgets a staged file.
    pub fn unstage(&self) {
        if let Some(disk) = &mut lock(&self.0).disk {
            disk.unstage();
        }
    }

    pub fn is_staged(&self) -> bool {
        lock(&self.0).disk.as_ref().is_some_and(Disk::is_staged)
    }

    /// See [`Disk::switch`].
    pub fn switch(&self) -> Option<usize> {
        lock(&self.0).disk.as_mut().and_then(Disk::switch)
    }

    /// The frozen layers that may not be durable yet.
    pub fn unsettled(&self) -> Vec<Arc<Frozen>> {
        lock(&self.0).disk.as_mut().map(Disk::unsettled).unwrap_or_default()
    }

    /// See [`Disk::merge`].
    pub fn merge(&self, numbers: RangeInclusive<usize>, file: File) -> Result<Merge, CaptureError> {
        self.writable(|serial, disk| {
            disk.merge(numbers, file).map_err(|source| CaptureError::Merge { serial, source })
        })
    }

    /// See [`Disk::replace`].
    pub fn replace(&self, merged: Merged) -> Result<(), CaptureError> {
        self.writable(|serial, disk| {
            disk.replace(merged).map_err(|source| CaptureError::Merge { serial, source })
        })
    }

    /// See [`Disk::close`]; the disk stays.
    pub fn close(&self) -> std::io::Result<()> {
        lock(&self.0).disk.as_mut().map_or(Ok(()), Disk::close)
    }

    fn writable<T>(
        &self,
        work: impl FnOnce(String, &mut Disk) -> Result<T, CaptureError>,
    ) -> Result<T, CaptureError> {
        let mut slot = lock(&self.0);
        let serial = slot.serial.clone();
        if slot.read_only {
            return Err(CaptureError::ReadOnly { serial });
        }
        match &mut slot.disk {
            Some(disk) => work(serial, disk),
            None => Err(CaptureError::Empty { serial }),
        }
    }

    /// Whether the slot has no disk yet.
    pub fn is_free(&self) -> bool {
        lock(&self.0).disk.is_none()
    }

    pub fn read_only(&self) -> bool {
        lock(&self.0).read_only
    }

    /// The slot's serial, by which the guest finds the disk.
    pub fn serial(&self) -> String {
        lock(&self.0).serial.clone()
    }

    pub fn metrics(&self) -> BlkMetrics {
        lock(&self.0).metrics.clone()
    }
}

impl std::fmt::Debug for BlkHandle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let slot = lock(&self.0);
        f.debug_struct("BlkHandle")
            .field("serial", &slot.serial)
            .field("disk", &slot.disk)
            .finish_non_exhaustive()
    }
}

impl std::fmt::Debug for Blk {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Blk").field("name", &self.name).finish_non_exhaustive()
    }
}

impl Blk {
    /// An empty slot. The guest reads `serial` (its first 20 bytes) by GET_ID.
    pub fn new(serial: String, read_only: bool) -> Self {
        let name = format!("{DEVICE}-{serial}");
        let metrics = BlkMetrics { serial: serial.clone(), ..BlkMetrics::default() };
        let slot = Slot { serial, read_only, metrics, ..Slot::default() };
        Self {
            name,
            read_only,
            slot: Arc::new(Mutex::new(slot)),
            active: None,
            warnings: Warnings::default(),
        }
    }

    pub fn handle(&self) -> BlkHandle {
        BlkHandle(self.slot.clone())
    }
}

impl VirtioDevice for Blk {
    fn device_type(&self) -> u32 {
        spec::DEVICE_TYPE
    }

    fn name(&self) -> &str {
        &self.name
    }

    fn connect(&mut self, interrupt: Arc<dyn Interrupt>) {
        lock(&self.slot).interrupt = Some(interrupt);
    }

    fn features(&self) -> u64 {
        spec::features(self.read_only)
    }

    fn queue_sizes(&self) -> &[u16] {
        &spec::QUEUE_SIZES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let capacity = lock(&self.slot).disk.as_ref().map_or(0, Disk::sectors);
        let config = spec::config(capacity, self.read_only);
        read_space(&config, offset, data);
    }

    fn activate(&mut self, context: ActiveContext, queues: Vec<Queue>) -> Result<(), DeviceError> {
        self.active = queues.into_iter().next().map(|queue| (context, DeviceQueue::new(queue, 0, DEVICE)));
        Ok(())
    }

    fn reset(&mut self) {
        self.active = None;
    }

    fn save(&self) -> Result<Saved, SaveError> {
        let positions = self.active.iter().map(|(_, queue)| queue.position(0)).collect();
        let state = BlkStateV1 { sectors: lock(&self.slot).disk.as_ref().map(Disk::sectors) };
        Ok(Saved { positions, own: PartState::new(&self.name, VERSION, &state)? })
    }

    fn restore(&mut self, own: &PartState) -> Result<(), RestoreError> {
        let BlkStateV1 { sectors } = own.read(&self.name, VERSION)?;
        let found = lock(&self.slot).disk.as_ref().map(Disk::sectors);
        match (sectors, found) {
            (Some(saved), Some(found)) if saved != found => Err(RestoreError::invalid(
                &self.name,
                format!(
                    "the disk has {found} sectors, and had {saved} when it was saved: it is another disk"
                ),
            )),
            (Some(_), None) => {
                Err(RestoreError::invalid(&self.name, "the saved VM had a disk here, and none is given"))
            }
            _ => Ok(()),
        }
    }

    fn process_queue(&mut self, _index: u16) -> Result<Pending, DeviceError> {
        let Some((context, queue)) = &mut self.active else { return Ok(Pending::NONE) };
        let memory = &context.memory;
        let mut slot = lock(&self.slot);
        let (mut requests, mut bytes, mut completed) = (queue.size(), 0, false);
        queue.disable_notification(memory)?;
        let pending = loop {
            let Some(chain) = queue.pop(memory)? else {
                if queue.enable_notification(memory)? {
                    continue;
                }
                break Pending::NONE;
            };
            let Outcome { written, moved } =
                request::serve(&chain, &mut slot, context.features, &self.name, &self.warnings)
                    .ok_or_else(|| queue.driver_error("request has no room for a status"))?;
            queue.complete(memory, chain.head, written)?;
            completed = true;
            requests -= 1;
            bytes += moved;
            if requests == 0 || bytes >= BUDGET_BYTES {
                break Pending::queue(0);
            }
        };
        if completed && queue.needs_interrupt(memory)? {
            context.interrupt.used();
        }
        Ok(pending)
    }
}
