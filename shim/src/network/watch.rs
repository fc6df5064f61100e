//! Learns that something has changed in a network namespace. What it is does not matter: whoever
//! is told looks at everything, so lost messages lose nothing.

use std::io;

use nix::errno::Errno;
use rtnetlink::MulticastGroup;
use rtnetlink::sys::protocols::NETLINK_ROUTE;
use rtnetlink::sys::{AsyncSocket, AsyncSocketExt, SocketAddr, TokioSocket};

const GROUPS: [MulticastGroup; 8] = [
    MulticastGroup::Link,
    MulticastGroup::Neigh,
    MulticastGroup::Ipv4Ifaddr,
    MulticastGroup::Ipv4Route,
    MulticastGroup::Ipv4Rule,
    MulticastGroup::Ipv6Ifaddr,
    MulticastGroup::Ipv6Route,
    MulticastGroup::Ipv6Rule,
];
const MESSAGE: usize = 8192;

// linux/rtnetlink.h, linux/neighbour.h
const RTM_NEWNEIGH: u16 = 28;
const RTM_GETNEIGH: u16 = 30;
const NUD_PERMANENT: u16 = 0x80;
const NTF_PROXY: u8 = 0x08;

/// A socket that hears the namespace in which it was opened.
pub(super) struct Watch {
    socket: TokioSocket,
    message: Vec<u8>,
}

impl Watch {
    /// Opens it in the calling thread's network namespace, within an async runtime.
    pub(super) fn open() -> io::Result<Self> {
        let mut socket = TokioSocket::new(NETLINK_ROUTE)?;
        let groups = GROUPS.iter().fold(0, |groups, group| groups | 1 << (*group as u32 - 1));
        socket.socket_mut().bind(&SocketAddr::new(0, groups))?;
        Ok(Self { socket, message: Vec::with_capacity(MESSAGE) })
    }

    /// Returns when something has changed; several changes may be one.
    pub(super) async fn changed(&mut self) -> io::Result<()> {
        loop {
            self.message.clear();
            match self.socket.recv(&mut self.message).await {
                Ok(()) if !matters(&self.message) => {}
                Ok(()) => return Ok(()),
                // There was more than the socket holds.
                Err(error) if error.raw_os_error() == Some(Errno::ENOBUFS as i32) => return Ok(()),
                Err(error) => return Err(error),
            }
        }
    }
}

/// Whether a message tells of more than a neighbour that the kernel has found or lost.
fn matters(message: &[u8]) -> bool {
    let kind = message.get(4..6).map(|bytes| u16::from_ne_bytes([bytes[0], bytes[1]]));
    // struct nlmsghdr is 16 bytes, then struct ndmsg: state at 8, flags at 10.
    let state = message.get(24..26).map_or(0, |bytes| u16::from_ne_bytes([bytes[0], bytes[1]]));
    let flags = message.get(26).copied().unwrap_or(0);
    match kind {
        Some(RTM_NEWNEIGH..RTM_GETNEIGH) => state & NUD_PERMANENT != 0 || flags & NTF_PROXY != 0,
        _ => true,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_matter_when_somebody_entered_them() {
        let neighbour = |state: u16, flags: u8| {
            let mut message = vec![0; 28];
            message[4..6].copy_from_slice(&RTM_NEWNEIGH.to_ne_bytes());
            message[24..26].copy_from_slice(&state.to_ne_bytes());
            message[26] = flags;
            message
        };
        assert!(!matters(&neighbour(2, 0)));
        assert!(matters(&neighbour(NUD_PERMANENT, 0)) && matters(&neighbour(0, NTF_PROXY)));
        assert!(matters(&[]) && matters(&[0; 6]));
    }
}
