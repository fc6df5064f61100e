//! A task whose machine is put away: saved, with its disk, in a snapshot of its own, and ended. The task stays what it was to its clients,
//! and paused: its pid, its namespace with its interfaces, its streams, the execs in it. When it wakes, a machine restored from the
//! snapshot takes the place of the one that was put away, as with a rollback. It reads its memory from there, so the snapshot stays until the
//! next one, which shares with it what has not changed since.
//!
//! No byte of its streams is lost or comes twice: they come to rest before the machine is saved, with nothing under way ([`Streams`]).
//! What fails before [`Container::put_away`]'s last step leaves the machine that there is, and the task goes on. A task that
//! is killed while it hibernates ends as one whose machine is lost; its disk has all that it had written.
//!
//! [`Streams`]: crate::io::Streams

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use slog::{info, warn};
use ttrpc::Code;

use super::rollback::{Wanted, ended};
use super::{Container, Exec, Live, Phase, RolledBack};
use crate::checkpoint::{Restored, blocking, forget_hibernations};
use crate::config::Config;
use crate::error::Error;
use crate::guest::GuestError;
use crate::io::Streams;
use crate::rootfs::Layers;
use crate::snapshot::manifest::Purpose;
use crate::snapshot::{SnapshotId, Store};
use crate::vm::{HostFiles, Then};

/// How long the streams may take to come to rest. They have to do with no client.
const REST: Duration = Duration::from_secs(10);
/// How long a guest that goes on may take to have streams again, and how often it is asked.
const STIRRED: Duration = Duration::from_secs(30);
const BETWEEN: Duration = Duration::from_millis(100);
const HIBERNATE: &str = "hibernate";
const RESUME: &str = "resume";
const PUT_AWAY: &str = "put away the machine of";
const RESTING: &str = "bringing streams to rest";

/// What it hibernates in, and how long it took.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Hibernated {
    pub(crate) snapshot: SnapshotId,
    pub(crate) total: Duration,
    /// Until its processes stood still and its streams were at rest.
    pub(crate) rest: Duration,
    /// From then until the machine was saved, in memory,
    pub(crate) save: Duration,
    /// and until all of it was on disk.
    pub(crate) write: Duration,
}

impl Container {
    pub(crate) fn is_asleep(&self) -> bool {
        self.live().asleep.is_some()
    }

    /// Whether there may be a snapshot of it in the store that is nobody's once it is deleted.
    pub(crate) fn has_hibernated(&self) -> bool {
        self.hibernated.load(Ordering::Acquire)
    }

    /// Returns when the machine is gone. A container that runs is paused first; if it cannot be put away it runs again.
    pub(crate) async fn hibernate(
        self: &Arc<Self>,
        config: &Config,
        store: &Store,
    ) -> Result<Hibernated, Error> {
        let begun = Instant::now();
        // Snapshots that are being written, and layers that are being merged, come first.
        let _alone = self.staying.write().await;
        let phase = self.may_change_machines(PUT_AWAY)?;
        self.merge_layers(Layers::are_too_many).await;
        if phase == Phase::Running {
            self.freeze(true).await?;
        }
        match self.put_away((config, store), begun).await {
            Ok(done) => {
                info!(self.log, "hibernates"; "snapshot" => %done.snapshot, "times" => ?done);
                Ok(done)
            }
            Err(error) => {
                if phase == Phase::Running
                    && let Err(cause) = self.freeze(false).await
                {
                    warn!(self.log, "not resumed after it could not hibernate"; "error" => %cause);
                }
                Err(error)
            }
        }
    }

