//! Further processes of a container: added by Exec, run by Start, told apart by their exec id.
//! Their pid is the task's, for the host has no other.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use containerd_shim_protos::api::Status;
use containerd_shim_protos::events::task::{TaskExecAdded, TaskExecStarted, TaskExit};
use slog::{info, warn};
use tokio::sync::watch;

use super::end::KILLED_STATUS;
use super::{Container, DRAIN, Exit, Phase, timestamp};
use crate::bundle::{confinement, known};
use crate::error::Error;
use crate::io::{Ends, Stdio, Streams};

/// How long the end of a container waits for the ends of what was executed in it.
const EXECS_TOLD: Duration = Duration::from_secs(15);

/// One of them.
pub(crate) struct Exec {
    pub(crate) id: String,
    pub(crate) stdio: Stdio,
    phase: Mutex<Phase>,
    exit: watch::Sender<Option<Exit>>,
    /// From Start on.
    streams: Mutex<Option<Arc<Streams>>>,
    /// CloseIO came before Start.
    input_closed: Mutex<bool>,
    /// The container has gone back to before it began.
    dropped: watch::Sender<bool>,
    /// Its end is known, and perhaps not told yet.
    ended: AtomicBool,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Exec {
    pub(super) fn phase(&self) -> Phase {
        *lock(&self.phase)
    }

    fn enter(&self, phase: Phase) {
        *lock(&self.phase) = phase;
    }

    pub(crate) fn status(&self) -> Status {
        match self.phase() {
            Phase::Created => Status::CREATED,
            Phase::Running | Phase::Paused => Status::RUNNING,
            Phase::Stopped | Phase::Deleted => Status::STOPPED,
        }
    }

    pub(crate) fn exited(&self) -> Option<Exit> {
        *self.exit.borrow()
    }

    /// `None` when it is removed without ever having run.
    pub(crate) async fn wait(self: Arc<Self>) -> Option<Exit> {
        let mut exit = self.exit.subscribe();
        // The last other owner's end must end this wait too.
        drop(self);
        exit.wait_for(Option::is_some).await.map(|exit| *exit).unwrap_or(None)
    }

    pub(crate) fn close_stdin(&self) {
        *lock(&self.input_closed) = true;
        if let Some(streams) = &*lock(&self.streams) {
            streams.close_stdin();
        }
    }

    /// Waits until the container has gone back to before it began.
    pub(super) async fn dropped(&self) {
        // Its sender is the exec's.
        let _ = self.dropped.subscribe().wait_for(|dropped| *dropped).await;
    }

    /// See [`Self::dropped`]. One that runs has ended then, as if it had been killed; who follows it says so.
    pub(super) fn drop_out(&self) {
        self.dropped.send_replace(true);
        if self.phase() == Phase::Created {
            self.enter(Phase::Stopped);
            self.exit.send_replace(Some(Exit { status: KILLED_STATUS, at: SystemTime::now() }));
        }
    }

    pub(super) fn has_ended(&self) -> bool {
        self.ended.load(Ordering::Acquire)
    }

    pub(super) fn streams(&self) -> Option<Arc<Streams>> {
        lock(&self.streams).clone()
    }

    fn attach(&self, streams: Arc<Streams>) {
        let mut slot = lock(&self.streams);
        if *lock(&self.input_closed) {
            streams.close_stdin();
        }
        *slot = Some(streams);
    }
}

impl Container {
    pub(crate) fn exec(&self, exec_id: &str) -> Result<Arc<Exec>, Error> {
        lock(&self.execs).get(exec_id).cloned().ok_or_else(|| Error::NoProcess(exec_id.into()))
    }

    /// All that have not been deleted.
    pub(super) fn execs(&self) -> Vec<Arc<Exec>> {
        lock(&self.execs).values().cloned().collect()
    }

    /// Adds a process; `process` is its OCI process object.
    pub(crate) async fn add_exec(&self, exec_id: &str, process: Vec<u8>, stdio: Stdio) -> Result<(), Error> {
        let _turn = self.turn.lock().await;
        let live = self.live();
        match self.phase() {
            Phase::Created | Phase::Running => {}
            phase => return Err(Error::State(format!("cannot exec in a {} state", phase.name()))),
        }
        if exec_id.is_empty() {
            return Err(Error::Invalid("exec: an exec id is needed".into()));
        }
        if lock(&self.execs).contains_key(exec_id) {
            return Err(Error::ExecExists(exec_id.into()));
        }
        stdio.check()?;
        for field in confinement::check_exec(&process).map_err(Error::Invalid)? {
            warn!(self.log, "a field of the process has no effect in a virtual machine"; "exec" => exec_id, "field" => field);
        }
        let process = known::known_only(process);
        let wanted = stdio.wanted();
        live.ask("preparing a process", live.guest.exec(&self.guest_id, exec_id, process, wanted)).await?;
        let exec = Exec {
            id: exec_id.into(),
            stdio,
            phase: Mutex::new(Phase::Created),
            exit: watch::Sender::new(None),
            streams: Mutex::default(),
            input_closed: Mutex::default(),
            dropped: watch::Sender::new(false),
            ended: AtomicBool::new(false),
        };
        lock(&self.execs).insert(exec_id.into(), Arc::new(exec));
        self.events.send(TaskExecAdded {
            container_id: self.id.clone(),
            exec_id: exec_id.into(),
            ..Default::default()
        });
        Ok(())
    }

