//! vsock sockets on tokio.
//!
//! Only the host (CID 2) is served: where a kernel has the loopback transport, a container's
//! process could otherwise reach the agent.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use futures::FutureExt;
use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, SockaddrLike, VsockAddr, accept4, bind, connect, getpeername,
    getsockopt, listen, socket, sockopt,
};
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::stdio::pump;

const FLAGS: SockFlag = SockFlag::SOCK_CLOEXEC.union(SockFlag::SOCK_NONBLOCK);
const BACKLOG: i32 = 128;
/// Before accept is tried again for want of resources.
const RETRY: Duration = Duration::from_millis(100);

/// Listens on a port of the guest.
pub struct VsockListener {
    socket: AsyncFd<OwnedFd>,
}

impl VsockListener {
    pub fn bind(port: u32) -> io::Result<Self> {
        let fd = socket(AddressFamily::Vsock, SockType::Stream, FLAGS, None)?;
        bind(fd.as_raw_fd(), &VsockAddr::new(libc::VMADDR_CID_ANY, port))?;
        listen(&fd, Backlog::new(BACKLOG)?)?;
        Ok(Self { socket: crate::sys::watch(fd)? })
    }

    /// The next connection of an admitted peer, non-blocking. One that fails is skipped, and a want
    /// of resources waited out: an error says that this socket will never accept again.
    pub async fn accept(&self) -> io::Result<OwnedFd> {
        loop {
            let mut guard = self.socket.readable().await?;
            let Ok(accepted) = guard.try_io(|socket| Ok(accept4(socket.as_raw_fd(), FLAGS)?)) else {
                // It was not ready after all.
                continue;
            };
            match accepted {
                Ok(fd) => {
                    let fd = own(fd);
                    if Self::admits(&fd) {
                        return Ok(fd);
                    }
                }
                Err(error) => match after(&error) {
                    After::Next => {}
                    After::Wait => {
                        crate::say!("vsock: accept: {error}; trying again");
                        tokio::time::sleep(RETRY).await;
                    }
                    After::End => return Err(error),
                },
            }
        }
    }

    fn admits(connection: &OwnedFd) -> bool {
        let peer: VsockAddr = match getpeername(connection.as_raw_fd()) {
            Ok(peer) => peer,
            Err(error) => {
                crate::say!("vsock: a connection was gone before it was served: {error}");
                return false;
            }
        };
        let admitted = peer.cid() == libc::VMADDR_CID_HOST;
        if !admitted {
            crate::say!("vsock: refused a connection from CID {}", peer.cid());
        }
        admitted
    }
}

/// What follows a failed accept.
#[derive(Debug, PartialEq, Eq)]
enum After {
    /// That connection is lost; there may be others.
    Next,
    /// The same would happen again at once: for want of descriptors or memory, mostly.
    Wait,
    /// The socket does not listen.
    End,
}

fn after(error: &io::Error) -> After {
    match Errno::from_raw(error.raw_os_error().unwrap_or(0)) {
        Errno::ECONNABORTED | Errno::ECONNRESET | Errno::EPROTO | Errno::EINTR => After::Next,
        Errno::EBADF | Errno::ENOTSOCK | Errno::EINVAL | Errno::EOPNOTSUPP => After::End,
        // EMFILE, ENFILE, ENOMEM, ENOBUFS, and what nobody has thought of.
        _ => After::Wait,
    }
}

#[allow(unsafe_code)] // nix's accept4 gives a raw descriptor.
fn own(fd: i32) -> OwnedFd {
    // SAFETY: accept4 has just returned it; nobody else has it.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

/// Connects to a port of the host.
pub async fn connect_to_host(port: u32) -> io::Result<OwnedFd> {
    let fd = socket(AddressFamily::Vsock, SockType::Stream, FLAGS, None)?;
    let address = VsockAddr::new(libc::VMADDR_CID_HOST, port);
    debug_assert_eq!(address.family(), Some(AddressFamily::Vsock));
    let fd = crate::sys::watch(fd)?;
    match connect(fd.as_raw_fd(), &address) {
        Ok(()) => {}
        Err(Errno::EINPROGRESS) => {
            let _ready = fd.writable().await?;
            match getsockopt(fd.get_ref(), sockopt::SocketError)? {
                0 => {}
                error => return Err(io::Error::from_raw_os_error(error)),
            }
        }
        Err(error) => return Err(error.into()),
    }
    Ok(fd.into_inner())
}

/// A connected, non-blocking stream socket as tokio's traits want it (for ttrpc).
pub struct VsockStream {
    socket: Arc<AsyncFd<OwnedFd>>,
    /// A reset by the device wakes no reader, see [`pump::broken`].
    broken: Pin<Box<dyn Future<Output = io::Error> + Send + Sync>>,
}

impl VsockStream {
    pub fn new(fd: OwnedFd) -> io::Result<Self> {
        let socket = Arc::new(crate::sys::watch(fd)?);
        let watched = Arc::clone(&socket);
        Ok(Self { socket, broken: Box::pin(async move { pump::broken(&watched).await }.fuse()) })
    }
}

impl AsyncRead for VsockStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let socket = Arc::clone(&self.socket);
        loop {
            let mut guard = match socket.poll_read_ready(cx) {
                Poll::Ready(guard) => guard?,
                Poll::Pending => return self.broken.as_mut().poll(cx).map(Err),
            };
            let free = buf.initialize_unfilled();
            match guard.try_io(|fd| nix::unistd::read(fd.get_ref(), free).map_err(io::Error::from)) {
                Ok(result) => return Poll::Ready(result.map(|count| buf.advance(count))),
                Err(_would_block) => {}
            }
        }
    }
}

impl AsyncWrite for VsockStream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        loop {
            let mut guard = ready!(self.socket.poll_write_ready(cx))?;
            match guard.try_io(|fd| nix::unistd::write(fd.get_ref(), buf).map_err(io::Error::from)) {
                Ok(result) => return Poll::Ready(result),
                Err(_would_block) => {}
            }
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(
            match nix::sys::socket::shutdown(self.socket.as_raw_fd(), nix::sys::socket::Shutdown::Write) {
                Ok(()) | Err(Errno::ENOTCONN) => Ok(()),
                Err(error) => Err(error.into()),
            },
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_socket_that_does_not_listen_ends_accepting() {
        let cases = [
            (libc::ECONNABORTED, After::Next),
            (libc::EINTR, After::Next),
            (libc::EMFILE, After::Wait),
            (libc::ENFILE, After::Wait),
            (libc::ENOMEM, After::Wait),
            (libc::ENOBUFS, After::Wait),
            (libc::ETIMEDOUT, After::Wait),
            (libc::EBADF, After::End),
            (libc::EINVAL, After::End),
        ];
        for (number, expected) in cases {
            let error = io::Error::from_raw_os_error(number);
            assert_eq!(after(&error), expected, "{error}");
        }
    }
}