    async fn put_away(
        &self,
        (config, store): (&Config, &Store),
        begun: Instant,
    ) -> Result<Hibernated, Error> {
        let mut disks = self.disks.lock().await;
        let prepared = self.prepare(store, &mut disks).await?;
        let _turn = self.turn.lock().await;
        let live = self.live();
        let rested = match self.may_change_machines(PUT_AWAY) {
            Ok(Phase::Paused) => match self.execs_all_told().await {
                Ok(()) => self.come_to_rest(&live).await,
                refused => refused,
            },
            Ok(_) => Err(Error::State("hibernate: the container was resumed meanwhile".into())),
            Err(error) => Err(error),
        };
        if let Err(error) = rested {
            self.give_back(&mut disks.layers, prepared).await;
            return Err(error);
        }
        let rest = begun.elapsed();
        self.hibernated.store(true, Ordering::Release);
        let taken = match self.take(prepared, &mut disks, Then::Stand).await {
            Ok(taken) => taken,
            Err(error) => {
                self.stir(&live).await;
                return Err(error);
            }
        };
        let save = begun.elapsed().saturating_sub(rest);
        self.captured.note(taken.id(), &self.execs());
        let written = tokio::select! {
            biased;
            // What comes into the store all the same goes with the task.
            () = self.ending.over_or_meant() => Err(ended(HIBERNATE)),
            written = self.finish(taken, Purpose::Hibernation) => written,
        };
        let snapshot = match written {
            Ok(snapshot) if !self.is_ending() && self.untold_exec().is_none() => snapshot,
            other => {
                self.go_on(&live).await;
                let ended = || self.untold_exec().map_or_else(|| ended(HIBERNATE), |exec| untold(&exec));
                return Err(other.err().unwrap_or_else(ended));
            }
        };
        // From here on there is nothing that it could go back to. Nothing was waited for since it was known not to have ended.
        let (vm, guest) = (Arc::clone(&live.vm), Arc::clone(&live.guest));
        self.live.send_replace(Arc::new(Live { vm, guest, asleep: Some(snapshot) }));
        self.note_sleep(Some(snapshot));
        live.vm.retire().await;
        // Whoever looks at the namespace just now does it to the end.
        let held = self.network.hold().await;
        self.network.unfollow().await;
        drop(held);
        let total = begun.elapsed();
        let (store, run_dir) = (store.clone(), config.run_dir.clone());
        let (namespace, id) = (self.events.namespace().to_owned(), self.id.clone());
        let forget = move || forget_hibernations(&store, &run_dir, (&namespace, &id), Some(snapshot));
        if let Err(error) = blocking(forget).await {
            // It goes with the task at the latest.
            warn!(self.log, "what the container hibernated in before is not removed"; "error" => %error);
        }
        Ok(Hibernated { snapshot, total, rest, save, write: total.saturating_sub(rest + save) })
    }

    /// One whose end is known, and whose clients still read what it has written: another machine would not have that.
    fn untold_exec(&self) -> Option<Arc<Exec>> {
        self.execs().into_iter().find(|exec| exec.phase() == Phase::Running && exec.has_ended())
    }

    async fn execs_all_told(&self) -> Result<(), Error> {
        let deadline = tokio::time::Instant::now() + REST;
        while let Some(exec) = self.untold_exec() {
            let told = tokio::time::timeout_at(deadline, Arc::clone(&exec).wait()).await;
            told.map_err(|_| untold(&exec))?;
        }
        Ok(())
    }

    /// For whoever lists containers, or removes snapshots.
    fn note_sleep(&self, in_snapshot: Option<SnapshotId>) {
        let noted = self.live().vm.dir().record(|record| {
            record.hibernates_in = in_snapshot;
            record.has_hibernated = true;
        });
        if let Err(error) = noted {
            warn!(self.log, "it is not recorded that the container hibernates, or does no more"; "error" => %error);
        }
    }

    /// The machine that stands still.
    async fn go_on(&self, live: &Live) {
        if let Err(cause) = live.vm.resume().await
            && !live.vm.has_ended()
        {
            warn!(self.log, "the machine does not go on after it could not be put away, ending it"; "error" => %cause);
            live.vm.kill().await;
        }
        self.stir(live).await;
    }

    /// The execs whose streams there are.
    fn attached_execs(&self) -> Vec<(Arc<Exec>, Arc<Streams>)> {
        let running = self.execs().into_iter().filter(|exec| exec.phase() == Phase::Running);
        running.filter_map(|exec| exec.streams().map(|streams| (exec, streams))).collect()
    }

