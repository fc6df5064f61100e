//! One container of the sandbox: its life from created to deleted, and the order of its
//! events. `turn` is the one lock (beside `staying` and `disks`, which snapshots and rollbacks take before it in this order, and
//! nobody who has it); whoever publishes an event of the container holds it,
//! so that TaskStart precedes TaskExit precedes TaskDelete. It is held across calls to the
//! guest, so what must not wait for a guest (State) reads `phase` without it.

mod changes;
mod checkpoint;
mod end;
mod exec;
mod files;
mod hibernate;
mod limits;
mod live;
mod merge;
mod rollback;
mod snapshot;
mod zygote;

use std::collections::HashMap;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use containerd_shim_protos::api::Status;
use containerd_shim_protos::cgroups_v2::metrics::Metrics;
use containerd_shim_protos::events::task::{TaskDelete, TaskPaused, TaskResumed, TaskStart};
use protobuf::MessageField;
use protobuf::well_known_types::timestamp::Timestamp;
use slog::{Logger, info, warn};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use ttrpc::Code;

pub(crate) use self::checkpoint::HeldDisks;
use self::end::{Ending, KILLED_STATUS, LAST_OUTPUT};
pub(crate) use self::exec::Exec;
pub(crate) use self::hibernate::Hibernated;
use self::limits::Checked;
pub(crate) use self::live::Live;
use self::merge::Merging;
use self::rollback::Captured;
pub(crate) use self::rollback::{Basis, RolledBack};
use self::zygote::Zygotes;
use crate::checkpoint::blocking;
use crate::clone::Identity;
use crate::error::Error;
use crate::events::Events;
use crate::guest::{GuestError, GuestProcess};
use crate::holder::Holder;
use crate::hooks::{Hooks, Point, Told};
use crate::io::{Stdio, Streams};
use crate::network::Network;
use crate::rootfs::Changes;
use crate::vm::Vm;

/// How long Delete waits for a client to take the last output (runc's shim: the same).
const DRAIN: Duration = Duration::from_secs(10);
/// How long the guest may take to list processes.
const PIDS: Duration = Duration::from_secs(2);
/// After the agent's connection broke, how long its VM may take to end by itself.
const LOST: Duration = Duration::from_secs(2);

/// What the process ended with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Exit {
    pub(crate) status: u32,
    pub(crate) at: SystemTime,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Created,
    Running,
    Paused,
    Stopped,
    Deleted,
}

impl Phase {
    fn name(self) -> &'static str {
        match self {
            Self::Created => "created",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Stopped => "stopped",
            Self::Deleted => "deleted",
        }
    }
}

pub(crate) struct Container {
    pub(crate) id: String,
    /// By which the guest knows it: another one if it was restored under a new name.
    pub(crate) guest_id: String,
    pub(crate) bundle: String,
    pub(crate) stdio: Stdio,
    /// Whether its streams are a terminal in the guest.
    terminal: bool,
    /// The holder's.
    pub(crate) pid: u32,
    /// Changed by the holder of `turn` only.
    live: watch::Sender<Arc<Live>>,
    /// Held while something needs the machine to stay the one that it is: snapshots that are written, merges. A rollback has it
    /// alone, and takes it first.
    staying: Arc<tokio::sync::RwLock<()>>,
    /// What another machine would be made of.
    basis: Basis,
    network: Arc<Network>,
    events: Events,
    log: Logger,
    turn: tokio::sync::Mutex<()>,
    /// Changed by the holder of `turn` only.
    phase: Mutex<Phase>,
    started: Mutex<SystemTime>,
    exit: watch::Sender<Option<Exit>>,
    ending: Ending,
    streams: Streams,
    holder: Mutex<Option<Holder>>,
    execs: Mutex<HashMap<String, Arc<Exec>>>,
    hooks: (Hooks, Told),
    /// Where they are exported to, if they are.
    changes: Option<Changes>,
    /// Whether it comes out of a checkpoint.
    restored: bool,
    /// Of a clone, before it runs.
    identity: Option<Identity>,
    /// It ends with the checkpoint that has just been taken.
    leaving: AtomicBool,
    /// Its machine was put away, or was about to be.
    hibernated: AtomicBool,
    disks: tokio::sync::Mutex<HeldDisks>,
    merging: Merging,
    /// Which execs the snapshots have that were taken of this task.
    captured: Captured,
    /// Off which clones of it are forked.
    zygotes: Zygotes,
    /// Follows kills for lack of memory.
    memory: Mutex<Option<JoinHandle<()>>>,
}

