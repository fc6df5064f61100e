//! How a container comes to its end: by its process, by a signal, with its holder, with its VM,
//! or with the shim. A guest is asked first; one that does not obey in time loses its VM.

use std::os::fd::OwnedFd;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use containerd_shim_protos::events::task::{TaskExit, TaskOOM};
use slog::{info, warn};
use tokio::io::unix::AsyncFd;
use tokio::sync::watch;
use ttrpc::Code;

use super::{Container, Exec, Exit, LOST, Live, Phase, timestamp};
use crate::error::Error;
use crate::guest::GuestError;
use crate::io::Streams;

/// Status of a process that was killed with its VM: 128 + SIGKILL.
pub(super) const KILLED_STATUS: u32 = 137;
/// What clients may take to read the last output when the shim has to go.
pub(super) const LAST_OUTPUT: Duration = Duration::from_secs(1);
/// How long a client may stop reading output before the exit is told all the same.
const STALL: Duration = Duration::from_secs(10);
/// How long output may hold the exit back at all. What a process leaves behind in pipes and
/// buffers is less than a MiB, so this is for slow clients and against guests that make it up.
const SETTLE: Duration = Duration::from_secs(60);
/// How long SIGKILL may take to be obeyed.
const KILLED: Duration = Duration::from_secs(10);
/// Between two events of the same kind that a guest can cause at will.
const BETWEEN_OOMS: Duration = Duration::from_secs(1);
/// How long the exit waits for the guest to tell that memory was the reason.
const OOM_TOLD: Duration = Duration::from_secs(1);
/// What processes get between SIGTERM and SIGKILL when the shim has to go.
const GRACE: Duration = Duration::from_secs(3);
/// How long the guest may then take in all; most of it is for writing its cache back.
const SHUTDOWN: Duration = Duration::from_secs(20);

/// How far the end has come. Each flag is set once and never cleared.
pub(super) struct Ending {
    /// The process has ended, as far as can be known; its exit may still wait for its output.
    over: watch::Sender<bool>,
    /// The guest was given up and its VM killed, whether or not the VMM dies of it.
    cut: watch::Sender<bool>,
    /// The shim has to go; clients are not waited for.
    hurried: watch::Sender<bool>,
    /// SIGKILL was sent.
    killed: watch::Sender<bool>,
    holder: Arc<AsyncFd<OwnedFd>>,
}

impl Ending {
    pub(super) fn new(holder: Arc<AsyncFd<OwnedFd>>) -> Self {
        let flag = || watch::Sender::new(false);
        Self { over: flag(), cut: flag(), hurried: flag(), killed: flag(), holder }
    }

    pub(super) fn is_hurried(&self) -> bool {
        *self.hurried.borrow()
    }

    /// Whether somebody wants the process to end who cannot be refused.
    pub(super) fn is_meant(&self) -> bool {
        self.is_hurried() || *self.killed.borrow()
    }

    /// Waits until somebody does, or the process has ended.
    pub(super) async fn over_or_meant(&self) {
        tokio::select! {
            () = set(&self.over) => {}
            () = set(&self.hurried) => {}
            () = set(&self.killed) => {}
        }
    }

    /// Waits for the process's end.
    pub(super) async fn over(&self) {
        set(&self.over).await;
    }

    /// Waits until the shim has to go.
    pub(super) async fn hurried(&self) {
        set(&self.hurried).await;
    }
}

async fn set(flag: &watch::Sender<bool>) {
    let _ = flag.subscribe().wait_for(|set| *set).await;
}

impl Container {
    /// Follows the process to its end, whichever way that comes, and publishes it.
    pub(crate) async fn watch(self: Arc<Self>, seen: impl FnOnce()) {
        tokio::spawn(Arc::clone(&self).watch_holder());
        let (status, guest_ns) = self.end_of_process().await;
        let started = *self.started.lock().unwrap_or_else(PoisonError::into_inner);
        let at = self.exit_time(guest_ns, started);
        seen();
        self.ending.over.send_replace(true);
        if self.is_asleep() {
            self.streams.give_up();
        }
        // Clients take the exit for the end of the output.
        if !self.settle(&self.streams).await {
            warn!(self.log, "output is not being read or does not end; the exit is told nevertheless");
        }
        let watching = self.memory.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(watching) = watching {
            let _ = tokio::time::timeout(OOM_TOLD, watching).await;
        }
        let _turn = self.turn.lock().await;
        self.export_for_end().await;
        // What was executed in the container has ended with it, and is told before it.
        self.execs_told().await;
        // Who sees a stopped container looks for its exit.
        let _ = self.exit.send_replace(Some(Exit { status, at }));
        if self.phase() != Phase::Deleted {
            self.enter(Phase::Stopped);
        }
        info!(self.log, "task exit"; "status" => status);
        self.events.send(TaskExit {
            container_id: self.id.clone(),
            id: self.id.clone(),
            pid: self.pid,
            exit_status: status,
            exited_at: timestamp(at),
            ..Default::default()
        });
    }

