//! Standard streams: containerd's fifos on one side, or files or logging programs in their
//! place, vsock streams of the guest on the other. The fifos are opened as runc's shim opens them: both ends are kept, so that a
//! client may detach and come back without the process seeing a closed pipe.
//!
//! Only the input is opened later, at Start: `ctr` calls CloseIO when its own input ends, but
//! not before Create has answered, and its input ends the moment that the fifo has taken it.
//!
//! Clients close their end of the output when they learn of the exit (`ctr` does, in all
//! versions), whatever is still in the fifo. So the exit is told when they have read all
//! ([`Streams::settle`]), unless they stopped reading or the guest does not stop writing.
//!
//! A rollback puts another machine behind the same clients: each stream then has a further guest's end
//! ([`Streams::go_on_with`]), which it comes to when it has read the one before to its end. A stream that has ended for its
//! client stays ended; what another machine sends on it is thrown away.
//!
//! Streams of a task whose machine is put away rest meanwhile ([`Streams::rest`]): nothing is under way to the guest or from it, and
//! what a client has not taken is kept here.

mod guest_ends;
mod input;
pub(crate) mod logger;
mod output;
mod sink;

use std::io;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use slog::Logger as Log;
use tokio::net::unix::OwnedWriteHalf;
use tokio::net::unix::pipe::{OpenOptions, Receiver, Sender};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinHandle;

pub(crate) use self::guest_ends::GuestEnds;
use self::guest_ends::GuestOutput;
use self::input::copy_input;
use self::logger::Logger;
use self::output::{Counts, Shared, copy_outputs};
use self::sink::Sink;
use crate::guest::{Guest, GuestError, GuestStdio};

/// One copy's buffer: the size of a pipe.
const CHUNK: usize = 64 * 1024;

