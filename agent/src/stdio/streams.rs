//! The table of streams: who may attach to what, and what happens when either side ends.
//!
//! Owned by the server's one thread; the locks are held for look-ups only, never across an
//! await. Lock order: table, then slot.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use spore_agent_api::stream::{
    Hello, Kind, REFUSED_ALREADY_ATTACHED, REFUSED_NO_SUCH_PROCESS, REFUSED_NO_SUCH_STREAM,
};
use tokio::io::Interest;
use tokio::sync::watch;

use super::pump::{self, Stopped, Unsent, Watched};

/// The agent's end of one stream.
#[derive(Debug)]
pub enum End {
    /// Write end of the process's stdin.
    Input(Watched, Unsent),
    /// Read end of the process's stdout or stderr.
    Output(Watched, Unsent),
    /// Master of the process's terminal; what is to go out, and what was typed.
    Terminal(Watched, Unsent, Unsent),
}

#[derive(Debug)]
enum Slot {
    Waiting(End),
    /// Tells whoever serves the connection to part from it, and learns when it is served no more.
    Attached(watch::Sender<bool>),
    Ended,
}

type SharedSlot = Arc<Mutex<Slot>>;

/// The streams of one process, by [`Kind`]; a terminal stands in the place of stdin.
#[derive(Debug, Default)]
pub struct ProcessStreams {
    slots: [Option<SharedSlot>; 3],
}

impl ProcessStreams {
    /// Adds the agent's end of a stream.
    pub fn add(&mut self, kind: Kind, end: End) {
        if let Some(slot) = self.slots.get_mut(kind as usize) {
            *slot = Some(Arc::new(Mutex::new(Slot::Waiting(end))));
        }
    }
}

/// A stream taken by one connection.
#[derive(Debug)]
pub struct Attachment {
    end: End,
    slot: SharedSlot,
    parting: watch::Receiver<bool>,
}