    /// The disk, and the streams of the frozen processes, with nothing under way on them afterwards; or they go on as if nothing had been asked.
    async fn come_to_rest(&self, live: &Live) -> Result<(), Error> {
        let execs = self.attached_execs();
        let all: Vec<&Streams> =
            [&self.streams].into_iter().chain(execs.iter().map(|(_, streams)| &**streams)).collect();
        all.iter().for_each(|streams| streams.rest());
        let told = live.ask(RESTING, live.guest.rest(&self.guest_id, false)).await;
        if let Err(error @ Error::Guest(GuestError::Refused { .. })) = told {
            all.iter().for_each(|streams| streams.give_up());
            return Err(match error {
                Error::Guest(GuestError::Refused { code: Code::UNIMPLEMENTED, .. }) => Error::State(
                    "hibernate: the agent of the container's machine does not know how, as it was restored from an older snapshot; start the container anew"
                        .into(),
                ),
                other => other,
            });
        }
        let rested = async {
            told?;
            for streams in &all {
                streams.end_input().await;
            }
            for streams in &all {
                streams.at_rest().await;
            }
            Ok(())
        };
        let rested = match tokio::time::timeout(REST, rested).await {
            Ok(Ok(())) => live.ask(RESTING, live.guest.rest(&self.guest_id, true)).await,
            Ok(Err(error)) => Err(error),
            Err(_) => Err(Error::State(format!(
                "hibernate: the container's streams do not come to rest within {} s; its guest keeps sending, or a client takes too little",
                REST.as_secs()
            ))),
        };
        if rested.is_err() {
            self.stir(live).await;
        }
        rested
    }

    /// Connects streams that have come to rest with the machine that there is.
    async fn stir(&self, live: &Live) {
        self.stir_one(live, "", self.terminal, &self.streams).await;
        for (exec, streams) in self.attached_execs() {
            self.stir_one(live, &exec.id, exec.stdio.terminal, &streams).await;
        }
    }

    async fn stir_one(&self, live: &Live, exec_id: &str, terminal: bool, streams: &Streams) {
        let deadline = tokio::time::Instant::now() + STIRRED;
        loop {
            let found = streams.find_again(&live.guest, (&self.guest_id, exec_id), terminal);
            match live.ask("connecting standard streams", found).await {
                Ok(ends) => return streams.go_on_with(ends),
                // A guest under load.
                Err(Error::Guest(error)) if tokio::time::Instant::now() < deadline => {
                    warn!(self.log, "streams cannot be had again yet"; "exec" => exec_id, "error" => %error);
                    tokio::time::sleep(BETWEEN).await;
                }
                Err(error) => {
                    warn!(self.log, "a process goes on without its streams"; "exec" => exec_id, "error" => %error);
                    return streams.give_up();
                }
            }
        }
    }

    /// Another machine takes the place of the one that was put away, if there is none. The container stays paused. What fails leaves it
    /// as it is.
    pub(crate) async fn wake(
        self: &Arc<Self>,
        config: &Config,
        store: &Store,
    ) -> Result<Option<RolledBack>, Error> {
        let begun = Instant::now();
        let _alone = self.staying.write().await;
        let Some(from) = self.live().asleep else { return Ok(None) };
        let (opened, namespace, id) = (store.clone(), self.events.namespace().to_owned(), self.id.clone());
        let only = &[Purpose::Hibernation];
        let mut restored = blocking(move || Restored::own(&opened, from, (&namespace, &id), only)).await?;
        let mut disks = self.disks.lock().await;
        let (layers, files) = (disks.layers.clone(), std::mem::take(&mut restored.writable.1));
        let (disk, rewind) = blocking(move || layers.rewind(&files)).await?;
        let host = HostFiles::open(config)?;

        let _turn = self.turn.lock().await;
        if self.is_ending() {
            return Err(ended(RESUME));
        }
        let (old, network) = (self.live(), self.network.hold().await);
        let vm = Arc::new(old.vm.successor(config)?);
        let wanted = Wanted {
            config,
            host: &host,
            restored: &mut restored,
            lower: &disks.lower,
            disk: &disk,
            to: from,
        };
        let (mut times, standing) = (RolledBack::default(), Instant::now());
        let made =
            self.build_and_commit(&old, &vm, (network, standing), wanted, (rewind, RESUME), &mut times);
        let (mut next, rewind) = match made.await {
            Ok(made) => made,
            Err(error) => {
                vm.retire().await;
                self.note_machines(&old.vm, None);
                return Err(error);
            }
        };
        disks.layers = disk.layers;
        let live = Arc::new(Live::new(vm, Arc::clone(&next.guest)));
        let left = self.take_place(&live, &mut next);
        self.note_sleep(None);
        times.gap = standing.elapsed();
        self.settle_down(&live, &old, next.network, rewind, &left).await;
        times.total = begun.elapsed();
        info!(self.log, "awake"; "snapshot" => %from, "vmm" => live.vm.id().pid, "times" => ?times);
        Ok(Some(times))
    }
}

fn untold(exec: &Exec) -> Error {
    Error::State(format!(
        "hibernate: exec {} has ended, and what it has written is still being read; ask again when that is done",
        exec.id
    ))
}
