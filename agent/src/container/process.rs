//! One process of a container, its init or an exec: prepared, started, ended. Whoever waits
//! may do so at any time, before it is started too.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nix::errno::Errno;
use tokio::sync::watch;

use crate::error::{AgentError, Result};
use crate::reaper::{Child, Exit, Reaper};

/// Where a process stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    Created,
    Running,
    Stopped,
}

/// What State answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Snapshot {
    pub status: Status,
    /// 0 until there is a process.
    pub pid: u32,
    pub exit: Option<Exit>,
}

/// See the module.
#[derive(Debug)]
pub struct Process {
    child: watch::Sender<Option<Child>>,
    started: AtomicBool,
    /// Master of its terminal, for its size.
    terminal: Mutex<Option<OwnedFd>>,
}

impl Process {
    /// One that does not exist yet.
    pub fn prepared() -> Self {
        Self { child: watch::Sender::new(None), started: false.into(), terminal: Mutex::default() }
    }

    /// One that exists and waits to be started.
    pub fn created(child: Child, terminal: Option<OwnedFd>) -> Self {
        let process = Self::prepared();
        process.born(child, terminal);
        process
    }

    /// It exists now.
    pub fn born(&self, child: Child, terminal: Option<OwnedFd>) {
        *self.terminal() = terminal;
        self.child.send_replace(Some(child));
    }

    pub fn set_started(&self) {
        self.started.store(true, Ordering::Relaxed);
    }

    fn terminal(&self) -> MutexGuard<'_, Option<OwnedFd>> {
        self.terminal.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn child(&self) -> Option<Child> {
        self.child.borrow().clone()
    }

    pub fn pid(&self) -> u32 {
        self.child().map_or(0, |child| child.pid().unsigned_abs())
    }

    pub fn exited(&self) -> Option<Exit> {
        self.child()?.exited()
    }

    pub fn snapshot(&self) -> Snapshot {
        let (pid, exit) = (self.pid(), self.exited());
        let status = match (exit, self.started.load(Ordering::Relaxed)) {
            (Some(_), _) => Status::Stopped,
            (None, true) => Status::Running,
            (None, false) => Status::Created,
        };
        Snapshot { status, pid, exit }
    }

    pub fn status(&self) -> Status {
        self.snapshot().status
    }

    /// Waits for the exit; `None` if the process is removed without ever having existed.
    pub async fn wait(self: Arc<Self>) -> Option<Exit> {
        let mut child = self.child.subscribe();
        // The last other owner's end must end this wait too.
        drop(self);
        let child = child.wait_for(Option::is_some).await.ok()?.clone()?;
        Some(child.wait().await)
    }

    /// `what` names the process in the error.
    pub fn signal(&self, reaper: &Reaper, signal: i32, what: &str) -> Result<()> {
        let Some(child) = self.child() else {
            return Err(AgentError::FailedPrecondition(format!("{what}: process not created")));
        };
        match reaper.signal(&child, signal) {
            Ok(()) => Ok(()),
            Err(Errno::ESRCH) => Err(AgentError::NotFound(format!("{what}: process already finished"))),
            Err(error) => Err(AgentError::internal(format!("{what}: signal {signal}"), error.desc())),
        }
    }

    /// Sets the terminal's size; without a terminal there is nothing to set.
    pub fn resize(&self, rows: u16, columns: u16) -> std::io::Result<()> {
        match &*self.terminal() {
            Some(master) => crate::sys::set_window_size(master.as_fd(), rows, columns),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[tokio::test]
    async fn waiting_for_what_is_removed_before_it_exists_ends() {
        let process = Arc::new(Process::prepared());
        assert_eq!(process.snapshot(), Snapshot { status: Status::Created, pid: 0, exit: None });
        let waiting = tokio::spawn(Arc::clone(&process).wait());
        tokio::task::yield_now().await;
        drop(process);
        let exit = tokio::time::timeout(Duration::from_secs(10), waiting).await.unwrap().unwrap();
        assert_eq!(exit, None);
    }

    #[test]
    fn a_process_that_does_not_exist_cannot_be_signalled() {
        let error = Process::prepared().signal(&Reaper::new(), 15, "exec \"e\"").unwrap_err();
        assert!(matches!(error, AgentError::FailedPrecondition(_)), "{error}");
    }
}
