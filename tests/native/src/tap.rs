#![allow(unsafe_code)] // Interfaces are made and driven by ioctls that have no safe wrapper here.
//! Taps in a network namespace of the test's own, and the host's side of them: a packet socket, which
//! sends what comes out of the tap and receives what goes into it. Also part of the VMM's own tests.

use std::fs::{self, File};
use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CloneFlags, unshare};
use nix::sys::socket::{setsockopt, sockopt};

/// Bytes of the header before each frame of a tap.
pub const TAP_HEADER: usize = 12;
/// Of a packet socket: the same without `num_buffers`.
pub const SOCKET_HEADER: usize = 10;
/// For local experiments (IEEE 802): no protocol of the host's answers it.
const ETHERTYPE: [u8; 2] = [0x88, 0xb5];

/// Moves this thread to a fresh network namespace, which ends with the thread and what it opened.
///
/// # Panics
/// Without root's rights.
pub fn enter_namespace() {
    unshare(CloneFlags::CLONE_NEWNET).expect("network tests run as root");
    // Without IPv6 no interface says anything by itself. A kernel without it has no such file.
    for which in ["all", "default"] {
        let _ = fs::write(format!("/proc/sys/net/ipv6/conf/{which}/disable_ipv6"), "1");
    }
}

/// The host's side of a tap.
pub struct Interface {
    name: String,
    index: i32,
    socket: OwnedFd,
}

fn check(result: i32) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn request(name: &str) -> libc::ifreq {
    // SAFETY: all zeroes is a valid ifreq.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (place, byte) in request.ifr_name.iter_mut().zip(name.as_bytes()) {
        *place = byte.cast_signed();
    }
    request
}

/// Opens a tap of this name, which exists as long as the descriptor does.
pub fn open(name: &str, flags: i32, header: i32) -> io::Result<OwnedFd> {
    let tun = File::options().read(true).write(true).open("/dev/net/tun")?;
    let mut request = request(name);
    request.ifr_ifru.ifru_flags = i16::try_from(flags).map_err(io::Error::other)?;
    // SAFETY: the ioctl reads and writes an ifreq, which lives over the call.
    check(unsafe { libc::ioctl(tun.as_raw_fd(), libc::TUNSETIFF, &raw mut request) })?;
    // SAFETY: the ioctl reads an int, which lives over the call.
    check(unsafe { libc::ioctl(tun.as_raw_fd(), libc::TUNSETVNETHDRSZ, &raw const header) })?;
    Ok(tun.into())
}

/// A tap that a network device takes, and its interface, up.
///
/// # Panics
/// When the host cannot make one.
#[must_use]
pub fn pair(name: &str) -> (OwnedFd, Interface) {
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    let tap = open(name, flags, 12).expect("a tap can be made");
    (tap, Interface::new(name).expect("its interface can be used"))
}

