//! The process whose pid is the task's (DESIGN 1). It sits in the sandbox's network
//! namespace, where CNI, Docker and nerdctl look for it, does nothing, and ends with the
//! task or with the shim: by PDEATHSIG and by the pipe on its standard input. Whoever kills it
//! kills the task, as with runc's init.
//!
//! Boundary: spawned by [`Holder::spawn`] from the daemon's main thread (PDEATHSIG fires
//! when the *thread* that spawned ends); [`main`] runs before any runtime exists.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::os::fd::OwnedFd;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::Arc;

use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::prctl;
use nix::sys::signal::Signal;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use crate::bundle::NetworkNamespace;
use crate::network;
use crate::process::{self, ProcessId};

pub(crate) const SUBCOMMAND: &str = "holder";
/// The one word that a ready holder says.
const READY: &str = "ready";

#[derive(Debug, thiserror::Error)]
pub(crate) enum HolderError {
    #[error("holder process: cannot be started: {0}")]
    Spawn(std::io::Error),
    #[error("holder process: {0}")]
    Failed(String),
}

/// A running holder; killed and reaped when dropped.
#[derive(Debug)]
pub(crate) struct Holder {
    child: Child,
    pidfd: Arc<AsyncFd<OwnedFd>>,
    id: ProcessId,
    /// Its end of file ends the holder should PDEATHSIG have been missed.
    _alive: Option<ChildStdin>,
}

impl Holder {
    /// Starts a holder and waits until it is in its namespace (no input or output but a
    /// few system calls: about a millisecond).
    pub(crate) fn spawn(network: &NetworkNamespace) -> Result<Self, HolderError> {
        let mut command = Command::new("/proc/self/exe");
        command.arg(SUBCOMMAND);
        if let NetworkNamespace::Path(path) = network {
            command.arg(path);
        }
        command.env_clear().current_dir("/");
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
        let mut child = command.spawn().map_err(HolderError::Spawn)?;
        let alive = child.stdin.take();
        let ready = child.stdout.take().map(BufReader::new).map(|mut reader| {
            let mut line = String::new();
            reader.read_line(&mut line).map(|_| line.trim_end().to_string())
        });
        let outcome = match ready {
            Some(Ok(line)) if line == READY => process::pidfd_open(child.id())
                .and_then(|pidfd| {
                    Ok((process::watch(pidfd, Interest::READABLE)?, ProcessId::of(child.id())?))
                })
                .map_err(HolderError::Spawn),
            Some(Ok(line)) if !line.is_empty() => Err(HolderError::Failed(line)),
            _ => Err(HolderError::Failed("ended before it was ready".into())),
        };
        match outcome {
            Ok((pidfd, id)) => Ok(Self { child, pidfd: Arc::new(pidfd), id, _alive: alive }),
            Err(error) => {
                let _ = child.kill();
                let _ = child.wait();
                Err(error)
            }
        }
    }

    pub(crate) fn id(&self) -> ProcessId {
        self.id
    }

    /// Becomes readable when the process ends, whoever ended it. It stays a zombie until it is
    /// dropped: while the task exists nobody else gets its pid.
    pub(crate) fn pidfd(&self) -> Arc<AsyncFd<OwnedFd>> {
        Arc::clone(&self.pidfd)
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        // The child is ours and not reaped yet, so the pidfd cannot name another process.
        let _ = process::pidfd_kill(self.pidfd.get_ref(), libc::SIGKILL);
        let _ = self.child.wait();
    }
}

/// The holder itself: `holder [NETWORK NAMESPACE PATH]`.
pub(crate) fn main(arguments: &[String]) -> Result<(), String> {
    match enter(arguments.first().map(String::as_str)) {
        Ok(()) => println!("{READY}"),
        Err(message) => {
            println!("{message}");
            return Err(message);
        }
    }
    // Nothing is ever written; the read returns when the shim is gone.
    let mut byte = [0];
    let _ = std::io::stdin().read(&mut byte);
    Ok(())
}

fn enter(path: Option<&str>) -> Result<(), String> {
    prctl::set_pdeathsig(Signal::SIGKILL).map_err(|error| format!("PDEATHSIG: {error}"))?;
    let _ = prctl::set_name(c"spore-holder");
    match path {
        None => {
            unshare(CloneFlags::CLONE_NEWNET).map_err(|error| format!("new network namespace: {error}"))?;
            // As runc has it before the hooks run.
            network::loopback_up().map_err(|error| error.to_string())
        }
        Some(path) => {
            let file = File::open(path).map_err(|error| {
                format!(
                    "network namespace {path}: open: {error}; create it before the container, or name none"
                )
            })?;
            setns(file, CloneFlags::CLONE_NEWNET).map_err(|error| {
                format!("network namespace {path}: join: {error}; is it a network namespace?")
            })
        }
    }
}
