//! The server's side of the helper.

use std::fs::File;
use std::io::{self, Seek, Write};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use tokio::io::unix::AsyncFd;

use super::HELPER_COMMAND;
use super::protocol::{self, Cause, Create, Exec, Reply, Request};
use crate::error::{AgentError, Result};
use crate::reaper::{Child, Expectation, Reaper};
use crate::stdio::pump;

/// libcontainer answers within this time, or hangs. Generous: the machine may be emulated.
const DEADLINE: Duration = Duration::from_secs(60);

/// The process's ends of its standard streams: three descriptors, or none for a terminal.
pub type Streams = Vec<OwnedFd>;

/// A created container, not yet started; or a process in one, which runs.
#[derive(Debug)]
pub struct Created {
    /// The container's init, or the process.
    pub init: Child,
    /// Master of its terminal.
    pub terminal: Option<OwnedFd>,
    pub helper: Helper,
}

/// A helper process that has created a container and waits to start it. Dropping it lets
/// it exit.
#[derive(Debug)]
pub struct Helper {
    process: Child,
    reaper: Arc<Reaper>,
    socket: AsyncFd<OwnedFd>,
}

/// Creates a container.
pub async fn create(reaper: &Arc<Reaper>, request: Create, streams: Streams) -> Result<Created> {
    call(reaper, &Request::Create(request), streams).await
}

/// Runs a process in a container; `process` is its OCI process object.
pub async fn exec(
    reaper: &Arc<Reaper>,
    request: Exec,
    process: &[u8],
    mut streams: Streams,
) -> Result<Created> {
    let file = in_memory(process).map_err(|error| AgentError::internal("process", error))?;
    streams.insert(0, file);
    call(reaper, &Request::Exec(request), streams).await
}

/// A file that exists nowhere but in memory, to be read from its start.
fn in_memory(content: &[u8]) -> io::Result<OwnedFd> {
    let mut file = File::from(memfd_create(c"process", MFdFlags::MFD_CLOEXEC)?);
    file.write_all(content)?;
    file.rewind()?;
    Ok(file.into())
}

async fn call(reaper: &Arc<Reaper>, request: &Request, fds: Vec<OwnedFd>) -> Result<Created> {
    // Before the helper exists: its child may die before its pid is known here.
    let expectation = reaper.expect();
    let helper = Helper::spawn(reaper, &expectation)
        .map_err(|error| AgentError::internal("start the runtime helper", error))?;
    let raw: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
    let (reply, mut received) = helper.call(request, &raw).await?;
    drop(fds);
    match reply {
        Reply::Created { pid } => {
            Ok(Created { init: expectation.claim(pid), terminal: received.pop(), helper })
        }
        other => Err(unexpected(other)),
    }
}

impl Helper {
    fn spawn(reaper: &Arc<Reaper>, expectation: &Expectation) -> io::Result<Self> {
        let (ours, theirs) =
            socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)?;
        let child = Command::new("/proc/self/exe")
            .arg(HELPER_COMMAND)
            .env_clear()
            .current_dir("/")
            .stdin(Stdio::from(theirs))
            .stdout(Stdio::from(File::options().write(true).open("/dev/null")?))
            .spawn()?;
        let pid = child.id().cast_signed();
        let process = expectation.claim(pid);
        Ok(Self { process, reaper: Arc::clone(reaper), socket: pump::watch(ours)? })
    }

    /// Lets the container's process run.
    pub async fn start(self) -> Result<()> {
        match self.call(&Request::Start, &[]).await? {
            (Reply::Started, _) => Ok(()),
            (other, _) => Err(unexpected(other)),
        }
    }

    async fn call(&self, request: &Request, fds: &[RawFd]) -> Result<(Reply, Vec<OwnedFd>)> {
        protocol::send(&self.socket, request, fds)
            .map_err(|error| AgentError::internal("runtime helper: send", error))?;
        let answer = async {
            loop {
                let mut guard = self.socket.readable().await?;
                match guard.try_io(protocol::receive::<Reply>) {
                    Ok(result) => return result,
                    Err(_would_block) => {}
                }
            }
        };
        match tokio::time::timeout(DEADLINE, answer).await {
            Ok(Ok(Some(answer))) => Ok(answer),
            Ok(Ok(None)) => {
                let status = self.process.wait().await.status;
                Err(AgentError::Internal(format!(
                    "runtime helper: ended with status {status} instead of an answer; see the console"
                )))
            }
            Ok(Err(error)) => Err(AgentError::internal("runtime helper: receive", error)),
            Err(_elapsed) => {
                let _ = self.reaper.signal(&self.process, libc::SIGKILL);
                Err(AgentError::Internal(format!("runtime helper: no answer within {DEADLINE:?}; killed")))
            }
        }
    }
}

fn unexpected(reply: Reply) -> AgentError {
    match reply {
        Reply::Failed { cause: Cause::Executable | Cause::Spec, message } => {
            AgentError::InvalidArgument(message)
        }
        Reply::Failed { cause: Cause::Runtime, message } => AgentError::Internal(message),
        other => AgentError::Internal(format!("runtime helper: unexpected answer {other:?}")),
    }
}
