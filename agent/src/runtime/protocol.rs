//! Messages between server and helper: one JSON document per packet, descriptors attached.

use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::path::PathBuf;

use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, UnixAddr, recvmsg, sendmsg};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// Largest packet. Error texts are cut to fit.
pub const MAX_PACKET: usize = 64 * 1024;
/// Most bytes of an error text.
pub const MAX_ERROR: usize = 8 * 1024;
/// Three streams and the process of an exec.
const MAX_FDS: usize = 4;

#[derive(Debug, Serialize, Deserialize)]
pub enum Request {
    /// With stdin, stdout and stderr attached, unless `terminal`.
    Create(Create),
    /// Lets the created process run.
    Start,
    /// Runs a process in a container that there is, with its OCI process object as a file
    /// attached, and behind it stdin, stdout and stderr, unless `terminal`.
    Exec(Exec),
}

#[derive(Debug, Serialize, Deserialize)]
pub struct Create {
    pub id: String,
    /// Holds `config.json` and the mounted `rootfs`.
    pub bundle: PathBuf,
    /// Where libcontainer keeps its state.
    pub state: PathBuf,
    pub terminal: bool,
    /// The container has a network namespace of its own, whose loopback shall be up.
    pub loopback: bool,
}

#[derive(Debug, Serialize, Deserialize)]
pub struct Exec {
    /// The container's init.
    pub init: i32,
    /// Directory of the container's cgroup.
    pub cgroup: PathBuf,
    /// The container's spec as libcontainer got it.
    pub config: PathBuf,
    pub terminal: bool,
}

#[derive(Debug, Serialize, Deserialize)]
pub enum Reply {
    /// With the terminal's master attached if there is one.
    Created {
        pid: i32,
    },
    Started,
    Failed {
        cause: Cause,
        message: String,
    },
}

/// Whose fault a failure is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Cause {
    /// The process's executable, in runc's words.
    Executable,
    /// The spec.
    Spec,
    /// Anything else.
    Runtime,
}

/// Sends a message. Packets are atomic: all of it goes or nothing.
pub fn send<T: Serialize>(socket: &impl AsRawFd, message: &T, fds: &[RawFd]) -> io::Result<()> {
    let packet = serde_json::to_vec(message)?;
    if packet.len() > MAX_PACKET {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "message beyond the packet size"));
    }
    let rights = [ControlMessage::ScmRights(fds)];
    let control: &[ControlMessage<'_>] = if fds.is_empty() { &[] } else { &rights };
    let flags = MsgFlags::MSG_NOSIGNAL;
    sendmsg::<UnixAddr>(socket.as_raw_fd(), &[IoSlice::new(&packet)], control, flags, None)?;
    Ok(())
}

/// Receives a message; `None` at end of file.
pub fn receive<T: DeserializeOwned>(socket: &impl AsRawFd) -> io::Result<Option<(T, Vec<OwnedFd>)>> {
    let mut packet = vec![0; MAX_PACKET];
    let mut control = nix::cmsg_space!([RawFd; MAX_FDS]);
    let (length, fds) = {
        let mut buffers = [IoSliceMut::new(&mut packet)];
        let flags = MsgFlags::MSG_CMSG_CLOEXEC;
        let message = recvmsg::<UnixAddr>(socket.as_raw_fd(), &mut buffers, Some(&mut control), flags)?;
        let mut fds = Vec::new();
        for part in message.cmsgs()? {
            if let ControlMessageOwned::ScmRights(received) = part {
                fds.extend(received.into_iter().map(own));
            }
        }
        (message.bytes, fds)
    };
    if length == 0 {
        return Ok(None);
    }
    Ok(Some((serde_json::from_slice(&packet[..length])?, fds)))
}

#[allow(unsafe_code)] // SCM_RIGHTS gives raw descriptors.
fn own(fd: RawFd) -> OwnedFd {
    // SAFETY: the kernel has just installed it for this process; nobody else has it.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

#[cfg(test)]
mod tests {
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};

    use super::*;

    #[test]
    fn messages_travel_with_their_descriptors() {
        let (ours, theirs) =
            socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC).unwrap();
        let (read, write) = nix::unistd::pipe().unwrap();
        send(&ours, &Reply::Created { pid: 7 }, &[write.as_raw_fd()]).unwrap();
        drop(write);
        let (reply, fds) = receive::<Reply>(&theirs).unwrap().unwrap();
        assert!(matches!(reply, Reply::Created { pid: 7 }));
        nix::unistd::write(&fds[0], b"x").unwrap();
        let mut byte = [0];
        assert_eq!(nix::unistd::read(&read, &mut byte).unwrap(), 1);
        drop(ours);
        assert!(receive::<Reply>(&theirs).unwrap().is_none());
    }
}
