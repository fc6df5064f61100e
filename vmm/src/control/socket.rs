#![allow(unsafe_code)] // recvmsg and sendmsg with ancillary data
//! A `SOCK_SEQPACKET` Unix socket that carries descriptors (unix(7), cmsg(3)).
//!
//! Every descriptor that the kernel hands over becomes an [`OwnedFd`] before anything else is
//! looked at, so none leaks however bad the packet is. Nothing here blocks.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use nix::sys::socket::{SockType, getsockopt, sockopt};

use crate::api::{MAX_FDS, MAX_MESSAGE};

/// The socket is unusable; the VMM ends.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    #[error("control socket: descriptor {fd} is a standard stream; pass the socket as 3 or higher")]
    StandardStream { fd: RawFd },
    #[error("control socket: descriptor {fd} is not open: {source}")]
    NotOpen { fd: RawFd, source: io::Error },
    #[error("control socket: descriptor {fd} is not a socket: {source}")]
    NotASocket { fd: RawFd, source: io::Error },
    #[error("control socket: descriptor {fd} is a {found:?} socket; a SOCK_SEQPACKET one is needed")]
    WrongType { fd: RawFd, found: SockType },
    #[error("control socket: receiving: {0}")]
    Receive(#[source] io::Error),
    #[error("control socket: sending: {0}")]
    Send(#[source] io::Error),
    #[error("control socket: the peer has left {waiting} messages unread")]
    PeerStalled { waiting: usize },
}

/// What one read gives.
#[derive(Debug)]
pub enum Packet {
    Data {
        bytes: Vec<u8>,
        fds: Vec<OwnedFd>,
    },
    /// Longer than [`MAX_MESSAGE`]; gone, descriptors closed.
    TooLong,
    /// More than [`MAX_FDS`] descriptors, or more than this process may open; gone, descriptors
    /// closed.
    TooManyFds,
    Nothing,
    HungUp,
}

/// One end.
#[derive(Debug)]
pub struct Socket(OwnedFd);

/// Room for the control messages of a packet, aligned as `cmsghdr` wants.
#[repr(C, align(8))]
struct Ancillary([u8; ANCILLARY]);

#[allow(clippy::cast_possible_truncation)] // 64 descriptors of 4 bytes
// SAFETY: CMSG_SPACE computes with its argument and touches no memory.
const ANCILLARY: usize = unsafe { libc::CMSG_SPACE((MAX_FDS * size_of::<RawFd>()) as u32) } as usize;

impl Socket {
    /// Takes over an inherited descriptor by number.
    pub fn inherit(fd: RawFd) -> Result<Self, SocketError> {
        if (0..3).contains(&fd) {
            return Err(SocketError::StandardStream { fd });
        }
        // SAFETY: F_GETFD only asks whether the number is open.
        if unsafe { libc::fcntl(fd, libc::F_GETFD) } < 0 {
            return Err(SocketError::NotOpen { fd, source: io::Error::last_os_error() });
        }
        // SAFETY: the descriptor is open, and by the contract of `--control-fd` it is ours: no
        // other part of the process knows its number.
        Self::new(unsafe { OwnedFd::from_raw_fd(fd) })
    }

    pub fn new(fd: OwnedFd) -> Result<Self, SocketError> {
        let raw = fd.as_raw_fd();
        let found = getsockopt(&fd, sockopt::SockType)
            .map_err(|error| SocketError::NotASocket { fd: raw, source: error.into() })?;
        if found != SockType::SeqPacket {
            return Err(SocketError::WrongType { fd: raw, found });
        }
        // SAFETY: sets a flag of a descriptor that we own.
        if unsafe { libc::fcntl(raw, libc::F_SETFD, libc::FD_CLOEXEC) } < 0 {
            return Err(SocketError::NotOpen { fd: raw, source: io::Error::last_os_error() });
        }
        Ok(Self(fd))
    }

    /// Reads one packet, if there is one.
    pub fn receive(&self) -> Result<Packet, SocketError> {
        let mut bytes = vec![0u8; MAX_MESSAGE];
        let mut ancillary = Ancillary([0; ANCILLARY]);
        let mut part = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() };
        // SAFETY: all-zero is a valid msghdr.
        let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
        header.msg_iov = &raw mut part;
        header.msg_iovlen = 1;
        header.msg_control = ancillary.0.as_mut_ptr().cast();
        header.msg_controllen = ANCILLARY;
        let flags = libc::MSG_DONTWAIT | libc::MSG_CMSG_CLOEXEC;
        // SAFETY: the header names buffers of ours that outlive the call, with their lengths.
        let count = unsafe { libc::recvmsg(self.0.as_raw_fd(), &raw mut header, flags) };
        let Ok(count) = usize::try_from(count) else {
            let error = io::Error::last_os_error();
            return match error.kind() {
                io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted => Ok(Packet::Nothing),
                io::ErrorKind::ConnectionReset => Ok(Packet::HungUp),
                _ => Err(SocketError::Receive(error)),
            };
        };
        // SAFETY: recvmsg filled the header in and succeeded.
        let fds = unsafe { take_fds(&header) };
        // Set too when a descriptor could not be made here, for the limit of open files.
        if header.msg_flags & libc::MSG_CTRUNC != 0 {
            return Ok(Packet::TooManyFds);
        }
        if header.msg_flags & libc::MSG_TRUNC != 0 {
            return Ok(Packet::TooLong);
        }
        // An empty packet and the end of the stream look alike; a peer sends no empty packets.
        if count == 0 {
            return Ok(Packet::HungUp);
        }
        bytes.truncate(count);
        Ok(Packet::Data { bytes, fds })
    }

    /// Sends one packet; false when the peer takes nothing now.
    pub fn send(&self, bytes: &[u8], fd: Option<&OwnedFd>) -> Result<bool, SocketError> {
        let fds: Vec<BorrowedFd<'_>> = fd.iter().map(|fd| fd.as_fd()).collect();
        send_with(self.0.as_fd(), bytes, &fds)
    }
}

