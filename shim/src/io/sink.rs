//! Where a process's output goes: a client's fifo, a file, or a logging program.

use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout};
use tokio::io::AsyncWriteExt;
use tokio::net::unix::pipe::{OpenOptions, Sender};

/// How often a fifo is looked at that a client has still to empty: nothing tells when.
const EMPTYING: Duration = Duration::from_millis(1);
const EMPTYING_SLOWLY: Duration = Duration::from_millis(20);

/// See the module.
pub(crate) enum Sink {
    /// Open for reading too, so that a client may go and come back.
    Fifo(Sender),
    File(tokio::fs::File),
    /// Standard input of a logging program, so to speak.
    Logger(Sender),
}

impl Sink {
    pub(super) fn fifo(path: &Path) -> io::Result<Self> {
        OpenOptions::new().read_write(true).open_sender(path).map(Self::Fifo)
    }

    /// A file that is made, with its directory, or continued.
    pub(super) fn file(path: &Path) -> io::Result<Self> {
        if let Some(directory) = path.parent() {
            std::fs::create_dir_all(directory)?;
        }
        let file = std::fs::OpenOptions::new().append(true).create(true).mode(0o644).open(path)?;
        Ok(Self::File(file.into()))
    }

    pub(super) async fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::Fifo(pipe) | Self::Logger(pipe) => pipe.write(bytes).await,
            Self::File(file) => file.write(bytes).await,
        }
    }

    /// Everything is written: waits until a client has read what a fifo holds, or none has it
    /// open; what is in a file or with a logger is safe.
    pub(super) async fn finish(self, progress: &AtomicU64) -> io::Result<()> {
        match self {
            Self::Fifo(fifo) => emptied(fifo, progress).await,
            Self::File(mut file) => file.flush().await,
            Self::Logger(_) => Ok(()),
        }
    }
}

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
