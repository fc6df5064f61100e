//! A task goes back to one of its snapshots, in place: another machine, restored from the snapshot, takes the place of the one that it
//! has. Its pid, its namespace, its volumes and its clients' streams stay.
//!
//! The machine that it has stands still until the other one is ready: it answers, has its streams, its network and its disk. Whatever
//! fails before that ends the other one, and the task goes on as if nothing had been asked. So does an end of the task that becomes known
//! before that. [`Container::take_place`] is the point of no return; it waits for nothing.
//!
//! Whoever is killed in between leaves VMMs that end with the shim's sockets, and a record that names both for `delete`.

mod captured;
mod next;

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use slog::{info, warn};

pub(super) use self::captured::Captured;
use self::captured::Fates;
use self::next::Next;
pub(super) use self::next::Wanted;
use super::{Container, Live, Phase};
use crate::checkpoint::{Restored, blocking};
use crate::config::Config;
use crate::error::Error;
use crate::network::Held;
use crate::rootfs::{Image, Rewind};
use crate::snapshot::manifest::Purpose;
use crate::snapshot::{SnapshotId, Store, StoreError, digest};
use crate::vm::{HostFiles, Vm, VmError};
use crate::volumes::Volume;

const ROLLBACK: &str = "rollback";
const GO_BACK: &str = "roll back";

/// What a task's machines have in common, beside their size and their disks.
pub(crate) struct Basis {
    pub(crate) hostname: String,
    pub(crate) volumes: Vec<Volume>,
}

/// How long it took, by step.
#[derive(Debug, Default, Clone, Copy)]
pub(crate) struct RolledBack {
    /// From the call on, with what came before the container stood still.
    pub(crate) total: Duration,
    /// For how long the container stood still: the steps below, one after the other.
    pub(crate) gap: Duration,
    /// Until the other machine was built, with its volumes.
    pub(crate) restore: Duration,
    /// Until its agent was ready and knew the time.
    pub(crate) agent: Duration,
    pub(crate) network: Duration,
    /// Standard streams, of execs too.
    pub(crate) streams: Duration,
    /// Until its disk was the task's.
    pub(crate) disk: Duration,
    /// Until its processes ran; none if the task is paused.
    pub(crate) thaw: Duration,
}

impl Container {
    /// Returns when the task goes on in the snapshot's machine, or, where it is paused, could. Waits for snapshots that are being written,
    /// and for layers that are being merged.
    pub(crate) async fn rollback(
        self: &Arc<Self>,
        config: &Config,
        store: &Store,
        to: SnapshotId,
    ) -> Result<RolledBack, Error> {
        let begun = Instant::now();
        let _alone = self.staying.write().await;
        self.may_change_machines(GO_BACK)?;
        let (store, namespace, id) = (store.clone(), self.events.namespace().to_owned(), self.id.clone());
        let any = &[Purpose::Snapshot, Purpose::Checkpoint];
        let mut restored = blocking(move || Restored::own(&store, to, (&namespace, &id), any)).await?;
        let mut disks = self.disks.lock().await;
        self.fits(&restored, &disks.writable)?;
        let (has, saved) = (disks.lower.iter(), restored.lower.iter());
        let copies = |(serial, image): &(String, Image)| Ok((serial.clone(), image.try_clone()?));
        let lower: std::io::Result<Vec<_>> = has.chain(saved).map(copies).collect();
        let (lower, count) = (lower.map_err(StoreError::own("open", "an image again"))?, disks.lower.len());
        blocking(move || same_images(&lower, count)).await?;
        let (layers, files) = (disks.layers.clone(), std::mem::take(&mut restored.writable.1));
        let (disk, rewind) = blocking(move || layers.rewind(&files)).await?;
        let host = HostFiles::open(config)?;

        let _turn = self.turn.lock().await;
        let phase = self.may_change_machines(GO_BACK)?;
        let (old, network) = (self.live(), self.network.hold().await);
        let vm = Arc::new(old.vm.successor(config)?);
        let wanted =
            Wanted { config, host: &host, restored: &mut restored, lower: &disks.lower, disk: &disk, to };
        let mut times = RolledBack::default();
        let (mut next, rewind) = match self.make_next(&old, &vm, network, wanted, rewind, &mut times).await {
            Ok(made) => made,
            Err(error) => {
                vm.retire().await;
                self.note_machines(&old.vm, None);
                return Err(error);
            }
        };
        let paused = next.paused;
        disks.layers = disk.layers;
        let live = Arc::new(Live::new(vm, Arc::clone(&next.guest)));
        let left = self.take_place(&live, &mut next);
        let begun_thaw = Instant::now();
        let mut thawed = Ok(());
        if phase == Phase::Running {
            thawed = self.thaw().await;
            times.thaw = begun_thaw.elapsed();
        }
        times.gap = paused.elapsed();
        self.settle_down(&live, &old, next.network, rewind, &left).await;
        if phase == Phase::Paused {
            self.export_anew().await;
        }
        times.total = begun.elapsed();
        info!(self.log, "rolled back"; "snapshot" => %to, "vmm" => live.vm.id().pid, "times" => ?times);
        thawed.map(|()| times)
    }

