//! How a VM is saved, and how one comes out of what was saved.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io;
use std::ops::RangeInclusive;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use slog::info;
use spore_vmm::api::{
    Call, Failure, FdIndex, LayerConfig, NextLayer, PROTOCOL_VERSION, Reply, RestoreConfig, RestoredDisk,
    SnapshotConfig, SnapshotReport, SnapshotTimes,
};
use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe;
use tokio::sync::oneshot;

use super::{Vm, VmError, build, unexpected};
use crate::volumes::{FileServer, SavedVolumes};

/// What writing a snapshot may take.
const WRITE_DEADLINE: Duration = Duration::from_secs(600);
/// Most bytes of a report that are read.
const MOST_REPORT: u64 = 64 * 1024;

/// Where a VM is saved to: empty files.
pub(crate) struct Destination<'a> {
    pub(crate) state: &'a File,
    pub(crate) memory: &'a File,
    /// The id of the memory layer.
    pub(crate) layer: &'a str,
    /// The VM's writable disks, all of them, by serial: the files that they go on in.
    pub(crate) disks: &'a [(&'a str, &'a File)],
}

/// A saved VM.
pub(crate) struct Image<'a> {
    /// Of a VM that was forked off a zygote nothing: it has its state and memory already.
    pub(crate) state: Option<&'a File>,
    /// Memory layers by id; without a state those that the zygote's VM was restored from.
    pub(crate) layers: Vec<(String, &'a File)>,
    pub(crate) disks: Vec<ImageDisk<'a>>,
}

/// A disk for the slot of this serial.
pub(crate) struct ImageDisk<'a> {
    pub(crate) serial: &'a str,
    pub(crate) top: &'a File,
    /// From the bottom up.
    pub(crate) below: &'a [File],
}

/// What becomes of a VM that is saved.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Then {
    GoOn,
    /// It stands still, unless saving it failed.
    Stand,
}

type Outcome = Result<(), Failure>;

/// Who waits for the disks of a snapshot, by its layer's id, or for layers of a disk to be merged, by its serial, which is like no
/// id.
#[derive(Clone, Default)]
pub(super) struct Settling(Arc<Mutex<HashMap<String, oneshot::Sender<Outcome>>>>);

impl Settling {
    fn waiting(&self) -> std::sync::MutexGuard<'_, HashMap<String, oneshot::Sender<Outcome>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn expect(&self, layer: &str) -> oneshot::Receiver<Outcome> {
        let (sender, receiver) = oneshot::channel();
        self.waiting().insert(layer.into(), sender);
        receiver
    }

    pub(super) fn settled(&self, layer: &str, outcome: Outcome) {
        if let Some(waiting) = self.waiting().remove(layer) {
            let _ = waiting.send(outcome);
        }
    }

    fn forget(&self, layer: &str) {
        self.waiting().remove(layer);
    }

    /// Nothing can follow any more.
    pub(super) fn end(&self) {
        self.waiting().clear();
    }
}

/// A VM whose state is being written by a process of its own.
pub(crate) struct Saved {
    /// How long that held the VM up.
    pub(crate) times: SnapshotTimes,
    report: pipe::Receiver,
    settled: Option<oneshot::Receiver<Outcome>>,
    /// What its guest knows of the host's files, if it has some.
    pub(crate) volumes: Option<SavedVolumes>,
}

/// What became of a VM that was copied at rest.
pub(super) trait Copied {
    /// How long that held it up, and what its guest knows of the host's files.
    fn parts(&mut self) -> (&mut SnapshotTimes, &mut Option<SavedVolumes>);
}

impl Copied for Saved {
    fn parts(&mut self) -> (&mut SnapshotTimes, &mut Option<SavedVolumes>) {
        (&mut self.times, &mut self.volumes)
    }
}

/// Asks a server for its tables.
async fn tables(server: Arc<FileServer>) -> Result<SavedVolumes, VmError> {
    let operation = "save the file server's tables";
    let refused = |message| VmError::Refused { operation, message };
    match tokio::task::spawn_blocking(move || server.save()).await {
        Ok(saved) => saved.map_err(|error| refused(error.to_string())),
        Err(error) => Err(refused(error.to_string())),
    }
}

