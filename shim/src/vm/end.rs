//! How a VMM comes to its end, and what it and its logs say about that.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::{Child, ExitStatus};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use slog::{Logger, info, warn};
use spore_agent_api::{NAMES_PORT, READY_PORT};
use spore_vmm::api::{EndReason, Event};
use tokio::io::AsyncReadExt;
use tokio::io::unix::AsyncFd;
use tokio::net::UnixStream;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;

use super::END_DEADLINE;
use super::control::Heard;
use super::snapshot::Settling;
use crate::process;

pub(super) const UNEXPLAINED: &str = "the virtual machine monitor ended without a reason";
/// How long the last message of a VMM that has ended may take to be read.
const LAST_WORDS: Duration = Duration::from_secs(1);
/// Lines and bytes of a log that an error shows.
pub(super) const TAIL_LINES: usize = 12;
const TAIL_BYTES: u64 = 4096;

/// How a VMM came to its end.
#[derive(Debug, Clone)]
pub(crate) struct End {
    pub(crate) cause: String,
}

/// A VMM's process.
pub(super) enum Process {
    Child(Child),
    /// Off a zygote, which reaps it and alone learns its status: its id.
    Forked(u32),
}

impl Process {
    fn id(&self) -> u32 {
        match self {
            Self::Child(child) => child.id(),
            Self::Forked(pid) => *pid,
        }
    }
}

/// What the VMM said of its end, and what it said that made no sense.
#[derive(Debug, Default)]
pub(super) struct Told {
    pub(super) reason: Option<EndReason>,
    pub(super) broken: Option<io::Error>,
}

type Shared = Arc<Mutex<Told>>;

fn lock(told: &Mutex<Told>) -> std::sync::MutexGuard<'_, Told> {
    told.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Follows a VMM to its end: whether its guest is ready, and how it ended.
pub(super) fn watch_over(
    process: Process,
    pidfd: Arc<AsyncFd<OwnedFd>>,
    (events, questions, settling): (mpsc::UnboundedReceiver<Heard>, mpsc::Sender<OwnedFd>, Settling),
    log: Logger,
) -> (watch::Receiver<bool>, watch::Receiver<Option<End>>) {
    let (ready_sender, ready) = watch::channel(false);
    let (end_sender, end) = watch::channel(None);
    let told = Shared::default();
    let heard = tokio::spawn(follow(events, ready_sender, questions, settling, Arc::clone(&told)));
    tokio::spawn(monitor(process, pidfd, heard, told, end_sender, log));
    (ready, end)
}

/// Takes the VMM's events as they come, until nothing can follow.
async fn follow(
    mut events: mpsc::UnboundedReceiver<Heard>,
    ready: watch::Sender<bool>,
    questions: mpsc::Sender<OwnedFd>,
    settling: Settling,
    told: Shared,
) {
    let ready = Arc::new(ready);
    while let Some(heard) = events.recv().await {
        match heard {
            Ok((Event::GuestConnection { port: READY_PORT }, fds)) => {
                tokio::spawn(attend(fds, Arc::clone(&ready)));
            }
            // Those for which there is no room are hung up.
            Ok((Event::GuestConnection { port: NAMES_PORT }, fds)) => {
                fds.into_iter().for_each(|stream| drop(questions.try_send(stream)));
            }
            Ok((Event::DisksSettled { layer_id, result }, _)) => settling.settled(&layer_id, result),
            Ok((Event::DiskMerged { serial, result }, _)) => settling.settled(&serial, result),
            Ok((Event::GuestConnection { .. }, _)) => {}
            Ok((Event::Ended(why), _)) => lock(&told).reason = Some(why),
            Err(error) => lock(&told).broken = Some(error),
        }
    }
    settling.end();
}

/// Waits for the agent's byte, and keeps the connection to its end: a guest that is restored from this
/// one's state knows by the reset of its own end that it is another.
async fn attend(fds: Vec<OwnedFd>, ready: Arc<watch::Sender<bool>>) {
    let Some(Ok(mut stream)) = fds.into_iter().next().map(stream) else { return };
    if stream.read_u8().await.is_ok() {
        let _ = ready.send(true);
        // More than that it has not to say.
        let _ = stream.read_u8().await;
    }
}

