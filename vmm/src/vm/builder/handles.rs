//! The handles of devices, as the VM sees them.

use std::fs::File;
use std::io;
use std::ops::RangeInclusive;
use std::os::unix::net::UnixStream;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};

use super::super::{DiskSlot, FilesystemSlot, Gauges, Merging, NetworkSlot, Refusal, Replace, Settle};
use crate::api::{BalloonMetrics, BlkMetrics, FsMetrics, NetMetrics, VsockMetrics};
use crate::backend::disk::Frozen;
use crate::config::Network;
use crate::devices::serial::{ConsoleCounters, SerialPort};
use crate::devices::virtio::balloon::BalloonHandle;
use crate::devices::virtio::blk::BlkHandle;
use crate::devices::virtio::fs::FsHandle;
use crate::devices::virtio::net::NetHandle;
use crate::devices::virtio::transport::MmioTransport;
use crate::devices::virtio::vsock::VsockHandle;
use crate::snapshot::{PartState, Persist, SaveError};

/// A device behind the lock that it has on the bus.
pub(super) struct Part<T>(pub(super) Arc<Mutex<T>>);

impl Persist for Part<MmioTransport> {
    fn save(&self) -> Result<PartState, SaveError> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).save()
    }
}

impl Persist for Part<SerialPort> {
    fn save(&self) -> Result<PartState, SaveError> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).save()
    }
}

impl DiskSlot for BlkHandle {
    fn serial(&self) -> String {
        self.serial()
    }

    fn read_only(&self) -> bool {
        self.read_only()
    }

    fn is_free(&self) -> bool {
        self.is_free()
    }

    fn attach(&self, file: File, below: Vec<File>) -> Result<(), Refusal> {
        Ok(self.attach(file, below)?)
    }

    fn stage(&self, file: File) -> Result<(), Refusal> {
        Ok(self.stage(file)?)
    }

    fn unstage(&self) {
        self.unstage();
    }

    fn is_staged(&self) -> bool {
        self.is_staged()
    }

    fn switch(&self) -> Option<usize> {
        self.switch()
    }

    fn unsettled(&self) -> Vec<Settle> {
        let settle = |frozen: Arc<Frozen>| -> Settle { (self.serial(), Box::new(move || frozen.settle())) };
        self.unsettled().into_iter().map(settle).collect()
    }

    fn merge(&self, numbers: RangeInclusive<usize>, file: File) -> Result<Merging, Refusal> {
        let (merge, handle) = (self.merge(numbers, file)?, self.clone());
        Ok(Box::new(move || {
            let merged = merge.run()?;
            Ok(Box::new(move || Ok(handle.replace(merged)?)) as Replace)
        }))
    }

    fn close(&self) -> io::Result<()> {
        self.close()
    }

    fn metrics(&self) -> BlkMetrics {
        self.metrics()
    }
}

impl FilesystemSlot for FsHandle {
    fn attach(&self, sockets: Vec<UnixStream>) -> Result<(), Refusal> {
        Ok(self.attach(sockets)?)
    }

    fn awaits_server(&self) -> bool {
        self.awaits_server()
    }

    fn hold(&self, held: bool) {
        self.hold(held);
    }

    fn in_flight(&self) -> usize {
        self.in_flight()
    }

    fn metrics(&self) -> FsMetrics {
        self.metrics()
    }
}

impl NetworkSlot for NetHandle {
    fn attach(&self, network: Network) -> Result<(), Refusal> {
        let Network { tap, to_guest, from_guest, .. } = network;
        Ok(self.attach(tap, to_guest, from_guest)?)
    }

    fn detach(&self) -> Result<(), Refusal> {
        Ok(self.detach()?)
    }

    fn metrics(&self) -> NetMetrics {
        self.metrics()
    }
}

pub(super) struct DeviceGauges {
    pub(super) console: Arc<ConsoleCounters>,
    pub(super) vsock: Option<VsockHandle>,
    pub(super) balloon: BalloonHandle,
}

impl Gauges for DeviceGauges {
    fn unsent(&self) -> u64 {
        self.vsock.as_ref().map_or(0, VsockHandle::unsent)
    }

    fn resumed(&self) {
        if let Some(vsock) = &self.vsock {
            vsock.resumed();
        }
    }

    fn vsock(&self) -> VsockMetrics {
        self.vsock.as_ref().map(VsockHandle::metrics).unwrap_or_default()
    }

    fn balloon(&self) -> BalloonMetrics {
        self.balloon.metrics()
    }

    fn set_balloon(&self, mib: u64) {
        self.balloon.set_target(mib);
    }

    fn console(&self) -> (u64, u64) {
        (self.console.bytes.load(Ordering::Relaxed), self.console.dropped.load(Ordering::Relaxed))
    }
}