impl Saved {
    /// Waits until all of it is on disk; the ids of the memory layers that it needs. The writer
    /// gives up by itself at its deadline.
    pub(crate) async fn written(self) -> Result<Vec<String>, VmError> {
        let operation = "write a snapshot";
        let refused = |message| VmError::Refused { operation, message };
        let mut text = Vec::new();
        let mut report = self.report.take(MOST_REPORT);
        report.read_to_end(&mut text).await.map_err(|source| VmError::Host { operation, source })?;
        if text.is_empty() {
            return Err(refused("its writer was killed".into()));
        }
        let layers = match serde_json::from_slice(&text) {
            Ok(SnapshotReport::Done(done)) => done.layers.into_iter().map(|layer| layer.id).collect(),
            Ok(SnapshotReport::Failed(failure)) => return Err(refused(failure.message)),
            Err(error) => return Err(refused(format!("a report that makes no sense: {error}"))),
        };
        let Some(settled) = self.settled else { return Ok(layers) };
        match tokio::time::timeout(WRITE_DEADLINE, settled).await {
            Ok(Ok(Ok(()))) => Ok(layers),
            Ok(Ok(Err(failure))) => Err(refused(failure.message)),
            Ok(Err(_)) => Err(refused("the virtual machine ended before its disks were written back".into())),
            Err(_) => Err(VmError::Stuck { operation, seconds: WRITE_DEADLINE.as_secs() }),
        }
    }
}

/// Descriptors of one call, and their places.
#[derive(Default)]
pub(super) struct Attached(pub(super) Vec<RawFd>);

impl Attached {
    pub(super) fn add(&mut self, file: &impl AsRawFd) -> FdIndex {
        self.0.push(file.as_raw_fd());
        FdIndex(u32::try_from(self.0.len() - 1).unwrap_or(u32::MAX))
    }

    /// The files that disks go on in, by serial.
    pub(super) fn next_layers(&mut self, disks: &[(&str, &File)]) -> Vec<NextLayer> {
        let next =
            |(serial, file): &(&str, &File)| NextLayer { serial: (*serial).into(), file: self.add(*file) };
        disks.iter().map(next).collect()
    }
}

impl Vm {
    /// Makes this VM the one that was saved, paused. Its memory is read from the layers as it is touched.
    pub(super) async fn restore(
        &self,
        (kvm, console, listener): (RawFd, RawFd, RawFd),
        image: &Image<'_>,
    ) -> Result<(), VmError> {
        let mut fds = Attached(vec![kvm, console, listener]);
        let state = image.state.map(|state| fds.add(state));
        let layers = image.layers.iter().filter(|_| state.is_some());
        let layers = layers.map(|(id, file)| LayerConfig { id: id.clone(), file: fds.add(*file) }).collect();
        let mut disks = Vec::new();
        for disk in &image.disks {
            let file = fds.add(disk.top);
            let below = disk.below.iter().map(|file| fds.add(file)).collect();
            disks.push(RestoredDisk { serial: disk.serial.into(), file, below });
        }
        let configuration = RestoreConfig {
            protocol: PROTOCOL_VERSION,
            huge_pages: self.machine.huge_pages,
            kvm: FdIndex(0),
            state,
            layers,
            console: Some(build::console()),
            vsock: Some(build::vsock()),
            disks,
        };
        match self.call("restore", Call::Restore(configuration), &fds.0).await? {
            Reply::Restored { .. } => {}
            other => return Err(unexpected("restore", &other)),
        }
        // Snapshots of this VM are made above these.
        let copied = image.layers.iter().map(|(id, file)| Ok((id.clone(), file.try_clone()?)));
        let copied = copied.collect::<io::Result<_>>();
        *self.origin.lock().unwrap_or_else(PoisonError::into_inner) =
            copied.map_err(|source| VmError::Host { operation: "restore", source })?;
        Ok(())
    }

    pub(crate) async fn pause(&self) -> Result<(), VmError> {
        self.call("pause", Call::Pause, &[]).await.map(drop)
    }

    pub(crate) async fn resume(&self) -> Result<(), VmError> {
        self.call("resume", Call::Resume, &[]).await.map(drop)
    }

    /// The memory layers that it was restored from.
    pub(crate) fn origin(&self) -> io::Result<Vec<(String, File)>> {
        let origin = self.origin.lock().unwrap_or_else(PoisonError::into_inner);
        origin.iter().map(|(id, file)| Ok((id.clone(), file.try_clone()?))).collect()
    }