#[derive(Debug, thiserror::Error)]
pub(crate) enum StdioError {
    #[error(
        "{stream} {uri:?}: the scheme {scheme:?} is not known; use a fifo, or for output file:// or binary://"
    )]
    Scheme { stream: &'static str, uri: String, scheme: String },
    #[error("{stream} {path:?}: cannot be opened: {source}")]
    Open { stream: &'static str, path: String, source: io::Error },
}

/// The streams as containerd named them. Empty means none.
#[derive(Debug, Clone, Default)]
pub(crate) struct Stdio {
    pub(crate) stdin: String,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
    pub(crate) terminal: bool,
}

impl Stdio {
    /// Checks the schemes.
    pub(crate) fn check(&self) -> Result<(), StdioError> {
        for (stream, uri) in [("stdin", &self.stdin), ("stdout", &self.stdout), ("stderr", &self.stderr)] {
            let known = match split(uri).0 {
                "fifo" => true,
                "file" | "binary" => stream != "stdin",
                _ => false,
            };
            if !known {
                let scheme = split(uri).0.to_owned();
                return Err(StdioError::Scheme { stream, uri: uri.clone(), scheme });
            }
        }
        Ok(())
    }

    pub(crate) fn wanted(&self) -> GuestStdio {
        GuestStdio {
            stdin: !self.stdin.is_empty(),
            stdout: !self.stdout.is_empty(),
            stderr: !self.stderr.is_empty() && !self.terminal,
            terminal: self.terminal,
        }
    }
}

/// Scheme, and what stands behind it. A plain path is a fifo.
fn split(uri: &str) -> (&str, &str) {
    uri.split_once("://").unwrap_or(("fifo", uri))
}

/// The host's ends of one process's streams, opened before the guest is asked for anything.
#[derive(Default)]
pub(crate) struct Ends {
    stdin: Option<PathBuf>,
    stdout: Option<Sink>,
    stderr: Option<Sink>,
    logger: Option<Logger>,
}

impl Ends {
    /// `namespace` and `id` are told to a logging program.
    pub(crate) async fn open(stdio: &Stdio, namespace: &str, id: &str) -> Result<Self, StdioError> {
        let mut ends = Self::default();
        let wanted = stdio.wanted();
        if wanted.stdin {
            let path = Path::new(split(&stdio.stdin).1);
            let found = std::fs::metadata(path).and_then(|metadata| match metadata.file_type().is_fifo() {
                true => Ok(()),
                false => Err(io::Error::new(io::ErrorKind::InvalidInput, "not a fifo")),
            });
            let failed = |source| StdioError::Open { stream: "stdin", path: stdio.stdin.clone(), source };
            found.map_err(failed)?;
            ends.stdin = Some(path.into());
        }
        let mut spare = None;
        for (want, stream, uri, slot) in [
            (wanted.stdout, "stdout", &stdio.stdout, &mut ends.stdout),
            (wanted.stderr, "stderr", &stdio.stderr, &mut ends.stderr),
        ] {
            if !want {
                continue;
            }
            let failed = |source| StdioError::Open { stream, path: uri.clone(), source };
            *slot = Some(match split(uri) {
                ("file", path) => Sink::file(Path::new(&logger::unescaped(path))).map_err(failed)?,
                // One program takes both streams.
                ("binary", rest) => match spare.take() {
                    Some(sink) => sink,
                    None => {
                        let (logger, out, error) =
                            Logger::start(&logger::parse(rest), namespace, id).await.map_err(failed)?;
                        ends.logger = Some(logger);
                        spare = Some(error);
                        out
                    }
                },
                (_, path) => Sink::fifo(Path::new(path)).map_err(failed)?,
            });
        }
        Ok(ends)
    }
}

/// The reading end and a writing end that keeps it from ending before CloseIO.
fn open_input(path: &Path) -> io::Result<(Receiver, Sender)> {
    let receiver = OpenOptions::new().open_receiver(path)?;
    let keeper = OpenOptions::new().open_sender(path)?;
    Ok((receiver, keeper))
}

/// The input's side of a process.
enum Input {
    None,
    /// Not started: the fifo to open, the guest's end, and whether CloseIO came already.
    Waiting {
        path: PathBuf,
        guest: OwnedWriteHalf,
        closed: bool,
    },
    /// The copy, what it goes on with, and the writing end that keeps the fifo from ending before CloseIO.
    Open {
        copy: JoinHandle<()>,
        next: mpsc::UnboundedSender<Turn>,
        keeper: Option<Sender>,
    },
}

/// What a copy of input goes on with.
enum Turn {
    Machine(OwnedWriteHalf),
    /// With nothing, until a machine follows; told when the guest has been told.
    Rest(oneshot::Sender<()>),
}

/// A copy to a client.
struct Output {
    name: &'static str,
    copy: JoinHandle<()>,
    next: mpsc::UnboundedSender<GuestOutput>,
}

/// Running copies of one process.
pub(crate) struct Streams {
    input: Mutex<Input>,
    /// Whether a client has one.
    has_input: bool,
    outputs: Mutex<Vec<Output>>,
    /// Guest's ends of outputs.
    counts: watch::Sender<Counts>,
    /// While there is no machine.
    resting: watch::Sender<bool>,
    /// Grows with every byte that goes somewhere.
    progress: Arc<AtomicU64>,
    log: Log,
    logger: Mutex<Option<Logger>>,
}

impl Streams {
    fn new(log: &Log) -> Self {
        Self {
            input: Mutex::new(Input::None),
            has_input: false,
            outputs: Mutex::default(),
            counts: watch::Sender::default(),
            resting: watch::Sender::new(false),
            progress: Arc::default(),
            log: log.clone(),
            logger: Mutex::default(),
        }
    }

    /// Connects each fifo with its guest stream.
    pub(crate) async fn attach(
        guest: &Guest,
        process: (&str, &str),
        (terminal, restored): (bool, bool),
        ends: Ends,
        log: &Log,
    ) -> Result<Self, GuestError> {
        let wanted = GuestStdio {
            stdin: ends.stdin.is_some(),
            stdout: ends.stdout.is_some(),
            stderr: ends.stderr.is_some(),
            terminal,
        };
        let found = GuestEnds::open(guest, process, wanted, restored).await?;
        let mut streams = Self::new(log);
        streams.logger = Mutex::new(ends.logger);
        streams.has_input = ends.stdin.is_some();
        if let Some((path, guest)) = ends.stdin.zip(found.stdin) {
            streams.input = Mutex::new(Input::Waiting { path, guest, closed: false });
        }
        let (mut stdout, mut stderr) = (ends.stdout, ends.stderr);
        for output in found.outputs {
            let sink = if output.name == guest_ends::STDERR { stderr.take() } else { stdout.take() };
            streams.start_output(sink, output);
        }
        Ok(streams)
    }

    /// The same process's streams in another machine, which it was restored in.
    pub(crate) async fn find_again(
        &self,
        guest: &Guest,
        process: (&str, &str),
        terminal: bool,
    ) -> Result<GuestEnds, GuestError> {
        let wanted = GuestStdio { stdin: self.has_input, terminal, ..GuestStdio::default() };
        GuestEnds::open(guest, process, wanted, true).await
    }

    /// Another machine is in the place of the one that these belong to, which is going to end: what it has sent until
    /// now still goes to the clients, then what the other one sends; what it has not taken of the input goes to the other.
    pub(crate) fn go_on_with(&self, ends: GuestEnds) {
        for output in ends.outputs {
            let next = {
                let outputs = self.outputs.lock().unwrap_or_else(PoisonError::into_inner);
                outputs.iter().find(|copy| copy.name == output.name).map(|copy| copy.next.clone())
            };
            let Some(next) = next else {
                self.start_output(None, output);
                continue;
            };
            self.counts.send_modify(|counts| counts.running += 1);
            if next.send(output).is_err() {
                self.counts.send_modify(|counts| counts.running -= 1);
            }
        }
        if let Some(stdin) = ends.stdin {
            match &mut *self.input() {
                Input::None => {}
                Input::Waiting { guest, .. } => *guest = stdin,
                Input::Open { next, .. } => drop(next.send(Turn::Machine(stdin))),
            }
        }
        self.resting.send_replace(false);
    }

    /// From now on a machine's end of a stream is not the stream's: another follows ([`Self::go_on_with`]), or [`Self::give_up`]. To be
    /// called before the guest is told to end its directions.
    pub(crate) fn rest(&self) {
        self.resting.send_replace(true);
    }

    /// After the guest has been told: ends the direction to it. Waits for no client.
    pub(crate) async fn end_input(&self) {
        let told = match &*self.input() {
            Input::Open { next, .. } => {
                let (done, told) = oneshot::channel();
                next.send(Turn::Rest(done)).ok().map(|()| told)
            }
            _ => None,
        };
        if let Some(told) = told {
            // A copy that is gone has ended its direction too.
            let _ = told.await;
        }
    }

    /// Returns when the guest has ended its directions too: what it has sent is with clients, or kept.
    pub(crate) async fn at_rest(&self) {
        let _ = self.counts.subscribe().wait_for(|counts| counts.resting >= counts.running).await;
    }

    /// No machine follows on the one in which these came to rest, if they did: what that sent is the end.
    pub(crate) fn give_up(&self) {
        self.resting.send_replace(false);
    }

    fn start_output(&self, sink: Option<Sink>, first: GuestOutput) {
        let name = first.name;
        let (next, ends) = mpsc::unbounded_channel();
        self.counts.send_modify(|counts| counts.running += 1);
        let shared = Shared {
            counts: self.counts.clone(),
            resting: self.resting.subscribe(),
            progress: Arc::clone(&self.progress),
        };
        let copy = tokio::spawn(copy_outputs(first, ends, sink, shared, self.log.clone()));
        self.outputs.lock().unwrap_or_else(PoisonError::into_inner).push(Output { name, copy, next });
    }

    fn input(&self) -> std::sync::MutexGuard<'_, Input> {
        self.input.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Opens the input's fifo and begins to copy. A client that waits for a reader goes on
    /// now; the kernel counts it as a writer already, so that it is not taken for gone.
    pub(crate) fn start_input(&self) -> Result<(), StdioError> {
        let mut input = self.input();
        match std::mem::replace(&mut *input, Input::None) {
            Input::Waiting { path, guest, closed } => {
                let (receiver, keeper) = open_input(&path).map_err(|source| StdioError::Open {
                    stream: "stdin",
                    path: path.display().to_string(),
                    source,
                })?;
                let (next, ends) = mpsc::unbounded_channel();
                let copy = tokio::spawn(copy_input(receiver, guest, ends, self.log.clone()));
                *input = Input::Open { copy, next, keeper: (!closed).then_some(keeper) };
            }
            other => *input = other,
        }
        Ok(())
    }

    /// CloseIO: no more input than what clients still hold open.
    pub(crate) fn close_stdin(&self) {
        match &mut *self.input() {
            Input::None => {}
            Input::Waiting { closed, .. } => *closed = true,
            Input::Open { keeper, .. } => drop(keeper.take()),
        }
    }

    /// Waits until clients have read all output to its end, as long as there is progress at
    /// least every `stall`, and at most `total`: a guest may send output for ever. Says whether
    /// all of it was read (or nobody reads).
    pub(crate) async fn settle(&self, stall: Duration, total: Duration) -> bool {
        tokio::time::timeout(total, self.settled(stall)).await.unwrap_or(false)
    }

    async fn settled(&self, stall: Duration) -> bool {
        let mut counts = self.counts.subscribe();
        loop {
            let before = self.progress.load(Ordering::Relaxed);
            let ended = tokio::time::timeout(stall, counts.wait_for(Counts::none_runs)).await.is_ok();
            if ended || self.progress.load(Ordering::Relaxed) == before {
                return ended;
            }
        }
    }

    /// Like [`Streams::settle`], but `deadline` is the whole time; then the fifos are closed.
    pub(crate) async fn drain(&self, deadline: Duration) -> bool {
        let mut counts = self.counts.subscribe();
        let whole = tokio::time::timeout(deadline, counts.wait_for(Counts::none_runs)).await.is_ok();
        self.close();
        let logger = self.logger.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(logger) = logger {
            logger.finish().await;
        }
        whole
    }

    fn close(&self) {
        if let Input::Open { copy, .. } = std::mem::replace(&mut *self.input(), Input::None) {
            copy.abort();
        }
        for output in self.outputs.lock().unwrap_or_else(PoisonError::into_inner).drain(..) {
            output.copy.abort();
        }
    }
}

impl Drop for Streams {
    fn drop(&mut self) {
        self.close();
    }
}

#[cfg(test)]
mod tests;
