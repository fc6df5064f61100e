//! One container of the sandbox: its life from created to deleted, and the order of its
//! events. `phase` is the one lock; whoever publishes an event of the container holds it,
//! so that TaskStart precedes TaskExit precedes TaskDelete.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use containerd_shim_protos::api::Status;
use containerd_shim_protos::events::task::{TaskDelete, TaskExit, TaskStart};
use protobuf::MessageField;
use protobuf::well_known_types::timestamp::Timestamp;
use slog::{Logger, info, warn};
use tokio::sync::watch;
use ttrpc::Code;

use crate::error::Error;
use crate::events::Events;
use crate::guest::{Guest, GuestError};
use crate::holder::Holder;
use crate::io::{Stdio, Streams};
use crate::vm::Vm;

/// How long Delete waits for a client to take the last output (runc's shim: the same).
const DRAIN: Duration = Duration::from_secs(10);
/// How long a client may stop reading output before the exit is told all the same.
const STALL: Duration = Duration::from_secs(10);
/// How long a killed process may take to be reported.
const KILLED: Duration = Duration::from_secs(10);
/// After the agent's connection broke, how long its VM may take to end by itself.
const LOST: Duration = Duration::from_secs(2);
/// Status of a process that was killed with its VM: 128 + SIGKILL.
const KILLED_STATUS: u32 = 137;

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
    phase: tokio::sync::Mutex<Phase>,
    started: Mutex<SystemTime>,
    exit: watch::Sender<Option<Exit>>,
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
            vm: parts.vm,
            guest: parts.guest,
            events,
            phase: tokio::sync::Mutex::new(Phase::Created),
            started: Mutex::new(SystemTime::now()),
            exit: watch::Sender::new(None),
            streams: parts.streams,
            holder: Mutex::new(Some(parts.holder)),
        }
    }

    /// Follows the process to its end, whichever way that comes, and publishes it.
    pub(crate) async fn watch(self: Arc<Self>, seen: impl FnOnce()) {
        let (status, guest_ns) = tokio::select! {
            answer = self.guest.wait(&self.id) => match answer {
                Ok(exit) => (exit.status, Some(exit.at_ns)),
                Err(error) => {
                    // Without its agent a guest is lost; PID 1's end usually ends the VM.
                    if tokio::time::timeout(LOST, self.vm.ended()).await.is_err() {
                        warn!(self.log, "the guest's agent is gone, ending its VM"; "error" => %error);
                        self.vm.kill().await;
                    }
                    (KILLED_STATUS, None)
                }
            },
            end = self.vm.ended() => {
                warn!(self.log, "the VM ended under the container"; "cause" => end.cause);
                (KILLED_STATUS, None)
            }
        };
        let at = self.exit_time(guest_ns);
        seen();
        // Clients take the exit for the end of the output.
        if !self.streams.settle(STALL).await {
            warn!(self.log, "output is not being read; the exit is told nevertheless");
        }
        let mut phase = self.phase.lock().await;
        if *phase != Phase::Deleted {
            *phase = Phase::Stopped;
        }
        info!(self.log, "task exit"; "status" => status);
        let _ = self.exit.send_replace(Some(Exit { status, at }));
        self.events.send(TaskExit {
            container_id: self.id.clone(),
            id: self.id.clone(),
            pid: self.pid,
            exit_status: status,
            exited_at: timestamp(at),
            ..Default::default()
        });
        drop(phase);
    }

    /// The guest's clock tells the time of the exit best, if it is sane.
    fn exit_time(&self, guest_ns: Option<i64>) -> SystemTime {
        let now = SystemTime::now();
        let started = *self.started.lock().unwrap_or_else(PoisonError::into_inner);
        match guest_ns.and_then(|ns| u64::try_from(ns).ok()).map(|ns| UNIX_EPOCH + Duration::from_nanos(ns)) {
            Some(at) if at >= started && at <= now => at,
            _ => now,
        }
    }

    pub(crate) async fn start(&self) -> Result<(), Error> {
        let mut phase = self.phase.lock().await;
        match *phase {
            Phase::Created => {}
            Phase::Running => return Err(Error::State("cannot start a running process".into())),
            Phase::Stopped => return Err(Error::State("cannot start a stopped process".into())),
            Phase::Deleted => return Err(Error::State("cannot start a deleted process".into())),
        }
        *self.started.lock().unwrap_or_else(PoisonError::into_inner) = SystemTime::now();
        self.streams.start_input()?;
        with_vm(&self.vm, "starting the container", self.guest.start(&self.id)).await?;
        *phase = Phase::Running;
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

    pub(crate) async fn status(&self) -> Status {
        match *self.phase.lock().await {
            Phase::Created => Status::CREATED,
            Phase::Running => Status::RUNNING,
            Phase::Stopped | Phase::Deleted => Status::STOPPED,
        }
    }

    pub(crate) async fn kill(&self, signal: u32, all: bool) -> Result<(), Error> {
        if self.exited().is_some() || self.vm.has_ended() {
            return Err(Error::Finished);
        }
        let signalled = with_vm(&self.vm, "signalling", self.guest.signal(&self.id, signal, all)).await;
        match signalled {
            Err(Error::Vm(_)) => Err(Error::Finished),
            Err(Error::Guest(GuestError::Refused {
                code: Code::NOT_FOUND | Code::FAILED_PRECONDITION,
                ..
            })) => Err(Error::Finished),
            other => other,
        }
    }

    /// The task's pid first, then the other processes' pids in the guest.
    pub(crate) async fn pids(&self) -> Result<Vec<u32>, Error> {
        let mut pids = vec![self.pid];
        if self.exited().is_none() && !self.vm.has_ended() {
            let init = with_vm(&self.vm, "asking for processes", self.guest.init_pid(&self.id)).await?;
            let inside = with_vm(&self.vm, "asking for processes", self.guest.pids(&self.id)).await?;
            pids.extend(inside.into_iter().filter(|pid| *pid != init));
        }
        Ok(pids)
    }

    pub(crate) fn close_stdin(&self) {
        self.streams.close_stdin();
    }

    /// Takes the container out of the guest: its disks are unmounted and clean afterwards.
    pub(crate) async fn delete(&self) -> Result<Exit, Error> {
        let created = match *self.phase.lock().await {
            Phase::Created => true,
            Phase::Running => return Err(Error::State("cannot delete a running process".into())),
            Phase::Stopped | Phase::Deleted => false,
        };
        if created {
            let _ = self.kill(libc::SIGKILL.unsigned_abs(), true).await;
            if tokio::time::timeout(KILLED, self.wait()).await.is_err() {
                warn!(self.log, "the created process does not end, ending its VM");
                self.vm.kill().await;
            }
        }
        let exit = self.wait().await.unwrap_or(Exit { status: KILLED_STATUS, at: SystemTime::now() });
        let mut phase = self.phase.lock().await;
        if *phase == Phase::Deleted {
            return Err(Error::NoContainer);
        }
        if !self.streams.drain(DRAIN).await {
            warn!(self.log, "output was not taken in time and is lost");
        }
        if !self.vm.has_ended() {
            match with_vm(&self.vm, "deleting the container", self.guest.delete(&self.id)).await {
                Ok(()) | Err(Error::Vm(_)) => {}
                Err(Error::Guest(GuestError::Refused { code: Code::NOT_FOUND, .. })) => {}
                // The VM goes anyway; what the guest had not written back is lost.
                Err(error) => warn!(self.log, "the guest did not delete the container"; "error" => %error),
            }
        }
        drop(self.holder.lock().unwrap_or_else(PoisonError::into_inner).take());
        *phase = Phase::Deleted;
        self.events.send(TaskDelete {
            container_id: self.id.clone(),
            pid: self.pid,
            exit_status: exit.status,
            exited_at: timestamp(exit.at),
            ..Default::default()
        });
        Ok(exit)
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