    /// Another machine is in the place of the one that there was, which goes.
    pub(super) async fn settle_down(
        self: &Arc<Self>,
        live: &Arc<Live>,
        old: &Live,
        network: Held,
        rewind: Rewind,
        left: &[String],
    ) {
        // Before anything may happen again.
        self.network.follow(Arc::clone(&live.vm), Arc::clone(&live.guest));
        network.keep();
        self.follow_memory(Arc::clone(live), true);
        self.note_machines(&live.vm, Some(&old.vm));
        old.vm.retire().await;
        self.note_machines(&live.vm, None);
        // What cannot be removed now is when the disk is opened the next time.
        let _ = tokio::task::spawn_blocking(move || rewind.finish()).await;
        self.clear_execs(&live.guest, left).await;
    }

    pub(super) fn may_change_machines(&self, verb: &str) -> Result<Phase, Error> {
        let phase = self.phase();
        if !matches!(phase, Phase::Running | Phase::Paused) {
            return Err(Error::State(format!("cannot {verb} a {} container", phase.name())));
        }
        if self.is_asleep() {
            return Err(Error::State(format!("cannot {verb} a container that hibernates; resume it first")));
        }
        if self.is_ending() {
            return Err(Error::State(format!("cannot {verb} a container that has ended")));
        }
        if self.leaving.load(Ordering::Acquire) {
            return Err(Error::State(format!("cannot {verb} a container that ends with its checkpoint")));
        }
        Ok(phase)
    }

    /// Whether the snapshot is of a machine like this one.
    fn fits(&self, restored: &Restored, writable: &str) -> Result<(), Error> {
        let live = self.live();
        let (machine, remembered) = (live.vm.machine(), &restored.remembered);
        let same = (machine.vcpus, machine.memory_mib, self.guest_id.as_str(), self.terminal, writable)
            == (
                restored.vcpus,
                remembered.memory_mib,
                remembered.guest_id.as_str(),
                remembered.terminal,
                restored.writable.0.as_str(),
            );
        match same {
            true => Ok(()),
            false => Err(Error::State(
                "the snapshot's machine or terminal is not the task's: it was taken of an earlier task; restore it as a container of its own"
                    .into(),
            )),
        }
    }

    /// What fails here, fails the rollback alone: the machine that the task has goes on.
    async fn make_next(
        self: &Arc<Self>,
        old: &Live,
        vm: &Arc<Vm>,
        network: Held,
        wanted: Wanted<'_>,
        rewind: Rewind,
        times: &mut RolledBack,
    ) -> Result<(Next, Rewind), Error> {
        self.note_machines(&old.vm, Some(vm));
        let paused = Instant::now();
        match old.vm.pause().await {
            Ok(()) => {}
            // It goes on.
            Err(error @ VmError::Refused { .. }) => return Err(error.into()),
            Err(error) => {
                // Whether it stands still nobody knows.
                old.vm.kill().await;
                return Err(error.into());
            }
        }
        let made = self.build_and_commit(old, vm, (network, paused), wanted, (rewind, ROLLBACK), times);
        match made.await {
            Ok(made) => Ok(made),
            Err(error) => {
                // The other one must not run beside it.
                vm.kill().await;
                if let Err(cause) = old.vm.resume().await
                    && !old.vm.has_ended()
                {
                    warn!(self.log, "the machine does not go on after a rollback that failed, ending it"; "error" => %cause);
                    old.vm.kill().await;
                }
                Err(error)
            }
        }
    }