    /// The status and, if the guest told it, the time.
    async fn end_of_process(&self) -> (u32, Option<i64>) {
        loop {
            let live = self.live();
            tokio::select! {
                biased;
                // The end of a machine that was replaced is nobody's.
                () = self.replaced(&live) => {}
                end = self.end_in(&live) => return end,
            }
        }
    }

    async fn end_in(&self, live: &Live) -> (u32, Option<i64>) {
        if live.asleep.is_some() {
            set(&self.ending.cut).await;
            return (KILLED_STATUS, None);
        }
        tokio::select! {
            // An answer that has arrived counts, whatever became of the guest since.
            biased;
            answer = live.guest.wait(&self.guest_id, "") => match answer {
                Ok(exit) => return (exit.status, Some(exit.at_ns)),
                Err(error) => {
                    // Without its agent a guest is lost; PID 1's end usually ends the VM.
                    match tokio::time::timeout(LOST, live.vm.ended()).await {
                        Ok(end) => self.say_vm_ended(&end.cause),
                        Err(_) => {
                            warn!(self.log, "the guest's agent is gone, ending its VM"; "error" => %error);
                            self.cut().await;
                        }
                    }
                }
            },
            end = live.vm.ended() => self.say_vm_ended(&end.cause),
            () = set(&self.ending.cut) => {}
        }
        (KILLED_STATUS, None)
    }

    fn say_vm_ended(&self, cause: &str) {
        warn!(self.log, "the VM ended under the container"; "cause" => cause);
    }

    /// The status of an exec and, if the guest told it, the time.
    pub(super) async fn end_of_exec(&self, exec: &Exec) -> (u32, Option<i64>) {
        loop {
            let live = self.live();
            tokio::select! {
                biased;
                // The machine in its place may never have had it.
                () = exec.dropped() => return (KILLED_STATUS, None),
                () = self.replaced(&live) => {}
                end = self.end_of_exec_in(&live, &exec.id) => return end,
            }
        }
    }

    async fn end_of_exec_in(&self, live: &Live, exec_id: &str) -> (u32, Option<i64>) {
        let lost = async {
            tokio::select! {
                _ = live.vm.ended(), if live.asleep.is_none() => {}
                () = set(&self.ending.cut) => {}
            }
        };
        tokio::select! {
            biased;
            Ok(exit) = live.guest.wait(&self.guest_id, exec_id) => (exit.status, Some(exit.at_ns)),
            // Who watches the container's init sees to a guest that does not answer.
            () = lost => (KILLED_STATUS, None),
        }
    }

    /// Follows the kernel's kills for lack of memory in this machine, and in no other any more. One that was restored has counted
    /// some already.
    pub(super) fn follow_memory(self: &Arc<Self>, live: Arc<Live>, restored: bool) {
        let watching = tokio::spawn(Arc::clone(self).watch_memory(live, restored));
        let before = self.memory.lock().unwrap_or_else(PoisonError::into_inner).replace(watching);
        if let Some(before) = before {
            before.abort();
        }
    }

    async fn watch_memory(self: Arc<Self>, live: Arc<Live>, restored: bool) {
        let mut seen = if restored { self.kills_so_far(&live).await } else { 0 };
        loop {
            match live.guest.wait_oom(&self.guest_id, seen).await {
                Ok(kills) if kills > seen => seen = kills,
                Ok(_) => return,
                // The container has ended.
                Err(GuestError::Refused { code: Code::NOT_FOUND, .. } | GuestError::Lost { .. }) => return,
                Err(error) => {
                    return warn!(self.log, "kills for lack of memory will not be told"; "error" => %error);
                }
            }
            info!(self.log, "processes were killed for lack of memory"; "so far" => seen);
            self.events.send(TaskOOM { container_id: self.id.clone(), ..Default::default() });
            // Whatever a guest makes up: the next number stands for all kills until then.
            tokio::time::sleep(BETWEEN_OOMS).await;
        }
    }

    /// Those that a restored container's counter came with.
    async fn kills_so_far(&self, live: &Live) -> u64 {
        let files = live.guest.stats(&self.guest_id).await.unwrap_or_default();
        let events = files.get("memory.events").map_or("", String::as_str);
        let kills = events.lines().find_map(|line| line.strip_prefix("oom_kill ")?.trim().parse().ok());
        kills.unwrap_or(0)
    }

