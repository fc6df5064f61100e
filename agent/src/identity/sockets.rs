//! TCP sockets that a clone has inherited from its source: those of an address that is the source's alone are reset, so
//! that programs notice at once instead of waiting for answers that go elsewhere. sock_diag(7).
//!
//! Sockets of loopback addresses and of none in particular stay; so do connections of an address that the clone has too.

use std::collections::HashSet;
use std::fs::File;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsRawFd, OwnedFd};
use std::thread;

use nix::errno::Errno;
use nix::ifaddrs::getifaddrs;
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, setsockopt, socket, sockopt,
};
use nix::sys::time::TimeVal;

use crate::boot::modules;
use crate::network::namespace;

/// Of linux/netlink.h, linux/sock_diag.h, linux/inet_diag.h.
const HEADER: usize = 16;
const ERROR: u16 = 2;
const DONE: u16 = 3;
const REQUEST: u16 = 0x1;
const ACK: u16 = 0x4;
const DUMP: u16 = 0x300;
const BY_FAMILY: u16 = 20;
const DESTROY: u16 = 21;
/// Of inet_diag_req_v2: what stands before the socket's id, and the id.
const BEFORE_ID: usize = 8;
const ID: usize = 48;
/// Of inet_diag_msg.
const BEFORE_FOUND_ID: usize = 4;
/// Where the local address is in an id: behind two ports.
const ADDRESS: usize = 4;
const TIME_WAIT: u32 = 6;
/// AF_INET and AF_INET6, in the width that messages have.
const INET: [u8; 2] = [2, 10];
const TCP: u8 = 6;
/// The kernel answers at once, if it does.
const PATIENCE: TimeVal = TimeVal::new(10, 0);
const BUFFER: usize = 64 * 1024;

/// A socket as the kernel names it.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Found {
    family: u8,
    id: Vec<u8>,
}

/// Of the network namespace that a process is in; returns how many there were.
pub(super) fn reset(pid: u32) -> io::Result<usize> {
    let namespace = File::open(format!("/proc/{pid}/ns/net"))?;
    modules::load_listed(modules::CLONE);
    let work = move || {
        namespace::enter(&namespace)?;
        reset_here(&addresses()?)
    };
    thread::spawn(work).join().unwrap_or_else(|_| Err(io::Error::other("its thread has failed")))
}

fn addresses() -> io::Result<HashSet<IpAddr>> {
    let all = getifaddrs()?.filter_map(|interface| interface.address);
    let ip = all.filter_map(|address| {
        let v4 = address.as_sockaddr_in().map(|v4| IpAddr::V4(v4.ip()));
        v4.or_else(|| address.as_sockaddr_in6().map(|v6| IpAddr::V6(v6.ip())))
    });
    Ok(ip.collect())
}

fn reset_here(own: &HashSet<IpAddr>) -> io::Result<usize> {
    let diag = Diag::open()?;
    let mut reset = 0;
    for family in INET {
        for found in diag.sockets(family)? {
            if found.address().is_some_and(|address| is_foreign(address, own)) && diag.destroy(&found)? {
                reset += 1;
            }
        }
    }
    Ok(reset)
}

fn is_foreign(address: IpAddr, own: &HashSet<IpAddr>) -> bool {
    let address = address.to_canonical();
    !address.is_loopback() && !address.is_unspecified() && !own.contains(&address)
}

impl Found {
    /// It is bound to this one.
    fn address(&self) -> Option<IpAddr> {
        let bytes = self.id.get(ADDRESS..ADDRESS + 16)?;
        if self.family == INET[0] {
            let four: [u8; 4] = bytes.get(..4)?.try_into().ok()?;
            return Some(Ipv4Addr::from(four).into());
        }
        let sixteen: [u8; 16] = bytes.try_into().ok()?;
        Some(Ipv6Addr::from(sixteen).into())
    }
}

struct Diag(OwnedFd);

