//! What is done for disks on threads of its own, because it takes as long as the host's disk does, and how the event
//! loop hears of it.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, Sender};
use std::time::Duration;

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::api::{Event, Failure, FailureCode};
use crate::vm::{Merging, Replace, Settle};

enum Finished {
    Settled { layer_id: String, result: Result<(), Failure> },
    Merged { serial: String, result: Result<Replace, Failure> },
}

/// Owned by the event loop; the threads have clones of the sender and the descriptor.
pub(super) struct DiskWork {
    sender: Sender<Finished>,
    receiver: Receiver<Finished>,
    /// Readable when something has finished.
    ready: Arc<EventFd>,
    /// Snapshots whose disks are not durable yet.
    settling: usize,
}

impl DiskWork {
    pub(super) fn new() -> io::Result<Self> {
        let (sender, receiver) = mpsc::channel();
        let ready = Arc::new(EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?);
        Ok(Self { sender, receiver, ready, settling: 0 })
    }

    /// Makes the frozen layers durable that a snapshot has captured. The peer hears of it in any case.
    pub(super) fn settle(&mut self, layer_id: String, layers: Vec<Settle>) {
        self.settling += 1;
        let id = layer_id.clone();
        let spawned = self.spawn("settle", move || {
            let settle = |(serial, settle): Settle| {
                settle().map_err(|error| Failure {
                    code: FailureCode::HostUnfit,
                    message: format!("disk {serial}: make its frozen layer durable: {error}"),
                })
            };
            Finished::Settled { layer_id, result: layers.into_iter().try_for_each(settle) }
        });
        if let Err(failure) = spawned {
            tell(&self.sender, &self.ready, Finished::Settled { layer_id: id, result: Err(failure) });
        }
    }

    /// Merges layers of a disk, in which the guest's own work goes on.
    pub(super) fn merge(&self, serial: String, merging: Merging) -> Result<(), Failure> {
        self.spawn("merge", move || {
            let result = merging().map_err(|error| unmerged(&serial, &*error));
            Finished::Merged { serial, result }
        })
    }

    fn spawn(
        &self,
        name: &'static str,
        work: impl FnOnce() -> Finished + Send + 'static,
    ) -> Result<(), Failure> {
        let (sender, ready) = (self.sender.clone(), Arc::clone(&self.ready));
        let spawned =
            std::thread::Builder::new().name(name.into()).spawn(move || tell(&sender, &ready, work()));
        spawned.map(drop).map_err(|error| Failure {
            code: FailureCode::HostUnfit,
            message: format!("{name}: start a thread: {error}"),
        })
    }

    pub(super) fn is_settling(&self) -> bool {
        self.settling > 0
    }

    /// What has finished since; waits so long for the first. Merged layers are put into their disks.
    pub(super) fn finished(&mut self, patience: Duration) -> Vec<Event> {
        // It fails only when there is nothing to read.
        let _ = self.ready.read();
        let first = self.receiver.recv_timeout(patience).ok();
        let all: Vec<Finished> = first.into_iter().chain(self.receiver.try_iter()).collect();
        all.into_iter().map(|finished| self.event(finished)).collect()
    }

    fn event(&mut self, finished: Finished) -> Event {
        match finished {
            Finished::Settled { layer_id, result } => {
                self.settling -= 1;
                Event::DisksSettled { layer_id, result }
            }
            Finished::Merged { serial, result } => {
                let result = result.and_then(|replace| replace().map_err(|error| unmerged(&serial, &*error)));
                Event::DiskMerged { serial, result }
            }
        }
    }
}

impl AsRawFd for DiskWork {
    fn as_raw_fd(&self) -> RawFd {
        self.ready.as_raw_fd()
    }
}

fn tell(sender: &Sender<Finished>, ready: &EventFd, finished: Finished) {
    // It fails only when the loop has ended.
    let _ = sender.send(finished);
    // It fails only when the counter is at its largest, and then it is ready.
    let _ = ready.write(1);
}

fn unmerged(serial: &str, error: &(dyn std::error::Error + Send + Sync)) -> Failure {
    Failure { code: FailureCode::HostUnfit, message: format!("disk {serial}: merge layers: {error}") }
}
