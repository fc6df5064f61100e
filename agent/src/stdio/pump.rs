//! Moves bytes from one non-blocking descriptor to another, exactly and in order.
//!
//! Backpressure is the kernel's: a full destination stops the reading, and so the writer
//! at the far end of the source. Knows nothing of processes or vsock; tested with pipes and
//! socket pairs.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Two vsock packets of Linux' largest size; a smaller buffer means more wake-ups.
pub const BUFFER: usize = 128 * 1024;

/// A descriptor that tokio watches.
pub type Watched = AsyncFd<OwnedFd>;

/// Makes a descriptor non-blocking and lets tokio watch it.
pub fn watch(fd: OwnedFd) -> io::Result<Watched> {
    let flags = OFlag::from_bits_truncate(fcntl(&fd, FcntlArg::F_GETFL)?);
    fcntl(&fd, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
    crate::sys::watch(fd)
}

/// Bytes read and not yet written. Survives a broken destination.
#[derive(Debug, Default)]
pub struct Unsent {
    bytes: Vec<u8>,
    start: usize,
    end: usize,
}

impl Unsent {
    fn is_empty(&self) -> bool {
        self.start == self.end
    }

    /// Adds all that comes until the source's end, with no bound of its own: from a peer that is about to end its direction, that is what the
    /// sockets on the way hold.
    pub async fn fill(&mut self, from: &Watched) -> io::Result<()> {
        self.bytes.drain(..self.start);
        (self.start, self.end) = (0, self.end - self.start);
        loop {
            self.bytes.resize(self.end + BUFFER, 0);
            match read_some(from, &mut self.bytes[self.end..]).await? {
                0 => return Ok(()),
                count => self.end += count,
            }
        }
    }
}

/// Why a copy stopped.
#[derive(Debug)]
pub enum Stopped {
    /// The source ended and every byte of it went out.
    SourceEnded,
    /// The source failed; every byte read before went out.
    SourceFailed(io::Error),
    /// The destination takes no more.
    DestinationFailed(io::Error),
}

/// Copies until something stops it.
pub async fn copy(from: &Watched, to: &Watched, unsent: &mut Unsent) -> Stopped {
    loop {
        while !unsent.is_empty() {
            match write_some(to, &unsent.bytes[unsent.start..unsent.end]).await {
                Ok(count) => unsent.start += count,
                Err(error) => return Stopped::DestinationFailed(error),
            }
        }
        if unsent.bytes.is_empty() {
            unsent.bytes.resize(BUFFER, 0);
        }
        (unsent.start, unsent.end) = (0, 0);
        match read_some(from, &mut unsent.bytes).await {
            Ok(0) => return Stopped::SourceEnded,
            Ok(count) => unsent.end = count,
            // What a terminal's master reads when its last user has closed it.
            Err(error) if error.raw_os_error() == Some(Errno::EIO as i32) => return Stopped::SourceEnded,
            Err(error) => return Stopped::SourceFailed(error),
        }
    }
}

/// Waits until a connection has failed. The device's reset, by which a guest that has been restored loses its
/// connections, is an error and neither readable nor writable: who waits for those is not told.
pub async fn broken(connection: &Watched) -> io::Error {
    match connection.ready(Interest::ERROR).await {
        Ok(_) => io::ErrorKind::ConnectionReset.into(),
        Err(error) => error,
    }
}

/// Reads what is there, waiting for something. 0: end of file.
pub async fn read_some(from: &Watched, buffer: &mut [u8]) -> io::Result<usize> {
    loop {
        let mut guard = from.readable().await?;
        match guard.try_io(|fd| nix::unistd::read(fd.get_ref(), buffer).map_err(io::Error::from)) {
            Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
            Ok(result) => return result,
            Err(_would_block) => {}
        }
    }
}

/// Writes what fits, waiting for room.
pub async fn write_some(to: &Watched, bytes: &[u8]) -> io::Result<usize> {
    loop {
        let mut guard = to.writable().await?;
        match guard.try_io(|fd| nix::unistd::write(fd.get_ref(), bytes).map_err(io::Error::from)) {
            Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
            Ok(result) => return result,
            Err(_would_block) => {}
        }
    }
}

/// Ends the write direction of a connected socket; the peer reads end of file once it has
/// read everything.
pub fn finish(connection: &Watched) {
    // A connection that is gone needs no end.
    let _ = nix::sys::socket::shutdown(connection.as_raw_fd(), nix::sys::socket::Shutdown::Write);
}