    /// The machine, with the task's disk, unless the task ends before.
    pub(super) async fn build_and_commit(
        self: &Arc<Self>,
        old: &Live,
        vm: &Arc<Vm>,
        network: (Held, Instant),
        wanted: Wanted<'_>,
        (rewind, operation): (Rewind, &str),
        times: &mut RolledBack,
    ) -> Result<(Next, Rewind), Error> {
        let next = tokio::select! {
            biased;
            () = self.ending.over() => Err(ended(operation)),
            next = self.build_next(old, vm, network, wanted, times) => next,
        }?;
        let rewind = self.commit_disk(rewind, operation, times).await?;
        Ok((next, rewind))
    }

    /// The task has ended, or is going to: a signal that cannot be caught may have reached the machine that there is.
    pub(super) fn is_ending(&self) -> bool {
        self.is_over() || self.is_lost() || self.ending.is_meant()
    }

    /// The list of the disk's layers, durably; unless the task has ended meanwhile.
    async fn commit_disk(
        &self,
        mut rewind: Rewind,
        operation: &str,
        times: &mut RolledBack,
    ) -> Result<Rewind, Error> {
        let (begun, log) = (Instant::now(), self.log.clone());
        let written = blocking(move || {
            rewind.commit(&log)?;
            Ok::<_, Error>(rewind)
        });
        let mut rewind = written.await?;
        times.disk = begun.elapsed();
        if self.is_ending() {
            let log = self.log.clone();
            let _ = tokio::task::spawn_blocking(move || rewind.undo(&log)).await;
            return Err(ended(operation));
        }
        Ok(rewind)
    }

    /// Nothing is waited for between the last look at whether the task has ended and this. The execs of the guest that have ended since
    /// they were planned to go on.
    pub(super) fn take_place(&self, live: &Arc<Live>, next: &mut Next) -> Vec<String> {
        let Fates { going_on, dropped, .. } = std::mem::take(&mut next.fates);
        for exec in dropped {
            exec.drop_out();
        }
        self.live.send_replace(Arc::clone(live));
        if let Some(ends) = next.streams.take() {
            self.streams.go_on_with(ends);
        }
        let mut left = Vec::new();
        for (exec, ends) in going_on.iter().zip(std::mem::take(&mut next.exec_streams)) {
            match (exec.has_ended(), exec.streams(), ends) {
                (false, Some(streams), Some(ends)) => streams.go_on_with(ends),
                (false, ..) => {}
                (true, ..) => left.push(exec.id.clone()),
            }
        }
        left
    }

    /// Whom `delete` has to end.
    pub(super) fn note_machines(&self, vm: &Vm, other: Option<&Vm>) {
        let server = |vm: &Vm| vm.file_server().map(|server| server.id());
        let noted = vm.dir().record(|record| {
            (record.vmm, record.file_server) = (Some(vm.id()), server(vm));
            record.others = other.map_or(Vec::new(), |other| {
                [Some(other.id()), server(other)].into_iter().flatten().collect()
            });
        });
        if let Err(error) = noted {
            // All of them end with the shim's sockets too.
            warn!(self.log, "the machines of a rollback are not recorded"; "error" => %error);
        }
    }
}

pub(super) fn ended(operation: &str) -> Error {
    Error::State(format!("{operation}: the container has ended meanwhile"))
}

/// The first `count` of the disks are the task's; whether the others are the same ones.
fn same_images(disks: &[(String, Image)], count: usize) -> Result<(), Error> {
    let mut known = Vec::with_capacity(disks.len());
    for (serial, image) in disks {
        let digest = image.digest(digest).map_err(StoreError::own("read", "an image"))?;
        known.push((serial, digest));
    }
    let (has, saved) = known.split_at(count.min(known.len()));
    let mut sorted = [has.to_vec(), saved.to_vec()];
    sorted.iter_mut().for_each(|disks| disks.sort());
    match sorted[0] == sorted[1] {
        true => Ok(()),
        false => Err(Error::State("the snapshot is of another image than the task's".into())),
    }
}