impl Diag {
    /// Of the calling thread's network namespace.
    fn open() -> io::Result<Self> {
        let kind = (SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::NetlinkSockDiag);
        let socket = socket(AddressFamily::Netlink, kind.0, kind.1, kind.2)?;
        setsockopt(&socket, sockopt::ReceiveTimeout, &PATIENCE)?;
        Ok(Self(socket))
    }

    fn ask(&self, kind: u16, flags: u16, body: &[u8]) -> io::Result<()> {
        let length = u32::try_from(HEADER + body.len()).map_err(io::Error::other)?;
        let mut message = length.to_ne_bytes().to_vec();
        message.extend(kind.to_ne_bytes());
        message.extend((REQUEST | flags).to_ne_bytes());
        message.extend([0; 8]);
        message.extend(body);
        send(self.0.as_raw_fd(), &message, MsgFlags::empty())?;
        Ok(())
    }

    /// All but those that only wait for their time to be over.
    fn sockets(&self, family: u8) -> io::Result<Vec<Found>> {
        self.ask(BY_FAMILY, DUMP, &request(family, !(1 << TIME_WAIT), &[0; ID]))?;
        let (mut all, mut buffer) = (Vec::new(), vec![0; BUFFER]);
        loop {
            let length = recv(self.0.as_raw_fd(), &mut buffer, MsgFlags::empty())?;
            for message in messages(&buffer[..length]) {
                match message {
                    (DONE, _) => return Ok(all),
                    (ERROR, body) => return Err(refused("list them", errno(body))),
                    (BY_FAMILY, body) => all.extend(found(body)),
                    _ => {}
                }
            }
        }
    }

    /// Says whether it was still there.
    fn destroy(&self, socket: &Found) -> io::Result<bool> {
        self.ask(DESTROY, ACK, &request(socket.family, u32::MAX, &socket.id))?;
        let mut buffer = vec![0; BUFFER];
        loop {
            let length = recv(self.0.as_raw_fd(), &mut buffer, MsgFlags::empty())?;
            for (kind, body) in messages(&buffer[..length]) {
                if kind == ERROR {
                    return match errno(body) {
                        Errno::UnknownErrno => Ok(true),
                        Errno::ENOENT => Ok(false),
                        errno => Err(refused("reset one", errno)),
                    };
                }
            }
        }
    }
}

/// struct inet_diag_req_v2.
fn request(family: u8, states: u32, id: &[u8]) -> Vec<u8> {
    let mut body = Vec::with_capacity(BEFORE_ID + ID);
    body.extend([family, TCP, 0, 0]);
    body.extend(states.to_ne_bytes());
    body.extend(id);
    body
}