/// What a container consists of once the guest has it.
pub(crate) struct Parts {
    pub(crate) id: String,
    pub(crate) guest_id: String,
    /// It comes out of a checkpoint: it is started by being thawed.
    pub(crate) restored: bool,
    pub(crate) identity: Option<Identity>,
    pub(crate) terminal: bool,
    pub(crate) disks: HeldDisks,
    pub(crate) bundle: String,
    pub(crate) stdio: Stdio,
    pub(crate) live: Live,
    pub(crate) basis: Basis,
    pub(crate) network: Arc<Network>,
    pub(crate) streams: Streams,
    pub(crate) holder: Holder,
    pub(crate) hooks: (Hooks, Told),
    pub(crate) changes: Option<Changes>,
}

impl Container {
    pub(crate) fn new(parts: Parts, events: Events, log: &Logger) -> Self {
        Self {
            log: log.new(slog::o!("task" => parts.id.clone())),
            id: parts.id,
            guest_id: parts.guest_id,
            restored: parts.restored,
            identity: parts.identity,
            leaving: AtomicBool::new(false),
            hibernated: AtomicBool::new(false),
            terminal: parts.terminal,
            disks: tokio::sync::Mutex::new(parts.disks),
            merging: Merging::default(),
            captured: Captured::default(),
            bundle: parts.bundle,
            stdio: parts.stdio,
            pid: parts.holder.id().pid,
            ending: Ending::new(parts.holder.pidfd()),
            live: watch::Sender::new(Arc::new(parts.live)),
            staying: Arc::default(),
            basis: parts.basis,
            network: parts.network,
            events,
            turn: tokio::sync::Mutex::default(),
            phase: Mutex::new(Phase::Created),
            started: Mutex::new(SystemTime::now()),
            exit: watch::Sender::new(None),
            streams: parts.streams,
            holder: Mutex::new(Some(parts.holder)),
            execs: Mutex::default(),
            hooks: parts.hooks,
            changes: parts.changes,
            zygotes: Zygotes::default(),
            memory: Mutex::default(),
        }
    }

    pub(crate) async fn start(self: &Arc<Self>) -> Result<(), Error> {
        let restored = match self.restored {
            true => Some(self.disks.lock().await.layers.clone()),
            false => None,
        };
        let _turn = self.turn.lock().await;
        let live = self.live();
        match self.phase() {
            Phase::Created => {}
            phase => return Err(Error::State(format!("cannot start a {} process", phase.name()))),
        }
        // What came since Create: Docker sets the network up in between.
        self.network.sync(&live.vm, &live.guest).await?;
        *self.started.lock().unwrap_or_else(PoisonError::into_inner) = SystemTime::now();
        self.streams.start_input()?;
        if let Some(disk) = restored {
            // Whoever fails until it is somebody else leaves a disk that is nobody's.
            if let Some(identity) = &self.identity {
                // Its network is its own by now.
                let identified = live.guest.identify(&self.guest_id, identity);
                let reset = live.ask("giving the clone its identity", identified).await?;
                info!(self.log, "clone"; "hostname" => &identity.hostname, "sockets_reset" => reset);
            }
            // Before its processes write to it.
            blocking(move || disk.keep()).await?;
            live.ask("resuming the container", live.guest.resume(&self.guest_id)).await?;
        } else {
            live.ask("starting the container", live.guest.start(&self.guest_id, "")).await?;
        }
        self.enter(Phase::Running);
        self.network.follow(Arc::clone(&live.vm), Arc::clone(&live.guest));
        self.follow_memory(live, self.restored);
        self.events.send(TaskStart { container_id: self.id.clone(), pid: self.pid, ..Default::default() });
        // Failures of this one are logged only (runtime.md, "Lifecycle", 9).
        self.run_hooks(Point::Poststart).await;
        Ok(())
    }

