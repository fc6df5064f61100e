//! Over UDP. A server echoes what comes to its port.
//!
//! * `count`: answers the port of a fresh socket, counts what comes there until the asker ends the connection's
//!   other half, and answers the count and the nanoseconds between the first and the last. Every so many it
//!   sends one back, so that the sender does not run ahead of it.
//! * `join GROUP PORT`: answers `joined`, then the first datagram that comes to the group.

use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, SocketAddrV6, TcpStream, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::socket::{setsockopt, sockopt};

use super::{DEADLINE, answer, request};

/// The longest that IPv4 carries.
const LONGEST: usize = 65_507;
/// A counted stream of datagrams has ended when none came for so long.
const SILENCE: Duration = Duration::from_millis(500);
/// A counted stream's confirmations, and how many of its datagrams are on the way at most: fewer than what a
/// socket's buffer takes by default.
const CONFIRMED: u64 = 64;
const AHEAD: u64 = 192;
/// A confirmation that takes longer is lost, or what it would confirm is.
const LOST: Duration = Duration::from_millis(200);
/// Small, as a flood is.
const FLOOD: usize = 64;
/// The interface of a container; multicast over IPv6 has to name it.
const INTERFACE: &str = "eth0";

pub(super) fn echo(socket: &UdpSocket, stop: &AtomicBool) {
    let mut buffer = vec![0; LONGEST];
    while !stop.load(Ordering::Relaxed) {
        if let Ok((length, from)) = socket.recv_from(&mut buffer) {
            socket.send_to(&buffer[..length], from).ok();
        }
    }
}

fn socket(family: IpAddr) -> Result<UdpSocket> {
    let any = match family {
        IpAddr::V4(_) => IpAddr::from(Ipv4Addr::UNSPECIFIED),
        IpAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    let socket = UdpSocket::bind((any, 0))?;
    socket.set_read_timeout(Some(DEADLINE))?;
    Ok(socket)
}

/// Sends a datagram of each size to the server at `to`, each when the one before has come back.
pub fn there_and_back(to: SocketAddr, sizes: &[usize]) -> Result<()> {
    let socket = socket(to.ip())?;
    socket.connect(to)?;
    let mut buffer = vec![0; LONGEST];
    for &size in sizes {
        let datagram: Vec<u8> = (0..size).map(|at| (at.wrapping_mul(31) >> 3).to_le_bytes()[0]).collect();
        socket.send(&datagram).with_context(|| format!("sending {size} bytes"))?;
        let length = socket.recv(&mut buffer).with_context(|| format!("{size} bytes do not come back"))?;
        ensure!(buffer[..length] == datagram, "{size} bytes come back as {length} others");
    }
    Ok(())
}

/// Sends one datagram over IPv6 that nobody may divide, and waits for it to come back.
pub fn whole(to: SocketAddr, size: usize) -> Result<()> {
    let socket = socket(to.ip())?;
    setsockopt(&socket, sockopt::Ipv6DontFrag, &true)?;
    socket.connect(to)?;
    socket.send(&vec![7; size]).with_context(|| format!("sending {size} bytes whole"))?;
    let length =
        socket.recv(&mut vec![0; LONGEST]).with_context(|| format!("{size} bytes do not come back"))?;
    ensure!(length == size, "{size} bytes come back as {length}");
    Ok(())
}

pub(super) fn count(stream: &TcpStream) -> Result<()> {
    let socket = socket(stream.local_addr()?.ip())?;
    socket.set_read_timeout(Some(SILENCE))?;
    writeln!(&mut &*stream, "{}", socket.local_addr()?.port())?;
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            (&mut &*stream).read_to_end(&mut Vec::new()).ok();
            over.store(true, Ordering::Relaxed);
        });
        let (mut count, mut first, mut last) = (0u64, None, Instant::now());
        let mut buffer = vec![0; LONGEST];
        loop {
            match socket.recv_from(&mut buffer) {
                Ok((_, from)) => {
                    count += 1;
                    last = Instant::now();
                    first.get_or_insert(last);
                    if count.is_multiple_of(CONFIRMED) {
                        socket.send_to(&[0], from).ok();
                    }
                }
                Err(error) if error.kind() != io::ErrorKind::WouldBlock => return Err(error.into()),
                Err(_) if over.load(Ordering::Relaxed) => {
                    let time = first.map_or(Duration::ZERO, |first| last - first);
                    return Ok(write!(&mut &*stream, "{count} {}", time.as_nanos())?);
                }
                Err(_) => {}
            }
        }
    })
}