    /// The guest's clock tells the time of the exit best, if it is sane.
    pub(super) fn exit_time(&self, guest_ns: Option<i64>, started: SystemTime) -> SystemTime {
        let now = SystemTime::now();
        match guest_ns.and_then(|ns| u64::try_from(ns).ok()).map(|ns| UNIX_EPOCH + Duration::from_nanos(ns)) {
            Some(at) if at >= started && at <= now => at,
            _ => now,
        }
    }

    pub(super) async fn settle(&self, streams: &Streams) -> bool {
        let hurried = async {
            set(&self.ending.hurried).await;
            tokio::time::sleep(LAST_OUTPUT).await;
        };
        tokio::select! {
            settled = streams.settle(STALL, SETTLE) => settled,
            () = hurried => false,
        }
    }

    /// The holder's pid is the task's: whoever kills it means the container.
    async fn watch_holder(self: Arc<Self>) {
        tokio::select! {
            () = set(&self.ending.over) => {}
            _ = self.ending.holder.readable() => {
                warn!(self.log, "the task's holder process was killed, ending the container"; "pid" => self.pid);
                // The guest ends it in order and keeps what it wrote; it has no choice.
                let _ = self.kill(libc::SIGKILL.unsigned_abs(), true).await;
            }
        }
    }

    pub(crate) async fn kill(self: &Arc<Self>, signal: u32, all: bool) -> Result<(), Error> {
        if self.is_over() || self.live().is_lost() {
            return Err(Error::Finished);
        }
        let fatal = signal == libc::SIGKILL.unsigned_abs();
        if fatal {
            self.ending.killed.send_replace(true);
            tokio::spawn(Arc::clone(self).insist());
        }
        let sent = loop {
            let live = self.live();
            if fatal && live.asleep.is_some() {
                self.cut().await;
                return Ok(());
            }
            tokio::select! {
                biased;
                // Whichever machine it reached: it is meant for the container.
                () = self.replaced(&live) => {}
                sent = live.ask("signalling", live.guest.signal(&self.guest_id, "", signal, all)) => break sent,
            }
        };
        match sent {
            Err(Error::Vm(_)) if fatal => Ok(()),
            Err(Error::Vm(_)) => Err(Error::Finished),
            Err(Error::Guest(error)) if fatal && error.is_silence() => {
                warn!(self.log, "SIGKILL is not answered, ending the VM"; "error" => %error);
                self.cut().await;
                Ok(())
            }
            Err(Error::Guest(GuestError::Refused {
                code: Code::NOT_FOUND | Code::FAILED_PRECONDITION,
                ..
            })) => Err(Error::Finished),
            other => other,
        }
    }

    /// SIGKILL cannot be ignored, whatever a hung or hostile guest makes of it.
    async fn insist(self: Arc<Self>) {
        if tokio::time::timeout(KILLED, set(&self.ending.over)).await.is_err() {
            warn!(self.log, "SIGKILL is not obeyed, ending the VM"; "seconds" => KILLED.as_secs());
            self.cut().await;
        }
    }

    /// Gives the guest up: what it has not written back is lost.
    async fn cut(&self) {
        let live = self.live();
        live.vm.kill().await;
        self.ending.cut.send_replace(true);
        // None takes its place from now on; one may have until now.
        self.live().vm.kill().await;
    }

    /// Whether the process has ended, as far as is known.
    pub(super) fn is_over(&self) -> bool {
        *self.ending.over.borrow()
    }

    /// Whether there is no guest any more that could be asked for anything.
    pub(super) fn is_lost(&self) -> bool {
        self.live().is_lost() || *self.ending.cut.borrow()
    }

    /// Ends the process and the guest as a machine's own shutdown would, disks written back; by
    /// force when the guest does not do it in time. The exit then waits for no client.
    pub(crate) async fn shut_down(&self) {
        self.ending.hurried.send_replace(true);
        let live = loop {
            let live = self.live();
            if self.is_lost() {
                return;
            }
            if live.asleep.is_some() {
                return self.cut().await;
            }
            let asked = live.guest.shutdown(GRACE, SHUTDOWN);
            tokio::select! {
                biased;
                // A rollback that could not be stopped any more.
                () = self.replaced(&live) => continue,
                answer = live.ask("shutting the guest down", asked) => match answer {
                    // It powers itself off when its answer is out.
                    Ok(()) => drop(tokio::time::timeout(LOST, live.vm.ended()).await),
                    Err(error) => warn!(self.log, "the guest did not shut down in order"; "error" => %error),
                },
            }
            break live;
        };
        if !live.vm.has_ended() {
            self.cut().await;
        }
    }
}
