//! Unix stream sockets as the host ends of vsock connections: non-blocking, vectored, into
//! and out of guest memory without a copy.

use std::io::{self, IoSlice};
use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};

use nix::sys::socket::{MsgFlags, recv, sendmsg};
use vm_memory::VolatileSlice;

use super::guest_io;

/// A connected, non-blocking stream.
#[derive(Debug)]
pub struct Stream(UnixStream);

impl Stream {
    pub fn new(stream: UnixStream) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        Ok(Self(stream))
    }

    /// A connected pair: ours, and the blocking end to give away.
    pub fn pair() -> io::Result<(Self, UnixStream)> {
        let (ours, theirs) = UnixStream::pair()?;
        Ok((Self::new(ours)?, theirs))
    }

    /// Receives into `slices`; 0 is the end of the stream.
    pub fn receive(&self, slices: &[VolatileSlice<'_>]) -> io::Result<usize> {
        self.receive_after(&mut [], slices)
    }

    /// Sends from `slices`; may send less than all.
    pub fn send_volatile(&self, slices: &[VolatileSlice<'_>]) -> io::Result<usize> {
        self.send_after(&[], slices)
    }

    /// Receives into `head` first, and then into `slices`; 0 is the end of the stream.
    pub fn receive_after(&self, head: &mut [u8], slices: &[VolatileSlice<'_>]) -> io::Result<usize> {
        guest_io::receive(self.0.as_fd(), head, slices)
    }

    /// Sends `head` first, and then from `slices`; may send less than all.
    pub fn send_after(&self, head: &[u8], slices: &[VolatileSlice<'_>]) -> io::Result<usize> {
        guest_io::send(self.0.as_fd(), head, slices)
    }

    /// Sends from buffers of our own; may send less than all.
    pub fn send(&self, buffers: &[IoSlice<'_>]) -> io::Result<usize> {
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
        loop {
            match sendmsg::<()>(self.0.as_raw_fd(), buffers, &[], flags, None) {
                Err(nix::errno::Errno::EINTR) => {}
                other => return other.map_err(io::Error::from),
            }
        }
    }

    /// Looks at received bytes without taking them.
    pub fn peek(&self, buffer: &mut [u8]) -> io::Result<usize> {
        Ok(recv(self.0.as_raw_fd(), buffer, MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_PEEK)?)
    }

    /// Takes received bytes.
    pub fn take(&self, buffer: &mut [u8]) -> io::Result<usize> {
        Ok(recv(self.0.as_raw_fd(), buffer, MsgFlags::MSG_DONTWAIT)?)
    }

    /// Shuts a direction; an already disconnected peer is as good.
    pub fn shutdown(&self, how: Shutdown) {
        let _ = self.0.shutdown(how);
    }
}

impl AsRawFd for Stream {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

/// A listening, non-blocking socket.
#[derive(Debug)]
pub struct Listener(UnixListener);

impl Listener {
    pub fn new(listener: UnixListener) -> io::Result<Self> {
        listener.set_nonblocking(true)?;
        Ok(Self(listener))
    }

    /// The next connection; `None` when none waits.
    pub fn accept(&self) -> io::Result<Option<Stream>> {
        loop {
            match self.0.accept() {
                Ok((stream, _)) => return Stream::new(stream).map(Some),
                Err(error) => match error.kind() {
                    io::ErrorKind::WouldBlock => return Ok(None),
                    // The peer gave up before it was served.
                    io::ErrorKind::ConnectionAborted | io::ErrorKind::Interrupted => {}
                    _ => return Err(error),
                },
            }
        }
    }
}

impl AsRawFd for Listener {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}
