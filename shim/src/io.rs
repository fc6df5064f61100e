//! Standard streams: containerd's fifos on one side, vsock streams of the guest on the
//! other. The fifos are opened as runc's shim opens them: both ends are kept, so that a
//! client may detach and come back without the process seeing a closed pipe.
//!
//! Only the input is opened later, at Start: `ctr` calls CloseIO when its own input ends, but
//! not before Create has answered, and its input ends the moment that the fifo has taken it.
//!
//! Clients close their end of the output when they learn of the exit (`ctr` does, in all
//! versions), whatever is still in the fifo. So the exit is told when they have read all
//! ([`Streams::settle`]), unless they stopped reading or the guest does not stop writing.

use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout};
use slog::{Logger, debug, warn};
use spore_agent_api::stream::Kind;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::net::unix::pipe::{OpenOptions, Receiver, Sender};
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::watch;
use tokio::task::JoinHandle;

use crate::guest::{Guest, GuestError, GuestStdio};

/// One copy's buffer: the size of a pipe.
const CHUNK: usize = 64 * 1024;
/// How often a fifo is looked at that a client has still to empty: nothing tells when.
const EMPTYING: Duration = Duration::from_millis(1);
const EMPTYING_SLOWLY: Duration = Duration::from_millis(20);

#[derive(Debug, thiserror::Error)]
pub(crate) enum StdioError {
    #[error("{stream} {uri:?}: the scheme {scheme:?} is not supported by this version of Spore; use fifos")]
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
    /// Checks the schemes; only plain paths (or `fifo:`) are served.
    pub(crate) fn check(&self) -> Result<(), StdioError> {
        for (stream, uri) in [("stdin", &self.stdin), ("stdout", &self.stdout), ("stderr", &self.stderr)] {
            if let Some((scheme, _)) = uri.split_once("://")
                && scheme != "fifo"
            {
                return Err(StdioError::Scheme { stream, uri: uri.clone(), scheme: scheme.into() });
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

fn path_of(uri: &str) -> &Path {
    Path::new(uri.strip_prefix("fifo://").unwrap_or(uri))
}

/// The fifos of one process, looked at before the guest is asked for anything.
#[derive(Default)]
pub(crate) struct Fifos {
    stdin: Option<PathBuf>,
    stdout: Option<Sender>,
    stderr: Option<Sender>,
}

impl Fifos {
    pub(crate) fn open(stdio: &Stdio) -> Result<Self, StdioError> {
        let mut fifos = Self::default();
        let wanted = stdio.wanted();
        if wanted.stdin {
            let path = path_of(&stdio.stdin);
            let found = std::fs::metadata(path).and_then(|metadata| match metadata.file_type().is_fifo() {
                true => Ok(()),
                false => Err(io::Error::new(io::ErrorKind::InvalidInput, "not a fifo")),
            });
            let failed = |source| StdioError::Open { stream: "stdin", path: stdio.stdin.clone(), source };
            found.map_err(failed)?;
            fifos.stdin = Some(path.into());
        }
        for (want, stream, path, slot) in [
            (wanted.stdout, "stdout", &stdio.stdout, &mut fifos.stdout),
            (wanted.stderr, "stderr", &stdio.stderr, &mut fifos.stderr),
        ] {
            if want {
                let opened = OpenOptions::new().read_write(true).open_sender(path_of(path));
                let failed = |source| StdioError::Open { stream, path: path.clone(), source };
                *slot = Some(opened.map_err(failed)?);
            }
        }
        Ok(fifos)
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
    log: Logger,
}

impl Streams {
    fn new(log: &Logger) -> Self {
        Self {
            input: Mutex::new(Input::None),
            outputs: Mutex::default(),
            running: watch::Sender::new(0),
            progress: Arc::default(),
            log: log.clone(),
        }
    }

    /// Connects each fifo with its guest stream.
    pub(crate) async fn attach(
        guest: &Guest,
        id: &str,
        terminal: bool,
        fifos: Fifos,
        log: &Logger,
    ) -> Result<Self, GuestError> {
        let mut streams = Self::new(log);
        if terminal {
            if fifos.stdin.is_some() || fifos.stdout.is_some() {
                let (from_guest, to_guest) = guest.open_stdio(id, Kind::Stdin).await?.into_split();
                let rest = streams.set_input(fifos.stdin, to_guest);
                streams.start_output("terminal", fifos.stdout, from_guest, rest);
            }
            return Ok(streams);
        }
        if fifos.stdin.is_some() {
            let (from_guest, to_guest) = guest.open_stdio(id, Kind::Stdin).await?.into_split();
            streams.set_input(fifos.stdin, to_guest);
            // Nothing comes back on it.
            drop(from_guest);
        }
        for (name, kind, fifo) in
            [("stdout", Kind::Stdout, fifos.stdout), ("stderr", Kind::Stderr, fifos.stderr)]
        {
            if fifo.is_some() {
                let stream: UnixStream = guest.open_stdio(id, kind).await?;
                let (from_guest, to_guest) = stream.into_split();
                streams.start_output(name, fifo, from_guest, Some(to_guest));
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
        fifo: Option<Sender>,
        from_guest: OwnedReadHalf,
        keep: Option<OwnedWriteHalf>,
    ) {
        let running = self.running.clone();
        let (progress, log) = (Arc::clone(&self.progress), self.log.clone());
        running.send_modify(|count| *count += 1);
        let copy = tokio::spawn(async move {
            copy_output(name, from_guest, fifo, &progress, &log).await;
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

async fn copy_input(mut fifo: Receiver, mut guest: OwnedWriteHalf, log: Logger) {
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
    mut fifo: Option<Sender>,
    progress: &AtomicU64,
    log: &Logger,
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
            while let Some(fifo) = fifo.as_mut().filter(|_| !rest.is_empty()) {
                let written = fifo.write(rest).await?;
                progress.fetch_add(written as u64, Ordering::Relaxed);
                rest = &rest[written..];
            }
        }
    }
    .await;
    if let Err(error) = end {
        warn!(log, "stream broken"; "stream" => name, "bytes" => total, "error" => %error);
    }
    let emptied = match fifo {
        Some(fifo) => emptied(fifo, progress).await,
        None => Ok(()),
    };
    debug!(log, "stream ended"; "stream" => name, "bytes" => total, "emptied" => ?emptied);
}

/// Waits until a client has read what the fifo holds, or none has it open.
async fn emptied(fifo: Sender, progress: &AtomicU64) -> io::Result<()> {
    // We read nothing from it, but have it open for reading too; without that the kernel
    // tells whether anybody else has.
    let path = format!("/proc/self/fd/{}", fifo.as_raw_fd());
    let writer = std::fs::OpenOptions::new().write(true).custom_flags(libc::O_NONBLOCK).open(path)?;
    drop(fifo);
    let mut before = u64::MAX;
    let mut pause = EMPTYING;
    loop {
        let mut poll = [PollFd::new(writer.as_fd(), PollFlags::empty())];
        nix::poll::poll(&mut poll, PollTimeout::ZERO)?;
        let nobody = poll[0].revents().is_some_and(|events| events.contains(PollFlags::POLLERR));
        let left = crate::process::readable_bytes(&writer)?;
        if nobody || left == 0 {
            return Ok(());
        }
        if left < before {
            progress.fetch_add(1, Ordering::Relaxed);
            pause = EMPTYING;
        }
        before = left;
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(EMPTYING_SLOWLY);
    }
}

#[cfg(test)]
mod tests;