fn stream(fd: OwnedFd) -> io::Result<UnixStream> {
    let stream = std::os::unix::net::UnixStream::from(fd);
    stream.set_nonblocking(true)?;
    UnixStream::from_std(stream)
}

/// Waits for the end of the process, reaps it if it is a child, and tells why.
async fn monitor(
    mut process: Process,
    pidfd: Arc<AsyncFd<OwnedFd>>,
    mut heard: JoinHandle<()>,
    told: Shared,
    end: watch::Sender<Option<End>>,
    log: Logger,
) {
    tokio::select! {
        biased;
        _ = pidfd.readable() => {
            // The last event may still be in the socket; its end of file is at hand.
            let _ = tokio::time::timeout(LAST_WORDS, heard).await;
        }
        _ = &mut heard => end_mute(&pidfd, &told, &log).await,
    }
    let status = match &mut process {
        Process::Child(child) => child.wait().ok(),
        Process::Forked(_) => None,
    };
    let cause = describe(&lock(&told), status);
    info!(log, "the VMM has ended"; "vmm" => process.id(), "cause" => &cause);
    let _ = end.send(Some(End { cause }));
}

/// A VMM that nobody listens to any more is of no use: it ends soon by itself or it is killed.
async fn end_mute(pidfd: &AsyncFd<OwnedFd>, told: &Shared, log: &Logger) {
    let broken = lock(told).broken.as_ref().map(ToString::to_string);
    let patience = if broken.is_some() { Duration::ZERO } else { END_DEADLINE };
    if tokio::time::timeout(patience, pidfd.readable()).await.is_err() {
        warn!(log, "the VMM is killed: nothing can be heard from it"; "error" => broken);
        let _ = process::pidfd_kill(pidfd.get_ref(), libc::SIGKILL);
        let _ = pidfd.readable().await;
    }
}

pub(super) fn describe(told: &Told, status: Option<ExitStatus>) -> String {
    match &told.reason {
        Some(EndReason::Shutdown) => "the guest powered itself off".into(),
        Some(EndReason::Reset) => "the guest asked for a reset (a kernel panic does that)".into(),
        Some(EndReason::TripleFault { vcpu, registers }) => format!("vCPU {vcpu}: triple fault; {registers}"),
        Some(EndReason::InternalError { vcpu, detail, registers }) => {
            let vcpu = vcpu.map(|vcpu| format!("vCPU {vcpu}: ")).unwrap_or_default();
            let registers = registers.as_ref().map(|registers| format!("; {registers}")).unwrap_or_default();
            format!("{vcpu}{detail}{registers}")
        }
        Some(EndReason::Forced) => "the guest ignored the power button".into(),
        None => match (&told.broken, status) {
            (Some(error), _) => {
                format!("the virtual machine monitor said what cannot be understood: {error}")
            }
            (None, Some(status)) => format!("{UNEXPLAINED} ({status})"),
            (None, None) => UNEXPLAINED.into(),
        },
    }
}

/// The last lines of a file, or the first ones of a kernel's panic, joined for an error
/// message; control characters left out.
pub(super) fn tail(path: &Path) -> io::Result<String> {
    let mut file = File::open(path)?;
    let length = file.metadata()?.len();
    file.seek(SeekFrom::Start(length.saturating_sub(TAIL_BYTES)))?;
    let mut bytes = Vec::new();
    file.take(TAIL_BYTES).read_to_end(&mut bytes)?;
    let text = String::from_utf8_lossy(&bytes);
    let lines: Vec<String> = text
        .lines()
        .map(|line| line.chars().filter(|c| !c.is_control()).collect::<String>().trim().to_string())
        .filter(|line| !line.is_empty())
        .collect();
    // Of a panic the reason, not the end of the call trace.
    let panic = lines.iter().rposition(|line| line.contains("Kernel panic - not syncing"));
    let from = panic.unwrap_or(lines.len().saturating_sub(TAIL_LINES));
    Ok(lines[from..].iter().take(TAIL_LINES).map(String::as_str).collect::<Vec<_>>().join(" | "))
}