impl Interface {
    fn new(name: &str) -> io::Result<Self> {
        // SAFETY: plain numbers in, a new descriptor of ours out.
        let socket = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0) };
        check(socket)?;
        // SAFETY: see above.
        let socket = unsafe { OwnedFd::from_raw_fd(socket) };
        let mut named = request(name);
        // SAFETY: the ioctl reads and writes an ifreq, which lives over the call.
        check(unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCGIFINDEX, &raw mut named) })?;
        // SAFETY: the ioctl filled this member in.
        let index = unsafe { named.ifr_ifru.ifru_ifindex };
        let interface = Self { name: name.to_owned(), index, socket };
        // Bound to an interface that is down, the socket would say so first.
        interface.set_up(true)?;
        let one: libc::c_int = 1;
        // SAFETY: the option is an int, which lives over the call.
        check(unsafe {
            libc::setsockopt(
                interface.socket.as_raw_fd(),
                libc::SOL_PACKET,
                libc::PACKET_VNET_HDR,
                (&raw const one).cast(),
                4,
            )
        })?;
        // For a test that looks at what came after a flood.
        setsockopt(&interface.socket, sockopt::RcvBufForce, &(64 << 20))?;
        interface.listen(true)?;
        Ok(interface)
    }

    /// Whether frames from the tap are received here. Sending works either way.
    pub fn listen(&self, on: bool) -> io::Result<()> {
        // Otherwise only those of another protocol for experiments, which is nobody's.
        let protocol = if on { u16::try_from(libc::ETH_P_ALL).map_err(io::Error::other)? } else { 0x88b6 };
        // SAFETY: all zeroes is a valid sockaddr_ll.
        let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        address.sll_family = u16::try_from(libc::AF_PACKET).map_err(io::Error::other)?;
        address.sll_protocol = protocol.to_be();
        address.sll_ifindex = self.index;
        let length = u32::try_from(size_of_val(&address)).map_err(io::Error::other)?;
        // SAFETY: the address and its length, which lives over the call.
        check(unsafe { libc::bind(self.socket.as_raw_fd(), (&raw const address).cast(), length) })
    }

    fn set(&self, what: libc::Ioctl, value: i32, flags: bool) -> io::Result<()> {
        let mut request = request(&self.name);
        if flags {
            request.ifr_ifru.ifru_flags = i16::try_from(value).map_err(io::Error::other)?;
        } else {
            request.ifr_ifru.ifru_ifindex = value;
        }
        // SAFETY: the ioctl reads an ifreq, which lives over the call.
        check(unsafe { libc::ioctl(self.socket.as_raw_fd(), what, &raw mut request) })
    }

    pub fn set_up(&self, up: bool) -> io::Result<()> {
        self.set(libc::SIOCSIFFLAGS, if up { libc::IFF_UP } else { 0 }, true)
    }

    pub fn set_mtu(&self, mtu: i32) -> io::Result<()> {
        self.set(libc::SIOCSIFMTU, mtu, false)
    }

    /// How many frames wait in the tap before more are dropped.
    pub fn set_queue(&self, frames: i32) -> io::Result<()> {
        self.set(libc::SIOCSIFTXQLEN, frames, false)
    }

    /// Takes the interface away from under its tap.
    pub fn remove(&self) -> io::Result<()> {
        let flags = libc::SOCK_RAW | libc::SOCK_CLOEXEC;
        // SAFETY: plain numbers in, a new descriptor of ours out.
        let socket = unsafe { libc::socket(libc::AF_NETLINK, flags, libc::NETLINK_ROUTE) };
        check(socket)?;
        // SAFETY: see above.
        let mut socket = unsafe { File::from_raw_fd(socket) };
        // nlmsghdr (length, type, flags, sequence, port) and ifinfomsg (family, type, index, flags, mask).
        let mut message = Vec::new();
        message.extend(32u32.to_ne_bytes());
        message.extend(libc::RTM_DELLINK.to_ne_bytes());
        message.extend(u16::try_from(libc::NLM_F_REQUEST | libc::NLM_F_ACK).unwrap_or(0).to_ne_bytes());
        message.extend([0; 12]);
        message.extend(self.index.to_ne_bytes());
        message.extend([0; 8]);
        socket.write_all(&message)?;
        let mut answer = [0; 256];
        let count = socket.read(&mut answer)?;
        let error = answer.get(16..20).filter(|_| count >= 20).and_then(|bytes| bytes.try_into().ok());
        match error.map(i32::from_ne_bytes) {
            Some(0) => Ok(()),
            Some(error) => Err(io::Error::from_raw_os_error(-error)),
            None => Err(io::Error::other("netlink answered nothing")),
        }
    }

    /// Sends a frame to the tap.
    ///
    /// # Panics
    /// When the interface is down or takes no more.
    pub fn send(&self, frame: &[u8]) {
        self.send_with(&[0; SOCKET_HEADER], frame).expect("the interface is up");
    }

    /// The same with a header (struct virtio_net_hdr).
    pub fn send_with(&self, header: &[u8; SOCKET_HEADER], frame: &[u8]) -> io::Result<()> {
        nix::sys::uio::writev(&self.socket, &[IoSlice::new(header), IoSlice::new(frame)])?;
        Ok(())
    }

    /// The next frame that the tap's owner sent, and its header. None at the deadline.
    pub fn receive(&self, deadline: Duration) -> Option<([u8; SOCKET_HEADER], Vec<u8>)> {
        let until = Instant::now() + deadline;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
            match poll(&mut [PollFd::new(self.socket.as_fd(), PollFlags::POLLIN)], timeout) {
                Ok(0) => return None,
                Ok(_) => {}
                Err(nix::errno::Errno::EINTR) => continue,
                Err(error) => panic!("poll a packet socket: {error}"),
            }
            let (mut header, mut frame) = ([0; SOCKET_HEADER], vec![0; 70_000]);
            let mut slices = [IoSliceMut::new(&mut header), IoSliceMut::new(&mut frame)];
            let count = nix::sys::uio::readv(&self.socket, &mut slices);
            // An error is the interface's, told once: it went down.
            if let Ok(count) = count {
                frame.truncate(count.saturating_sub(SOCKET_HEADER));
                return Some((header, frame));
            }
        }
    }
}