    pub(crate) async fn start_exec(self: &Arc<Self>, exec_id: &str) -> Result<(), Error> {
        let exec = self.exec(exec_id)?;
        let _turn = self.turn.lock().await;
        let live = self.live();
        match (exec.phase(), self.phase()) {
            (Phase::Created, Phase::Created | Phase::Running) => {}
            (Phase::Created, phase) => {
                return Err(Error::State(format!("cannot exec in a {} state", phase.name())));
            }
            (phase, _) => return Err(Error::State(format!("cannot start a {} process", phase.name()))),
        }
        let ends = Ends::open(&exec.stdio, self.events.namespace(), exec_id).await?;
        let started = SystemTime::now();
        let result = live.ask("starting a process", live.guest.start(&self.guest_id, exec_id)).await;
        if let Err(error) = result {
            exec.enter(Phase::Stopped);
            // Whoever waits for it learns that there is nothing to wait for.
            exec.exit.send_replace(Some(Exit { status: NEVER_RAN, at: started }));
            return Err(error);
        }
        exec.enter(Phase::Running);
        let streams = match self.attach_exec(&exec, ends).await {
            Ok(streams) => Arc::new(streams),
            Err(error) => {
                // Nobody could follow it.
                let kill = live.guest.signal(&self.guest_id, exec_id, libc::SIGKILL.unsigned_abs(), false);
                let _ = live.ask("signalling", kill).await;
                self.spawn_watch(&exec, None, started);
                return Err(error);
            }
        };
        exec.attach(Arc::clone(&streams));
        self.events.send(TaskExecStarted {
            container_id: self.id.clone(),
            exec_id: exec_id.into(),
            pid: self.pid,
            ..Default::default()
        });
        self.spawn_watch(&exec, Some(streams), started);
        Ok(())
    }

    async fn attach_exec(&self, exec: &Exec, ends: Ends) -> Result<Streams, Error> {
        let live = self.live();
        let process = (self.guest_id.as_str(), exec.id.as_str());
        let attached = Streams::attach(&live.guest, process, (exec.stdio.terminal, false), ends, &self.log);
        let streams = live.ask("connecting standard streams", attached).await?;
        streams.start_input()?;
        Ok(streams)
    }

    /// Follows an exec to its end and publishes it.
    fn spawn_watch(self: &Arc<Self>, exec: &Arc<Exec>, streams: Option<Arc<Streams>>, started: SystemTime) {
        let (this, exec) = (Arc::clone(self), Arc::clone(exec));
        tokio::spawn(async move {
            let (status, guest_ns) = this.end_of_exec(&exec).await;
            exec.ended.store(true, Ordering::Release);
            if let Some(streams) = streams.as_ref().filter(|_| this.is_asleep()) {
                streams.give_up();
            }
            let at = this.exit_time(guest_ns, started);
            if let Some(streams) = streams
                && !this.settle(&streams).await
            {
                warn!(this.log, "output is not being read or does not end; the exit is told nevertheless";
                    "exec" => &exec.id);
            }
            info!(this.log, "exec exit"; "exec" => &exec.id, "status" => status);
            this.events.send(TaskExit {
                container_id: this.id.clone(),
                id: exec.id.clone(),
                pid: this.pid,
                exit_status: status,
                exited_at: timestamp(at),
                ..Default::default()
            });
            exec.enter(Phase::Stopped);
            exec.exit.send_replace(Some(Exit { status, at }));
        });
    }

    pub(crate) async fn kill_exec(&self, exec_id: &str, signal: u32) -> Result<(), Error> {
        loop {
            let live = self.live();
            match self.exec(exec_id)?.phase() {
                Phase::Created => return Err(Error::State("process not created".into())),
                Phase::Stopped | Phase::Deleted => return Err(Error::Finished),
                Phase::Running | Phase::Paused => {}
            }
            tokio::select! {
                biased;
                // It may go on in the other machine.
                () = self.replaced(&live) => {}
                sent = live.ask("signalling", live.guest.signal(&self.guest_id, exec_id, signal, false)) => return sent,
            }
        }
    }

    /// Forgets an exec that does not run.
    pub(crate) async fn delete_exec(&self, exec_id: &str) -> Result<Exit, Error> {
        let exec = self.exec(exec_id)?;
        if exec.phase() == Phase::Running {
            return Err(Error::State("cannot delete a running process".into()));
        }
        let streams = exec.streams();
        if let Some(streams) = streams
            && !streams.drain(DRAIN).await
        {
            warn!(self.log, "output was not taken in time and is lost"; "exec" => exec_id);
        }
        // A Start under way comes first.
        let _turn = self.turn.lock().await;
        let live = self.live();
        if exec.phase() == Phase::Running {
            return Err(Error::State("cannot delete a running process".into()));
        }
        // One that hibernates is rid of it when it wakes.
        if !self.is_lost() && live.asleep.is_none() {
            let deleted = live.guest.delete(&self.guest_id, exec_id);
            if let Err(error) = live.ask("deleting a process", deleted).await {
                warn!(self.log, "the guest did not delete the exec"; "exec" => exec_id, "error" => %error);
            }
        }
        exec.enter(Phase::Deleted);
        lock(&self.execs).remove(exec_id);
        Ok(exec.exited().unwrap_or(Exit { status: 0, at: SystemTime::UNIX_EPOCH }))
    }

    /// Waits until the exits of all execs that ran are published.
    pub(super) async fn execs_told(&self) {
        let running: Vec<_> =
            lock(&self.execs).values().filter(|exec| exec.phase() == Phase::Running).cloned().collect();
        let told = async {
            for exec in running {
                exec.wait().await;
            }
        };
        if tokio::time::timeout(EXECS_TOLD, told).await.is_err() {
            warn!(self.log, "processes outlive the container's init; its exit is told nevertheless");
        }
    }

    pub(super) fn forget_execs(&self) {
        lock(&self.execs).clear();
    }
}

/// What runc's shim reports of an exec that could not be started.
const NEVER_RAN: u32 = 255;