/// All streams of the guest.
#[derive(Debug, Default)]
pub struct Streams {
    processes: Mutex<HashMap<(String, String), ProcessStreams>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Streams {
    /// Publishes a process's streams.
    pub fn insert(&self, id: &str, exec_id: &str, streams: ProcessStreams) {
        lock(&self.processes).insert((id.into(), exec_id.into()), streams);
    }

    /// Forgets a process's streams. Attached ones run to their end; the others are closed.
    pub fn remove(&self, id: &str, exec_id: &str) {
        lock(&self.processes).remove(&(id.into(), exec_id.into()));
    }

    /// Takes the stream that a hello names, or answers the refusal's code.
    pub fn attach(&self, hello: &Hello) -> Result<Attachment, u8> {
        let processes = lock(&self.processes);
        let key = (hello.id.clone(), hello.exec_id.clone());
        let process = processes.get(&key).ok_or(REFUSED_NO_SUCH_PROCESS)?;
        let slot =
            process.slots.get(hello.kind as usize).and_then(Option::as_ref).ok_or(REFUSED_NO_SUCH_STREAM)?;
        let mut state = lock(slot);
        let (told, parting) = watch::channel(false);
        match std::mem::replace(&mut *state, Slot::Attached(told)) {
            Slot::Waiting(end) => Ok(Attachment { end, slot: Arc::clone(slot), parting }),
            other => {
                let refusal = match other {
                    Slot::Ended => REFUSED_NO_SUCH_STREAM,
                    _ => REFUSED_ALREADY_ATTACHED,
                };
                *state = other;
                Err(refusal)
            }
        }
    }

    /// Has all streams of a container, those of its execs too, part from their connections with nothing left under way on them: no more is
    /// sent, which the peer reads as an end of file, and what the peer sends until it ends its own direction is kept for
    /// the process. They wait for their next connections then.
    pub fn part(&self, id: &str) -> Parting {
        let processes = lock(&self.processes);
        let own = processes.iter().filter(|((container, _), _)| container == id);
        let told = own.flat_map(|(_, process)| process.slots.iter().flatten()).filter_map(|slot| {
            let state = lock(slot);
            let Slot::Attached(told) = &*state else { return None };
            told.send_replace(true);
            Some(told.clone())
        });
        Parting(told.collect())
    }
}

/// Streams that have been told to part.
#[derive(Debug)]
pub struct Parting(Vec<watch::Sender<bool>>);

impl Parting {
    /// Waits until all have; those that take input wait for their peer's end.
    pub async fn done(self) {
        for told in self.0 {
            told.closed().await;
        }
    }
}

impl Attachment {
    /// Serves the connection until it or the stream ends, or the two part.
    pub async fn run(self, connection: Watched) {
        let Self { end, slot, mut parting } = self;
        let rest = match end {
            End::Input(pipe, unsent) => input(pipe, unsent, &connection, &mut parting).await,
            End::Output(pipe, unsent) => output(pipe, unsent, &connection, &mut parting).await,
            End::Terminal(master, unsent, typed) => {
                terminal(master, (unsent, typed), &connection, &mut parting).await
            }
        };
        *lock(&slot) = rest.map_or(Slot::Ended, Slot::Waiting);
    }
}

async fn told(parting: &mut watch::Receiver<bool>) {
    // Its sender is in the slot, until this connection is served no more.
    let _ = parting.wait_for(|told| *told).await;
}

/// Each of these gives back its end when the connection broke, or was parted from, before the stream ended.
async fn input(
    pipe: Watched,
    mut unsent: Unsent,
    connection: &Watched,
    parting: &mut watch::Receiver<bool>,
) -> Option<End> {
    let stopped = tokio::select! {
        stopped = pump::copy(connection, &pipe, &mut unsent) => stopped,
        error = pump::broken(connection) => Stopped::SourceFailed(error),
        // Every reader has closed the pipe: nobody waits for input any more, and the shim
        // should not either.
        _ = pipe.ready(Interest::ERROR) => return None,
        () = told(parting) => {
            // Nothing is lost by a failure: the connection broke, as it may at any time.
            let _ = unsent.fill(connection).await;
            return Some(End::Input(pipe, unsent));
        }
    };
    match stopped {
        // The peer's part of the parting. If its input ended before, it says so again.
        Stopped::SourceEnded if *parting.borrow() => Some(End::Input(pipe, unsent)),
        // Dropping the pipe is the process's end of file.
        Stopped::SourceEnded | Stopped::DestinationFailed(_) => None,
        Stopped::SourceFailed(_) => Some(End::Input(pipe, unsent)),
    }
}

async fn output(
    pipe: Watched,
    mut unsent: Unsent,
    connection: &Watched,
    parting: &mut watch::Receiver<bool>,
) -> Option<End> {
    let stopped = tokio::select! {
        biased;
        () = told(parting) => None,
        stopped = outgoing(&pipe, &mut unsent, connection) => Some(stopped),
    };
    waits_again(stopped.as_ref(), connection).then_some(End::Output(pipe, unsent))
}

/// Whether there is more of an output, which has stopped, or parted from its connection, for the next one. Unless the connection
/// broke, its direction ends.
fn waits_again(stopped: Option<&Stopped>, connection: &Watched) -> bool {
    if matches!(stopped, Some(Stopped::DestinationFailed(_))) {
        return true;
    }
    pump::finish(connection);
    stopped.is_none()
}

/// A process that writes nothing shows nothing of a connection that is gone.
async fn outgoing(from: &Watched, unsent: &mut Unsent, connection: &Watched) -> Stopped {
    tokio::select! {
        biased;
        error = pump::broken(connection) => Stopped::DestinationFailed(error),
        stopped = pump::copy(from, connection, unsent) => stopped,
    }
}

async fn terminal(
    master: Watched,
    (mut unsent, mut typed): (Unsent, Unsent),
    connection: &Watched,
    parting: &mut watch::Receiver<bool>,
) -> Option<End> {
    let stopped = {
        let input = async {
            // The end of the input is not the end of the session: the output goes on.
            pump::copy(connection, &master, &mut typed).await;
            std::future::pending::<()>().await;
        };
        tokio::select! {
            stopped = outgoing(&master, &mut unsent, connection) => Some(stopped),
            () = input => return None,
            () = told(parting) => None,
        }
    };
    let again = waits_again(stopped.as_ref(), connection);
    if stopped.is_none() {
        let _ = typed.fill(connection).await;
    }
    again.then_some(End::Terminal(master, unsent, typed))
}

/// A connected, non-blocking socket for [`Attachment::run`].
pub fn connection(fd: OwnedFd) -> std::io::Result<Watched> {
    pump::watch(fd)
}