impl AsFd for Interface {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// A frame of `len` bytes, at least 18, which carries `number` and a pattern that follows from it.
#[must_use]
pub fn frame(number: u32, len: usize) -> Vec<u8> {
    let mut frame = vec![0x02, 0, 0, 0, 0, 1, 0x02, 0, 0, 0, 0, 2];
    frame.extend(ETHERTYPE);
    frame.extend(number.to_be_bytes());
    let pattern = |at: usize| at.wrapping_mul(31).wrapping_add(number as usize).to_le_bytes()[0];
    frame.extend((18..len).map(pattern));
    frame
}

/// A TCP segment over IPv4 with `payload` bytes of data, and the header that leaves its checksum, and its
/// division in pieces of `piece` bytes, to whoever sends it on.
#[must_use]
pub fn segment(payload: usize, piece: u16) -> ([u8; SOCKET_HEADER], Vec<u8>) {
    let mut frame = vec![0x02, 0, 0, 0, 0, 1, 0x02, 0, 0, 0, 0, 2, 0x08, 0];
    let total = u16::try_from(40 + payload).unwrap_or(u16::MAX);
    let mut ip = vec![0x45, 0];
    ip.extend(total.to_be_bytes());
    ip.extend([0, 1, 0x40, 0, 64, 6, 0, 0, 192, 0, 2, 1, 192, 0, 2, 2]);
    let sum = !fold(0, &ip);
    ip[10..12].copy_from_slice(&sum.to_be_bytes());
    let mut tcp = vec![0x10, 0, 0x20, 0, 0, 0, 0, 1, 0, 0, 0, 1, 0x50, 0x10, 0xff, 0xff, 0, 0, 0, 0];
    // Of the pseudo header, as whoever completes it expects.
    let length = u32::try_from(20 + payload).unwrap_or(0);
    let pseudo = fold(6 + length, &ip[12..20]);
    tcp[16..18].copy_from_slice(&pseudo.to_be_bytes());
    frame.extend(ip);
    frame.extend(tcp);
    frame.extend((0..payload).map(|at| at.to_le_bytes()[0]));
    let mut header = [0; SOCKET_HEADER];
    // NEEDS_CSUM, GSO_TCPV4, header length, piece, where the checksum starts, where it goes.
    header[..2].copy_from_slice(&[1, 1]);
    header[2..4].copy_from_slice(&54u16.to_le_bytes());
    header[4..6].copy_from_slice(&piece.to_le_bytes());
    header[6..8].copy_from_slice(&34u16.to_le_bytes());
    header[8..10].copy_from_slice(&16u16.to_le_bytes());
    (header, frame)
}

/// Whether the TCP checksum of an IPv4 frame is right.
#[must_use]
pub fn is_sum_right(frame: &[u8]) -> bool {
    let length = u32::try_from(frame.len() - 34).unwrap_or(0);
    fold(fold(6 + length, &frame[26..34]).into(), &frame[34..]) == 0xffff
}

/// The sum of 16-bit words (RFC 1071).
fn fold(start: u32, bytes: &[u8]) -> u16 {
    let word = |pair: &[u8]| u32::from(pair[0]) << 8 | u32::from(pair.get(1).copied().unwrap_or(0));
    let mut sum = bytes.chunks(2).map(word).fold(start, u32::wrapping_add);
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    u16::try_from(sum).unwrap_or(0)
}
