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

pub(crate) mod logger;
mod sink;

use std::io;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use slog::{Logger as Log, debug, warn};
use spore_agent_api::stream::Kind;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::unix::pipe::{OpenOptions, Receiver, Sender};
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::watch;
use tokio::task::JoinHandle;

use self::logger::Logger;
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
    /// The copy, and the writing end that keeps the fifo from ending before CloseIO.
    Open {
        copy: JoinHandle<()>,
        keeper: Option<Sender>,
    },
}

/// Running copies of one process.
pub(crate) struct Streams {
    input: Mutex<Input>,
    outputs: Mutex<Vec<JoinHandle<()>>>,
    /// Output copies that have not ended.
    running: watch::Sender<usize>,
    /// Grows with every byte that goes somewhere.
    progress: Arc<AtomicU64>,
    log: Log,
    logger: Mutex<Option<Logger>>,
}

impl Streams {
    fn new(log: &Log) -> Self {
        Self {
            input: Mutex::new(Input::None),
            outputs: Mutex::default(),
            running: watch::Sender::new(0),
            progress: Arc::default(),
            log: log.clone(),
            logger: Mutex::default(),
        }
    }

    /// Connects each fifo with its guest stream.
    pub(crate) async fn attach(
        guest: &Guest,
        (id, exec_id): (&str, &str),
        (terminal, restored): (bool, bool),
        ends: Ends,
        log: &Log,
    ) -> Result<Self, GuestError> {
        // A restored process has the streams that it was created with: fewer than are wanted now, or more, which
        // nobody reads, so that they must be emptied.
        let open = async |name: &'static str, kind: Kind| match guest.open_stdio(id, exec_id, kind).await? {
            None if !restored => Err(GuestError::Connect {
                what: "open a stdio stream",
                detail: format!("the process has no {name}"),
            }),
            stream => Ok(stream),
        };
        let mut streams = Self::new(log);
        streams.logger = Mutex::new(ends.logger);
        if terminal {
            if (ends.stdin.is_some() || ends.stdout.is_some() || restored)
                && let Some(stream) = open("terminal", Kind::Stdin).await?
            {
                let (from_guest, to_guest) = stream.into_split();
                let rest = streams.set_input(ends.stdin, to_guest);
                streams.start_output("terminal", ends.stdout, from_guest, rest);
            }
            return Ok(streams);
        }
        if ends.stdin.is_some()
            && let Some(stream) = open("stdin", Kind::Stdin).await?
        {
            let (from_guest, to_guest) = stream.into_split();
            streams.set_input(ends.stdin, to_guest);
            // Nothing comes back on it.
            drop(from_guest);
        }
        for (name, kind, sink) in
            [("stdout", Kind::Stdout, ends.stdout), ("stderr", Kind::Stderr, ends.stderr)]
        {
            if (sink.is_some() || restored)
                && let Some(stream) = open(name, kind).await?
            {
                let (from_guest, to_guest) = stream.into_split();
                streams.start_output(name, sink, from_guest, Some(to_guest));
            }
        }
        Ok(streams)
    }

    /// Gives the guest's end back when there is nothing to feed it.
    fn set_input(&mut self, path: Option<PathBuf>, guest: OwnedWriteHalf) -> Option<OwnedWriteHalf> {
        let Some(path) = path else { return Some(guest) };
        self.input = Mutex::new(Input::Waiting { path, guest, closed: false });
        None
    }

    /// `keep` is the unused direction: closing it would look as if the client had gone.
    fn start_output(
        &self,
        name: &'static str,
        sink: Option<Sink>,
        from_guest: OwnedReadHalf,
        keep: Option<OwnedWriteHalf>,
    ) {
        let running = self.running.clone();
        let (progress, log) = (Arc::clone(&self.progress), self.log.clone());
        running.send_modify(|count| *count += 1);
        let copy = tokio::spawn(async move {
            copy_output(name, from_guest, sink, &progress, &log).await;
            drop(keep);
            running.send_modify(|count| *count -= 1);
        });
        self.outputs.lock().unwrap_or_else(PoisonError::into_inner).push(copy);
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
                let copy = tokio::spawn(copy_input(receiver, guest, self.log.clone()));
                *input = Input::Open { copy, keeper: (!closed).then_some(keeper) };
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
        let mut running = self.running.subscribe();
        loop {
            let before = self.progress.load(Ordering::Relaxed);
            let ended = tokio::time::timeout(stall, running.wait_for(|count| *count == 0)).await.is_ok();
            if ended || self.progress.load(Ordering::Relaxed) == before {
                return ended;
            }
        }
    }

    /// Like [`Streams::settle`], but `deadline` is the whole time; then the fifos are closed.
    pub(crate) async fn drain(&self, deadline: Duration) -> bool {
        let mut running = self.running.subscribe();
        let whole = tokio::time::timeout(deadline, running.wait_for(|count| *count == 0)).await.is_ok();
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
            output.abort();
        }
    }
}

impl Drop for Streams {
    fn drop(&mut self) {
        self.close();
    }
}

async fn copy_input(mut fifo: Receiver, mut guest: OwnedWriteHalf, log: Log) {
    let mut buffer = vec![0; CHUNK];
    let end: io::Result<()> = async {
        loop {
            let length = fifo.read(&mut buffer).await?;
            if length == 0 {
                return guest.shutdown().await;
            }
            guest.write_all(&buffer[..length]).await?;
        }
    }
    .await;
    // A process that does not read its input to the end is no fault.
    debug!(log, "stdin ended"; "result" => ?end);
}

async fn copy_output(
    name: &'static str,
    mut guest: OwnedReadHalf,
    mut sink: Option<Sink>,
    progress: &AtomicU64,
    log: &Log,
) {
    let mut buffer = vec![0; CHUNK];
    let mut total = 0u64;
    let end: io::Result<()> = async {
        loop {
            let length = guest.read(&mut buffer).await?;
            if length == 0 {
                return Ok(());
            }
            total += length as u64;
            let mut rest = &buffer[..length];
            while let Some(sink) = sink.as_mut().filter(|_| !rest.is_empty()) {
                let written = sink.write(rest).await?;
                progress.fetch_add(written as u64, Ordering::Relaxed);
                rest = &rest[written..];
            }
        }
    }
    .await;
    if let Err(error) = end {
        warn!(log, "stream broken"; "stream" => name, "bytes" => total, "error" => %error);
    }
    let finished = match sink {
        Some(sink) => sink.finish(progress).await,
        None => Ok(()),
    };
    debug!(log, "stream ended"; "stream" => name, "bytes" => total, "finished" => ?finished);
}

#[cfg(test)]
mod tests;