    async fn run_hooks(&self, point: Point) {
        let (hooks, told) = &self.hooks;
        if let Err(error) = hooks.run(point, told).await {
            warn!(self.log, "hook failed"; "error" => %error);
        }
    }

    pub(crate) fn exited(&self) -> Option<Exit> {
        *self.exit.borrow()
    }

    pub(crate) async fn wait(&self) -> Option<Exit> {
        let mut exit = self.exit.subscribe();
        exit.wait_for(Option::is_some).await.map(|exit| *exit).unwrap_or(None)
    }

    fn phase(&self) -> Phase {
        *self.phase.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn enter(&self, phase: Phase) {
        *self.phase.lock().unwrap_or_else(PoisonError::into_inner) = phase;
    }

    /// Never waits for the guest.
    pub(crate) fn status(&self) -> Status {
        match self.phase() {
            Phase::Created => Status::CREATED,
            Phase::Running => Status::RUNNING,
            Phase::Paused => Status::PAUSED,
            Phase::Stopped | Phase::Deleted => Status::STOPPED,
        }
    }

    /// The guest's processes, the container's init first, if it tells them in time.
    pub(crate) async fn processes(&self) -> Result<Vec<GuestProcess>, Error> {
        let live = self.live();
        if self.exited().is_some() || live.is_lost() || live.asleep.is_some() {
            return Ok(Vec::new());
        }
        let asked = async {
            let init = live.ask("asking for processes", live.guest.init_pid(&self.guest_id)).await?;
            let mut processes = live.ask("asking for processes", live.guest.pids(&self.guest_id)).await?;
            processes.sort_by_key(|process| process.pid != init);
            Ok(processes)
        };
        match tokio::time::timeout(PIDS, asked).await {
            Ok(processes) => processes,
            Err(_) => {
                warn!(self.log, "the guest does not list its processes");
                Ok(Vec::new())
            }
        }
    }

    /// Freezes or thaws the container's processes.
    pub(crate) async fn freeze(&self, frozen: bool) -> Result<(), Error> {
        let _turn = self.turn.lock().await;
        let live = self.live();
        match (self.phase(), frozen) {
            (Phase::Running, true) => {
                live.ask("pausing the container", live.guest.pause(&self.guest_id)).await?;
                self.export_for_pause().await?;
                self.enter(Phase::Paused);
                self.events.send(TaskPaused { container_id: self.id.clone(), ..Default::default() });
            }
            (Phase::Paused, false) => {
                live.awake("resuming the container")?;
                self.take_changes_back().await?;
                live.ask("resuming the container", live.guest.resume(&self.guest_id)).await?;
                self.enter(Phase::Running);
                self.events.send(TaskResumed { container_id: self.id.clone(), ..Default::default() });
            }
            (phase, _) => {
                let verb = if frozen { "pause" } else { "resume" };
                return Err(Error::State(format!("cannot {verb} a {} container", phase.name())));
            }
        }
        Ok(())
    }

    /// The container's counters. A stopped container has none.
    pub(crate) async fn stats(&self) -> Result<Metrics, Error> {
        let live = self.live();
        self.alive("ask for the counters of")?;
        let files = live.ask("asking for counters", live.guest.stats(&self.guest_id)).await?;
        let counters = self.network.counters().await.unwrap_or_else(|error| {
            warn!(self.log, "the network's counters cannot be read"; "error" => %error);
            Vec::new()
        });
        Ok(crate::stats::metrics(&files, counters))
    }

    /// Changes limits, within the machine that the container has; memory of it that they leave
    /// unused goes to the host. The container is its machine's only one.
    pub(crate) async fn update(&self, resources: &[u8]) -> Result<(), Error> {
        let _turn = self.turn.lock().await;
        let live = self.live();
        self.alive("update")?;
        let Checked { resources, balloon_mib } = limits::checked(resources, live.vm.machine())?;
        live.ask("updating the container", live.guest.update(&self.guest_id, resources)).await?;
        if let Some(mib) = balloon_mib
            && let Err(error) = live.vm.set_balloon(mib).await
        {
            // The limit is kept all the same.
            warn!(self.log, "the balloon keeps its size"; "wanted_mib" => mib, "error" => %error);
        }
        Ok(())
    }

    pub(crate) async fn resize(&self, exec_id: &str, width: u32, height: u32) -> Result<(), Error> {
        let live = self.live();
        self.alive("resize")?;
        live.ask("resizing a terminal", live.guest.resize(&self.guest_id, exec_id, width, height)).await
    }

    /// Its processes still exist, as far as is known.
    fn alive(&self, verb: &str) -> Result<(), Error> {
        match self.phase() {
            Phase::Created | Phase::Running | Phase::Paused => Ok(()),
            phase => Err(Error::State(format!("cannot {verb} a {} container", phase.name()))),
        }
    }

    pub(crate) fn close_stdin(&self) {
        self.streams.close_stdin();
    }

    /// How long the agent took to become ready, if it tells.
    pub(crate) async fn agent_boot_ns(&self) -> Option<u64> {
        let live = self.live();
        live.guest.agent_boot_ns().await.ok().flatten()
    }

    /// Takes the container out of the guest: its disks are unmounted and clean afterwards. Works
    /// in any state but a running process in a living VM.
    pub(crate) async fn delete(self: &Arc<Self>) -> Result<Exit, Error> {
        // A Start under way comes first.
        let phase = {
            let _turn = self.turn.lock().await;
            self.phase()
        };
        match phase {
            // SIGKILL ends it, or else its VM.
            Phase::Created => drop(self.kill(libc::SIGKILL.unsigned_abs(), true).await),
            Phase::Running | Phase::Paused if !self.is_lost() => {
                return Err(Error::State(format!("cannot delete a {} process", phase.name())));
            }
            Phase::Running | Phase::Paused | Phase::Stopped | Phase::Deleted => {}
        }
        let exit = self.wait().await.unwrap_or(Exit { status: KILLED_STATUS, at: SystemTime::now() });
        let _turn = self.turn.lock().await;
        if self.phase() == Phase::Deleted {
            return Err(Error::NoContainer);
        }
        let patience = if self.ending.is_hurried() { LAST_OUTPUT } else { DRAIN };
        if !self.streams.drain(patience).await {
            warn!(self.log, "output was not taken in time and is lost");
        }
        if !self.is_lost() {
            self.delete_in_guest().await;
        }
        self.forget_execs();
        // Before its namespace goes with the holder.
        self.network.close().await;
        drop(self.holder.lock().unwrap_or_else(PoisonError::into_inner).take());
        self.run_hooks(Point::Poststop).await;
        self.enter(Phase::Deleted);
        self.events.send(TaskDelete {
            container_id: self.id.clone(),
            pid: self.pid,
            exit_status: exit.status,
            exited_at: timestamp(exit.at),
            ..Default::default()
        });
        Ok(exit)
    }

    async fn delete_in_guest(&self) {
        let live = self.live();
        match live.ask("deleting the container", live.guest.delete(&self.guest_id, "")).await {
            Ok(()) | Err(Error::Vm(_)) => {}
            Err(Error::Guest(GuestError::Refused { code: Code::NOT_FOUND, .. })) => {}
            // The VM goes anyway; what the guest had not written back is lost.
            Err(error) => warn!(self.log, "the guest did not delete the container"; "error" => %error),
        }
    }
}

/// Runs a call to the guest, or tells why the VM ended under it.
pub(crate) async fn with_vm<T>(
    vm: &Vm,
    phase: &'static str,
    call: impl Future<Output = Result<T, GuestError>>,
) -> Result<T, Error> {
    tokio::select! {
        biased;
        result = call => match result {
            // The connection breaks a moment before the VM's end is known.
            Err(lost @ (GuestError::Lost { .. } | GuestError::Connect { .. })) => match tokio::time::timeout(LOST, vm.ended()).await {
                Ok(end) => Err(vm.ended_error(phase, end.cause).into()),
                Err(_) => Err(lost.into()),
            },
            other => Ok(other?),
        },
        end = vm.ended() => Err(vm.ended_error(phase, end.cause).into()),
    }
}

pub(crate) fn timestamp(time: SystemTime) -> MessageField<Timestamp> {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    Some(Timestamp {
        seconds: i64::try_from(since.as_secs()).unwrap_or(i64::MAX),
        nanos: i32::try_from(since.subsec_nanos()).unwrap_or(0),
        ..Default::default()
    })
    .into()
}