/// Kinds and bodies of the messages in a datagram.
fn messages(datagram: &[u8]) -> Vec<(u16, &[u8])> {
    let (mut rest, mut found) = (datagram, Vec::new());
    while let Some((length, kind)) = header(rest) {
        let Some(body) = rest.get(HEADER..length) else { break };
        found.push((kind, body));
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    found
}

fn header(bytes: &[u8]) -> Option<(usize, u16)> {
    let length = u32::from_ne_bytes(bytes.get(..4)?.try_into().ok()?);
    let kind = u16::from_ne_bytes(bytes.get(4..6)?.try_into().ok()?);
    Some((usize::try_from(length).ok()?, kind))
}

fn found(body: &[u8]) -> Option<Found> {
    let id = body.get(BEFORE_FOUND_ID..BEFORE_FOUND_ID + ID)?.to_vec();
    Some(Found { family: *body.first()?, id })
}

/// None is an acknowledgement.
fn errno(body: &[u8]) -> Errno {
    let code = body.get(..4).and_then(|code| code.try_into().ok()).map_or(0, i32::from_ne_bytes);
    Errno::from_raw(code.saturating_abs())
}

fn refused(what: &str, errno: Errno) -> io::Error {
    match errno {
        // It has neither the module nor what the module would do.
        Errno::ENOENT | Errno::EOPNOTSUPP => io::Error::other(format!(
            "{what}: the guest's kernel cannot ({}): it needs INET_TCP_DIAG and INET_DIAG_DESTROY, which Debian's has",
            errno.desc()
        )),
        errno => io::Error::other(format!("{what}: {}", errno.desc())),
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::net::{TcpListener, TcpStream};

    use nix::sched::{CloneFlags, unshare};

    use super::*;

    #[test]
    fn addresses_of_ones_own_of_loopback_and_of_none_are_not_foreign() {
        let own: HashSet<IpAddr> =
            ["10.0.0.2", "fd00::2"].iter().map(|address| address.parse().unwrap()).collect();
        let foreign = |address: &str| is_foreign(address.parse().unwrap(), &own);
        for stays in ["10.0.0.2", "::ffff:10.0.0.2", "fd00::2", "127.0.0.11", "::1", "0.0.0.0", "::"] {
            assert!(!foreign(stays), "{stays}");
        }
        for goes in ["10.0.0.3", "::ffff:10.0.0.3", "fd00::3", "fe80::1"] {
            assert!(foreign(goes), "{goes}");
        }
    }

    #[test]
    fn nonsense_of_a_datagram_is_left_out() {
        let mut datagram = vec![20, 0, 0, 0, 20, 0];
        datagram.resize(20, 7);
        assert_eq!(messages(&datagram), [(BY_FAMILY, &[7; 4][..])]);
        for length in 0..20 {
            assert!(messages(&datagram[..length]).is_empty(), "{length}");
        }
        datagram[0] = 3;
        assert!(messages(&datagram).is_empty());
        assert_eq!((found(&[1; 20]), errno(&[])), (None, Errno::UnknownErrno));
    }

    /// In a namespace of its own: both ends of a connection of an address that goes are reset, a connection of loopback stays.
    #[test]
    fn sockets_of_an_address_that_went_are_reset() {
        let tested = thread::spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET).unwrap();
            crate::sys::loopback_up().unwrap();
            let run = |args: &[&str]| {
                let status = std::process::Command::new("ip").args(args).status().unwrap();
                assert!(status.success(), "ip {args:?}");
            };
            run(&["address", "add", "10.9.9.1/32", "dev", "lo"]);
            run(&["address", "add", "fd09::1/128", "dev", "lo", "nodad"]);
            let pair = |address: &str| {
                let listener = TcpListener::bind(address).unwrap();
                let address = listener.local_addr().unwrap();
                // The kernel makes the route of an IPv6 address by and by.
                let connect = || TcpStream::connect(address).ok();
                let client = crate::wait::poll(std::time::Duration::from_secs(30), connect).unwrap();
                (listener.accept().unwrap().0, client)
            };
            let (_kept, mut stays) = pair("127.0.0.1:0");
            let (mut four, mut other) = pair("10.9.9.1:0");
            let (mut six, _other) = pair("[fd09::1]:0");
            assert_eq!(reset_here(&addresses().unwrap()).unwrap(), 0);
            run(&["address", "del", "10.9.9.1/32", "dev", "lo"]);
            run(&["address", "del", "fd09::1/128", "dev", "lo"]);
            assert_eq!(reset_here(&addresses().unwrap()).unwrap(), 4);
            for socket in [&mut four, &mut other, &mut six] {
                let error = socket.read(&mut [0]).unwrap_err();
                assert!(
                    matches!(error.raw_os_error(), Some(libc::ECONNABORTED | libc::ECONNRESET)),
                    "{error}"
                );
            }
            stays.set_nonblocking(true).unwrap();
            assert_eq!(stays.read(&mut [0]).unwrap_err().kind(), io::ErrorKind::WouldBlock);
        });
        tested.join().unwrap();
    }
}
