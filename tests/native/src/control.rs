#![allow(unsafe_code)] // Descriptors that arrive by SCM_RIGHTS are raw numbers until owned.
//! The peer's end of the control socket (`spore_vmm::api`), also for packets that no
//! honest peer would send.

use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, recvmsg, sendmsg,
    socketpair,
};
use spore_vmm::api::{MAX_FDS, MAX_MESSAGE, Message, Request};

/// One end of a control socket.
pub struct Control(OwnedFd);

/// What a wait for a packet came to.
#[derive(Debug)]
#[allow(clippy::large_enum_variant)] // one at a time, on the stack of a test
pub enum Received {
    Packet(Message, Vec<OwnedFd>),
    /// The VMM closed the socket.
    Closed,
    /// Nothing came before the deadline.
    Nothing,
}

impl Control {
    /// A pair: our end, and the one that the VMM inherits.
    pub fn pair() -> io::Result<(Self, OwnedFd)> {
        let (ours, theirs) =
            socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)?;
        Ok((Self(ours), theirs))
    }

    pub fn send(&self, request: &Request, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        self.send_bytes(&serde_json::to_vec(request)?, fds)
    }

    /// Sends one packet as it is.
    pub fn send_bytes(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        let raw: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
        let rights = [ControlMessage::ScmRights(&raw)];
        let ancillary = if raw.is_empty() { &[][..] } else { &rights[..] };
        let flags = MsgFlags::MSG_NOSIGNAL;
        sendmsg::<()>(self.0.as_raw_fd(), &[IoSlice::new(bytes)], ancillary, flags, None)?;
        Ok(())
    }

    /// Waits for the next packet.
    pub fn receive(&self, deadline: Duration) -> io::Result<Received> {
        if !wait_readable(self.0.as_fd(), deadline)? {
            return Ok(Received::Nothing);
        }
        let mut bytes = vec![0; MAX_MESSAGE];
        let mut space = nix::cmsg_space!([RawFd; MAX_FDS]);
        let mut fds = Vec::new();
        let length = {
            let mut slices = [IoSliceMut::new(&mut bytes)];
            let flags = MsgFlags::MSG_CMSG_CLOEXEC;
            let message = recvmsg::<()>(self.0.as_raw_fd(), &mut slices, Some(&mut space), flags)?;
            for part in message.cmsgs()? {
                if let ControlMessageOwned::ScmRights(raw) = part {
                    // SAFETY: the kernel has just made these descriptors for us alone.
                    fds.extend(raw.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
                }
            }
            message.bytes
        };
        if length == 0 {
            return Ok(Received::Closed);
        }
        Ok(Received::Packet(serde_json::from_slice(&bytes[..length])?, fds))
    }
}

impl AsFd for Control {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Waits until `fd` can be read, or has hung up; false at the deadline.
pub fn wait_readable(fd: BorrowedFd<'_>, deadline: Duration) -> io::Result<bool> {
    let until = Instant::now() + deadline;
    loop {
        let left = until.saturating_duration_since(Instant::now());
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        match poll(&mut [PollFd::new(fd, PollFlags::POLLIN)], timeout) {
            Ok(0) => return Ok(false),
            Ok(_) => return Ok(true),
            Err(nix::errno::Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}
