//! Makes the two ends of a process's standard streams.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use spore_agent_api::stream::Kind;

use super::pump::{self, Unsent};
use super::streams::{End, ProcessStreams};

/// A pipe of this size needs a quarter of the wake-ups of the default one.
const PIPE_SIZE: i32 = 256 * 1024;

/// Which streams are connected; the rest is /dev/null.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Wanted {
    pub stdin: bool,
    pub stdout: bool,
    pub stderr: bool,
}

/// Pipes for a process that runs as `uid`: the agent's ends and the process's three.
pub fn pipes(wanted: Wanted, uid: u32) -> io::Result<(ProcessStreams, Vec<OwnedFd>)> {
    let mut streams = ProcessStreams::default();
    let mut theirs = Vec::with_capacity(3);
    for (kind, wanted) in
        [(Kind::Stdin, wanted.stdin), (Kind::Stdout, wanted.stdout), (Kind::Stderr, wanted.stderr)]
    {
        if !wanted {
            theirs.push(File::options().read(true).write(true).open("/dev/null")?.into());
            continue;
        }
        let (read, write) = nix::unistd::pipe2(OFlag::O_CLOEXEC)?;
        // Refused beyond the user's limit: the default size works as well.
        let _ = fcntl(&write, FcntlArg::F_SETPIPE_SZ(PIPE_SIZE));
        let (process_end, end) = match kind {
            Kind::Stdin => (read, End::Input(pump::watch(write)?, Unsent::default())),
            Kind::Stdout | Kind::Stderr | Kind::Changes => {
                (write, End::Output(pump::watch(read)?, Unsent::default()))
            }
        };
        own_by(&process_end, uid)?;
        theirs.push(process_end);
        streams.add(kind, end);
    }
    Ok((streams, theirs))
}

/// A terminal, by its master, for a process that runs as `uid`.
pub fn terminal(master: OwnedFd, uid: u32, size: Option<(u16, u16)>) -> io::Result<ProcessStreams> {
    own_by(&crate::sys::terminal_peer(master.as_fd())?, uid)?;
    if let Some((rows, columns)) = size {
        crate::sys::set_window_size(master.as_fd(), rows, columns)?;
    }
    let mut streams = ProcessStreams::default();
    streams.add(Kind::Stdin, End::Terminal(pump::watch(master)?, Unsent::default(), Unsent::default()));
    Ok(streams)
}

/// Lets the process open its streams again by /dev/stdin and the like, whoever it is.
fn own_by(fd: &OwnedFd, uid: u32) -> io::Result<()> {
    std::os::unix::fs::fchown(fd, Some(uid), None)
}