/// What came of datagrams that were sent as fast as they were received.
#[derive(Debug, Clone, Copy)]
pub struct Blast {
    pub received: u64,
    /// Between the first and the last, at the receiver.
    pub elapsed: Duration,
}

impl std::str::FromStr for Blast {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let numbers: Vec<u64> = text.split_whitespace().map_while(|word| word.parse().ok()).collect();
        let [received, elapsed] = numbers[..] else { bail!("two numbers expected: {text:?}") };
        Ok(Self { received, elapsed: Duration::from_nanos(elapsed) })
    }
}

/// Sends datagrams to the server at `to`, which counts them.
pub fn blast(to: SocketAddr, size: usize, count: u64) -> Result<Blast> {
    let mut control = request(to, "count")?;
    let mut port = String::new();
    while !port.ends_with('\n') {
        let mut byte = [0];
        control.read_exact(&mut byte)?;
        port.push(char::from(byte[0]));
    }
    let socket = socket(to.ip())?;
    socket.connect((to.ip(), port.trim_end().parse::<u16>().with_context(|| port.clone())?))?;
    socket.set_read_timeout(Some(LOST))?;
    let (datagram, mut ahead) = (vec![7; size], 0);
    for _ in 0..count {
        // What the local queue has no room for is lost, as on the way.
        socket.send(&datagram).ok();
        ahead += 1;
        if ahead == AHEAD {
            ahead = if socket.recv(&mut [0]).is_ok() { AHEAD - CONFIRMED } else { 0 };
        }
    }
    control.shutdown(Shutdown::Write)?;
    answer(control)?.parse()
}

/// Sends datagrams until the asker ends its half of the connection; how many.
pub(super) fn flood(stream: &TcpStream, to: SocketAddr) -> Result<u64> {
    let socket = socket(to.ip())?;
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            (&mut &*stream).read_to_end(&mut Vec::new()).ok();
            over.store(true, Ordering::Relaxed);
        });
        let mut count = 0;
        while !over.load(Ordering::Relaxed) {
            // Nobody listens, and says so.
            count += u64::from(socket.send_to(&[7; FLOOD], to).is_ok());
        }
        Ok(count)
    })
}

pub(super) fn join(stream: &TcpStream, group: IpAddr, port: u16) -> Result<()> {
    let socket = match group {
        IpAddr::V4(group) => {
            let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, port))?;
            socket.join_multicast_v4(&group, &Ipv4Addr::UNSPECIFIED)?;
            socket
        }
        IpAddr::V6(group) => {
            let socket = UdpSocket::bind((Ipv6Addr::UNSPECIFIED, port))?;
            socket.join_multicast_v6(&group, nix::net::if_::if_nametoindex(INTERFACE)?)?;
            socket
        }
    };
    socket.set_read_timeout(Some(DEADLINE))?;
    writeln!(&mut &*stream, "joined")?;
    let mut buffer = [0; 1500];
    let length = socket.recv(&mut buffer).context("nothing comes to the group")?;
    Ok((&mut &*stream).write_all(&buffer[..length])?)
}

pub(super) fn send(group: IpAddr, port: u16, text: &str) -> Result<()> {
    let to = match group {
        IpAddr::V4(_) => SocketAddr::from((group, port)),
        IpAddr::V6(group) => {
            SocketAddrV6::new(group, port, 0, nix::net::if_::if_nametoindex(INTERFACE)?).into()
        }
    };
    socket(group)?.send_to(text.as_bytes(), to).with_context(|| format!("sending to {to}"))?;
    Ok(())
}
