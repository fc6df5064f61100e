//! One container of the sandbox: its life from created to deleted, and the order of its
//! events. `turn` is the one lock; whoever publishes an event of the container holds it,
//! so that TaskStart precedes TaskExit precedes TaskDelete. It is held across calls to the
//! guest, so what must not wait for a guest (State) reads `phase` without it.

mod end;

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use containerd_shim_protos::api::Status;
use containerd_shim_protos::events::task::{TaskDelete, TaskStart};
use protobuf::MessageField;
use protobuf::well_known_types::timestamp::Timestamp;
use slog::{Logger, warn};
use tokio::sync::watch;
use ttrpc::Code;

use self::end::{Ending, KILLED_STATUS, LAST_OUTPUT};
use crate::error::Error;
use crate::events::Events;
use crate::guest::{Guest, GuestError};
use crate::holder::Holder;
use crate::io::{Stdio, Streams};
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
    Stopped,
    Deleted,
}

pub(crate) struct Container {
    pub(crate) id: String,
    pub(crate) bundle: String,
    pub(crate) stdio: Stdio,
    /// The holder's.
    pub(crate) pid: u32,
    pub(crate) vm: Arc<Vm>,
    guest: Arc<Guest>,
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
}

/// What a container consists of once the guest has it.
pub(crate) struct Parts {
    pub(crate) id: String,
    pub(crate) bundle: String,
    pub(crate) stdio: Stdio,
    pub(crate) vm: Arc<Vm>,
    pub(crate) guest: Arc<Guest>,
    pub(crate) streams: Streams,
    pub(crate) holder: Holder,
}

impl Container {
    pub(crate) fn new(parts: Parts, events: Events, log: &Logger) -> Self {
        Self {
            log: log.new(slog::o!("task" => parts.id.clone())),
            id: parts.id,
            bundle: parts.bundle,
            stdio: parts.stdio,
            pid: parts.holder.id().pid,
            ending: Ending::new(parts.holder.pidfd()),
            vm: parts.vm,
            guest: parts.guest,
            events,
            turn: tokio::sync::Mutex::default(),
            phase: Mutex::new(Phase::Created),
            started: Mutex::new(SystemTime::now()),
            exit: watch::Sender::new(None),
            streams: parts.streams,
            holder: Mutex::new(Some(parts.holder)),
        }
    }

    pub(crate) async fn start(&self) -> Result<(), Error> {
        let _turn = self.turn.lock().await;
        match self.phase() {
            Phase::Created => {}
            Phase::Running => return Err(Error::State("cannot start a running process".into())),
            Phase::Stopped => return Err(Error::State("cannot start a stopped process".into())),
            Phase::Deleted => return Err(Error::State("cannot start a deleted process".into())),
        }
        *self.started.lock().unwrap_or_else(PoisonError::into_inner) = SystemTime::now();
        self.streams.start_input()?;
        with_vm(&self.vm, "starting the container", self.guest.start(&self.id)).await?;
        self.enter(Phase::Running);
        self.events.send(TaskStart { container_id: self.id.clone(), pid: self.pid, ..Default::default() });
        Ok(())
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
            Phase::Stopped | Phase::Deleted => Status::STOPPED,
        }
    }

    /// The task's pid first, then the other processes' pids in the guest, if it tells them in
    /// time.
    pub(crate) async fn pids(&self) -> Result<Vec<u32>, Error> {
        let mut pids = vec![self.pid];
        if self.exited().is_none() && !self.vm.has_ended() {
            match tokio::time::timeout(PIDS, self.guest_pids()).await {
                Ok(inside) => pids.extend(inside?),
                Err(_) => warn!(self.log, "the guest does not list its processes"),
            }
        }
        Ok(pids)
    }

    /// Without the container's init, for which the holder stands.
    async fn guest_pids(&self) -> Result<Vec<u32>, Error> {
        let init = with_vm(&self.vm, "asking for processes", self.guest.init_pid(&self.id)).await?;
        let mut inside = with_vm(&self.vm, "asking for processes", self.guest.pids(&self.id)).await?;
        inside.retain(|pid| *pid != init);
        Ok(inside)
    }

    pub(crate) fn close_stdin(&self) {
        self.streams.close_stdin();
    }

    /// How long the agent took to become ready, if it tells.
    pub(crate) async fn agent_boot_ns(&self) -> Option<u64> {
        self.guest.agent_boot_ns().await.ok().flatten()
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
            Phase::Running if !self.is_lost() => {
                return Err(Error::State("cannot delete a running process".into()));
            }
            Phase::Running | Phase::Stopped | Phase::Deleted => {}
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
        drop(self.holder.lock().unwrap_or_else(PoisonError::into_inner).take());
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
        match with_vm(&self.vm, "deleting the container", self.guest.delete(&self.id)).await {
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
