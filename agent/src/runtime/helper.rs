//! The helper process: single-threaded, drives libcontainer, serves one container from
//! Create to Start, and exits when the server closes the socket.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::ExitCode;

use libcontainer::container::Container;
use libcontainer::container::builder::ContainerBuilder;
use libcontainer::error::LibcontainerError;
use libcontainer::syscall::syscall::SyscallType;
use nix::sched::{CloneFlags, setns};
use nix::sys::socket::{ControlMessageOwned, MsgFlags, UnixAddr, recvmsg};

use super::executor::Execute;
use super::protocol::{self, Cause, Create, MAX_ERROR, Reply, Request};
use super::trace::{self, Journal, Trace};
use super::{chain, exec};
use crate::{say, sys};

const CONSOLE_SOCKET: &str = "console.sock";

/// Entry of the helper; the socket is its stdin.
pub fn main() -> ExitCode {
    match serve() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            say!("runtime helper: {error}");
            ExitCode::FAILURE
        }
    }
}

fn serve() -> io::Result<()> {
    // The agent protects itself from the OOM killer; containers must not inherit that.
    fs::write("/proc/self/oom_score_adj", "0")?;
    nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(0o022));
    let (trace, mut journal) = trace::install()?;
    // Away from fd 0, which becomes the container's.
    let socket: OwnedFd = io::stdin().as_fd().try_clone_to_owned()?;
    let null = File::open("/dev/null")?;
    nix::unistd::dup2_stdin(&null)?;

    let mut container = None;
    while let Some((request, fds)) = protocol::receive::<Request>(&socket)? {
        match request {
            Request::Create(request) => match create(&request, fds, trace) {
                Ok((created, pid, terminal)) => {
                    container = Some(created);
                    let fds: Vec<_> = terminal.iter().map(AsRawFd::as_raw_fd).collect();
                    protocol::send(&socket, &Reply::Created { pid }, &fds)?;
                }
                Err(failure) => return protocol::send(&socket, &failure.reply(&mut journal), &[]),
            },
            Request::Exec(request) => {
                let reply = match exec::run(&request, fds, trace) {
                    Ok((pid, terminal)) => {
                        let fds: Vec<_> = terminal.iter().map(AsRawFd::as_raw_fd).collect();
                        return protocol::send(&socket, &Reply::Created { pid }, &fds);
                    }
                    Err(message) => Failure::Other(message).reply(&mut journal),
                };
                return protocol::send(&socket, &reply, &[]);
            }
            Request::Start => {
                let result = match &mut container {
                    Some(container) => container.start().map_err(Failure::from),
                    None => Err(Failure::Other("start before create".into())),
                };
                let reply = match result {
                    Ok(()) => Reply::Started,
                    Err(failure) => failure.reply(&mut journal),
                };
                return protocol::send(&socket, &reply, &[]);
            }
        }
    }
    Ok(())
}

enum Failure {
    Libcontainer(LibcontainerError),
    Other(String),
}

impl From<LibcontainerError> for Failure {
    fn from(error: LibcontainerError) -> Self {
        Self::Libcontainer(error)
    }
}

impl Failure {
    fn other(what: &str, error: impl std::fmt::Display) -> Self {
        Self::Other(format!("{what}: {error}"))
    }

    /// The answer, with what libcontainer has logged about the cause.
    fn reply(self, journal: &mut Journal) -> Reply {
        let findings = journal.read();
        if let Some(message) = findings.executable {
            return Reply::Failed { cause: Cause::Executable, message };
        }
        let (cause, text) = match self {
            Self::Libcontainer(error @ LibcontainerError::InvalidSpec(_)) => {
                (Cause::Spec, format!("config.json: {}", chain(&error)))
            }
            Self::Libcontainer(error) => (Cause::Runtime, chain(&error)),
            Self::Other(text) => (Cause::Runtime, text),
        };
        // The first lines come from where it failed, the later ones repeat it on the way up.
        let mut message = text;
        if !findings.errors.is_empty() {
            let causes = &findings.errors[..findings.errors.len().min(2)];
            message = format!("{message} ({})", causes.join("; "));
        }
        let end = message.floor_char_boundary(MAX_ERROR);
        message.truncate(end);
        Reply::Failed { cause, message }
    }
}

fn create(
    request: &Create,
    streams: Vec<OwnedFd>,
    trace: Trace,
) -> Result<(Container, i32, Option<OwnedFd>), Failure> {
    let console = request.terminal.then(|| console_socket(&request.bundle)).transpose();
    let console = console.map_err(|error| Failure::other("console socket", error))?;
    let mut builder = ContainerBuilder::new(request.id.clone(), SyscallType::default())
        .with_executor(Execute { trace })
        .with_root_path(&request.state)?
        .with_console_socket(console.as_ref().map(|_| request.bundle.join(CONSOLE_SOCKET)));
    if !request.terminal {
        let streams: [OwnedFd; 3] =
            streams.try_into().map_err(|_| Failure::Other("three streams must be attached".into()))?;
        let [stdin, stdout, stderr] = streams;
        builder = builder.with_stdin(stdin).with_stdout(stdout).with_stderr(stderr);
    }
    let mut container =
        builder.as_init(&request.bundle).with_systemd(false).with_detach(true).as_sibling(true).build()?;
    let pid = container.pid().ok_or_else(|| Failure::Other("libcontainer names no init process".into()))?;
    let rest = || -> Result<Option<OwnedFd>, Failure> {
        if request.loopback {
            loopback_up(pid.as_raw()).map_err(|error| Failure::other("bring lo up", error))?;
        }
        let terminal = console.as_ref().map(receive_terminal).transpose();
        terminal.map_err(|error| Failure::other("receive the terminal", error))
    };
    match rest() {
        Ok(terminal) => Ok((container, pid.as_raw(), terminal)),
        Err(failure) => {
            if let Err(error) = container.delete(true) {
                say!("container {}: clean up: {}", request.id, chain(&error));
            }
            Err(failure)
        }
    }
}

/// Binds by a relative name: a socket's path has at most 107 bytes, an id alone up to 128.
fn console_socket(bundle: &Path) -> io::Result<UnixListener> {
    std::env::set_current_dir(bundle)?;
    let listener = UnixListener::bind(CONSOLE_SOCKET);
    std::env::set_current_dir("/")?;
    listener
}

fn receive_terminal(listener: &UnixListener) -> io::Result<OwnedFd> {
    let (stream, _) = listener.accept()?;
    let mut name = [0; 64];
    let mut control = nix::cmsg_space!([i32; 1]);
    let mut buffers = [io::IoSliceMut::new(&mut name)];
    let flags = MsgFlags::MSG_CMSG_CLOEXEC;
    let message = recvmsg::<UnixAddr>(stream.as_raw_fd(), &mut buffers, Some(&mut control), flags)?;
    for part in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(fds) = part
            && let Some(fd) = fds.first()
        {
            return Ok(own(*fd));
        }
    }
    Err(io::Error::other("no descriptor came with the message"))
}

#[allow(unsafe_code)] // SCM_RIGHTS gives raw descriptors.
fn own(fd: i32) -> OwnedFd {
    use std::os::fd::FromRawFd;
    // SAFETY: the kernel has just installed it for this process; nobody else has it.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

/// runc brings up the loopback interface of a network namespace that it makes; libcontainer
/// does not. This process may stay there: it has nothing else to do on any network.
fn loopback_up(pid: i32) -> io::Result<()> {
    let namespace = File::open(format!("/proc/{pid}/ns/net"))?;
    setns(&namespace, CloneFlags::CLONE_NEWNET)?;
    sys::loopback_up()
}
