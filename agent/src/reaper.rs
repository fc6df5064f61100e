//! The one place that reaps children.
//!
//! PID 1 inherits every orphan of the guest and must reap them all, and exactly one caller
//! may reap: whoever calls `waitpid` elsewhere steals statuses. [`Reaper::run`] reaps
//! everything on SIGCHLD and hands the status of a claimed pid to its [`Child`] handles.
//!
//! A child may end before its pid is known here (a container's init is born in the runtime
//! helper). Statuses of unclaimed children are therefore kept while any [`Expectation`]
//! is alive, and dropped otherwise.
//!
//! One mutex, a leaf in the lock order: nothing else is locked or awaited under it.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use nix::errno::Errno;
use tokio::sync::watch;

use crate::sys;

/// How and when a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Exit {
    /// 0..=255; 128+n for signal n.
    pub status: u32,
    /// Guest wall clock when it was reaped, nanoseconds since the epoch.
    pub at_ns: i64,
}

#[derive(Debug, Default)]
struct Table {
    claimed: HashMap<i32, watch::Sender<Option<Exit>>>,
    expectations: usize,
    early: HashMap<i32, Exit>,
}

/// See the module.
#[derive(Debug, Default)]
pub struct Reaper {
    table: Mutex<Table>,
}

/// A claimed child.
#[derive(Debug, Clone)]
pub struct Child {
    pid: i32,
    exit: watch::Receiver<Option<Exit>>,
}

/// While it lives, no status is lost.
pub struct Expectation {
    reaper: Arc<Reaper>,
}

impl Reaper {
    pub fn new() -> Arc<Self> {
        Arc::new(Self::default())
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Announces that a child is about to be born; claim its pid on the result.
    pub fn expect(self: &Arc<Self>) -> Expectation {
        self.table().expectations += 1;
        Expectation { reaper: Arc::clone(self) }
    }

    /// Sends a signal to a claimed child that has not been reaped, so never to a stranger
    /// that got its pid later. `ESRCH` when it has been.
    pub fn signal(&self, child: &Child, signal: i32) -> Result<(), Errno> {
        let table = self.table();
        if !table.claimed.contains_key(&child.pid) || child.exit.borrow().is_some() {
            return Err(Errno::ESRCH);
        }
        sys::kill(child.pid, signal)
    }

    /// Reaps everything that has ended.
    pub fn reap(&self) {
        let mut table = self.table();
        while let Some((pid, status)) = sys::reap_one() {
            let exit = Exit { status, at_ns: now_ns() };
            if let Some(sender) = table.claimed.remove(&pid) {
                sender.send_replace(Some(exit));
            } else if table.expectations > 0 {
                table.early.insert(pid, exit);
            }
        }
    }

    /// Reaps for ever.
    pub async fn run(self: Arc<Self>) -> std::io::Error {
        let mut signals = match tokio::signal::unix::signal(tokio::signal::unix::SignalKind::child()) {
            Ok(signals) => signals,
            Err(error) => return error,
        };
        loop {
            // First, because children may have ended before the handler stood.
            self.reap();
            if signals.recv().await.is_none() {
                return std::io::Error::other("the stream of SIGCHLD ended");
            }
        }
    }
}

impl Expectation {
    /// Takes the child `pid`, ended already or not.
    pub fn claim(&self, pid: i32) -> Child {
        let mut table = self.reaper.table();
        let (sender, exit) = watch::channel(table.early.remove(&pid));
        if exit.borrow().is_none() {
            table.claimed.insert(pid, sender);
        }
        Child { pid, exit }
    }
}

impl Drop for Expectation {
    fn drop(&mut self) {
        let mut table = self.reaper.table();
        table.expectations -= 1;
        if table.expectations == 0 {
            table.early.clear();
        }
    }
}

impl Child {
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// The exit, if it has been reaped.
    pub fn exited(&self) -> Option<Exit> {
        *self.exit.borrow()
    }

    /// Waits for the exit. Any number of tasks may wait, at any time.
    pub async fn wait(&self) -> Exit {
        let mut exit = self.exit.clone();
        loop {
            if let Some(exit) = *exit.borrow_and_update() {
                return exit;
            }
            if exit.changed().await.is_err() {
                // The sender goes only after it has sent.
                if let Some(exit) = *exit.borrow() {
                    return exit;
                }
                std::future::pending::<()>().await;
            }
        }
    }
}

/// The guest's wall clock, nanoseconds since the epoch.
pub fn now_ns() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_nanos()).unwrap_or(i64::MAX)
}