    /// Makes one layer, in this empty file, of those of a writable disk with these numbers, counted from the lowest, 0, while the guest
    /// goes on. Returns when it has taken their place, durably. When the VMM refuses, the disk is as it was.
    pub(crate) async fn merge_disk(
        &self,
        serial: &str,
        numbers: RangeInclusive<usize>,
        file: &File,
    ) -> Result<(), VmError> {
        let operation = "merge layers of a disk";
        let number = |at: usize| u32::try_from(at).unwrap_or(u32::MAX);
        let (first, last) = (number(*numbers.start()), number(*numbers.end()));
        let mut fds = Attached::default();
        let call = Call::MergeDisk { serial: serial.into(), first, last, file: fds.add(file) };
        let merged = self.settling.expect(serial);
        if let Err(error) = self.call(operation, call, &fds.0).await {
            self.settling.forget(serial);
            return Err(error);
        }
        // It takes as long as the host's disk does.
        match merged.await {
            Ok(outcome) => {
                outcome.map_err(|failure| VmError::Refused { operation, message: failure.message })
            }
            Err(_) => Err(self.ended_error(operation, self.ended().await.cause)),
        }
    }

    /// Saves the VM, with its disks, as it is now. Returns when it goes on, or, if it shall `stand`, stands still. When it refuses, it
    /// goes on with the files that the disks had; when it has ended or does not answer, nobody knows.
    pub(crate) async fn save(&self, to: &Destination<'_>, then: Then) -> Result<Saved, VmError> {
        self.at_rest(then, self.snapshot(to)).await
    }

    /// Has the VM copied with the tables of its file server.
    pub(super) async fn at_rest<T: Copied>(
        &self,
        then: Then,
        copy: impl Future<Output = Result<T, VmError>>,
    ) -> Result<T, VmError> {
        let (server, stand) = (self.file_server(), then == Then::Stand);
        if server.is_none() && !stand {
            return copy.await;
        }
        // The container's being frozen is not enough: the guest's kernel goes on closing and forgetting files. Of a
        // paused VM no request is at the server, so its tables are of the memory's instant.
        let paused = Instant::now();
        self.pause().await?;
        let mut taken = async {
            let begun = Instant::now();
            let volumes = match server {
                Some(server) => Some(tables(server).await?),
                None => None,
            };
            let tables_us = u64::try_from(begun.elapsed().as_micros()).unwrap_or(u64::MAX);
            let mut copied = copy.await?;
            if volumes.is_some() {
                info!(self.log, "the file server's tables are saved"; "paused_us" => tables_us);
            }
            *copied.parts().1 = volumes;
            Ok(copied)
        }
        .await;
        if !(stand && taken.is_ok())
            && let Err(error) = self.resume().await
        {
            // It can neither go on nor be what it was.
            self.kill().await;
            return Err(error);
        }
        if let Ok(copied) = &mut taken {
            // The VMM knows only of its own part of it.
            copied.parts().0.pause_ns = u64::try_from(paused.elapsed().as_nanos()).unwrap_or(u64::MAX);
        }
        taken
    }

    async fn snapshot(&self, to: &Destination<'_>) -> Result<Saved, VmError> {
        let host = |operation| move |source| VmError::Host { operation, source };
        let procfs = OpenOptions::new().read(true).custom_flags(libc::O_PATH).open("/proc");
        let procfs = procfs.map_err(host("open /proc"))?;
        let (sender, receiver) = pipe::pipe().map_err(host("make a pipe"))?;
        let sender: OwnedFd = sender.into_blocking_fd().map_err(host("make a pipe"))?;
        let mut fds = Attached::default();
        let configuration = SnapshotConfig {
            state: fds.add(to.state),
            memory: fds.add(to.memory),
            report: fds.add(&sender),
            procfs: fds.add(&procfs),
            layer_id: to.layer.into(),
            deadline_ms: u64::try_from(WRITE_DEADLINE.as_millis()).unwrap_or(u64::MAX),
            disks: fds.next_layers(to.disks),
        };
        let settled = (!to.disks.is_empty()).then(|| self.settling.expect(to.layer));
        let answer = self.call("save", Call::Snapshot(configuration), &fds.0).await;
        if answer.is_err() {
            self.settling.forget(to.layer);
        }
        match answer? {
            Reply::Snapshotted { times, .. } => {
                info!(self.log, "the guest is saved"; "layer" => to.layer, "pause_us" => times.pause_ns / 1000,
                    "save_us" => times.save_ns / 1000, "fork_us" => times.fork_ns / 1000);
                Ok(Saved { times, report: receiver, settled, volumes: None })
            }
            other => Err(unexpected("save", &other)),
        }
    }
}