/// Sends `bytes` with `fds` attached; false when the peer takes nothing now. Also the client's
/// side of the protocol.
pub fn send_with(socket: BorrowedFd<'_>, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> Result<bool, SocketError> {
    use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
    let raw: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
    let rights = [ControlMessage::ScmRights(&raw)];
    let ancillary = if raw.is_empty() { &[] } else { &rights[..] };
    let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
    match sendmsg::<()>(socket.as_raw_fd(), &[io::IoSlice::new(bytes)], ancillary, flags, None) {
        Ok(_) => Ok(true),
        Err(nix::Error::EAGAIN | nix::Error::EINTR) => Ok(false),
        Err(error) => Err(SocketError::Send(error.into())),
    }
}

/// Takes ownership of the descriptors that a successful recvmsg delivered.
///
/// # Safety
/// `header` was filled in by recvmsg, its buffers are alive, and this is the only call for it.
unsafe fn take_fds(header: &libc::msghdr) -> Vec<OwnedFd> {
    let mut fds = Vec::new();
    // SAFETY: by the function's contract the header describes valid control messages; the CMSG
    // macros stay within its msg_controllen, and the kernel gave each descriptor to us alone.
    unsafe {
        let mut message = libc::CMSG_FIRSTHDR(header);
        while let Some(current) = message.as_ref() {
            if current.cmsg_level == libc::SOL_SOCKET && current.cmsg_type == libc::SCM_RIGHTS {
                let length = current.cmsg_len - libc::CMSG_LEN(0) as usize;
                let data = libc::CMSG_DATA(message).cast::<RawFd>();
                for index in 0..length / size_of::<RawFd>() {
                    fds.push(OwnedFd::from_raw_fd(data.add(index).read_unaligned()));
                }
            }
            message = libc::CMSG_NXTHDR(header, message);
        }
    }
    fds
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl AsRawFd for Socket {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}
