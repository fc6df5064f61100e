#![allow(unsafe_code)] // An ioctl of /dev/net/tun, as in `tap`.
//! The guest's end of a tap, and a device that carries no Ethernet.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, poll};

pub(super) const DEADLINE: Duration = Duration::from_secs(20);
const HEADER: usize = 12;

/// Reads and writes frames in the VMM's place.
pub(super) struct Nic(File);

impl Nic {
    pub(super) fn new(tap: OwnedFd) -> Self {
        Self(tap.into())
    }

    pub(super) fn send(&mut self, frame: &[u8]) {
        assert!(self.offer(frame), "the tap takes no more");
    }

    /// Whether the tap takes it.
    pub(super) fn offer(&mut self, frame: &[u8]) -> bool {
        let packet = [&[0; HEADER][..], frame].concat();
        match self.0.write(&packet) {
            Ok(length) => {
                assert_eq!(length, packet.len());
                true
            }
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => false,
            Err(error) => panic!("{error}"),
        }
    }

    /// Whether the tap takes more before the time is up.
    pub(super) fn is_writable(&self, within: Duration) -> bool {
        let mut ready = [PollFd::new(std::os::fd::AsFd::as_fd(&self.0), PollFlags::POLLOUT)];
        poll(&mut ready, u16::try_from(within.as_millis()).unwrap_or(u16::MAX)).unwrap() == 1
    }

    /// The next frame for which `wanted` says yes; the kernel's own are passed over.
    pub(super) fn receive(&mut self, wanted: impl Fn(&[u8]) -> bool) -> Vec<u8> {
        let mut buffer = vec![0; 70_000];
        let until = Instant::now() + DEADLINE;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            assert!(!left.is_zero(), "no such frame has come");
            let mut ready = [PollFd::new(std::os::fd::AsFd::as_fd(&self.0), PollFlags::POLLIN)];
            poll(&mut ready, u16::try_from(left.as_millis()).unwrap_or(u16::MAX)).unwrap();
            match self.0.read(&mut buffer) {
                Ok(length) if wanted(&buffer[HEADER..length]) => return buffer[HEADER..length].to_vec(),
                Ok(_) => {}
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
                Err(error) => panic!("{error}"),
            }
        }
    }

    /// Whether the interface behind the descriptor is gone.
    pub(super) fn is_dead(&mut self) -> bool {
        let dead = |error: std::io::Error| error.raw_os_error() == Some(libc::EBADFD);
        self.0.read(&mut [0; 64]).is_err_and(dead)
    }
}

nix::ioctl_write_ptr_bad!(set_interface, nix::request_code_write!(b'T', 202, 4), libc::ifreq);

/// A device of the calling thread's namespace that carries IP packets.
pub(super) fn tun(name: &str) -> File {
    let file = File::options().read(true).write(true).open("/dev/net/tun").unwrap();
    // SAFETY: ifreq is plain data; all zeroes is valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from.cast_signed();
    }
    request.ifr_ifru.ifru_flags = i16::try_from(libc::IFF_TUN | libc::IFF_NO_PI).unwrap();
    // SAFETY: TUNSETIFF reads an ifreq, which outlives the call.
    unsafe { set_interface(file.as_raw_fd(), &raw mut request) }.unwrap();
    file
}

pub(super) const BROADCAST: [u8; 6] = [0xff; 6];

/// An Ethernet frame.
pub(super) fn frame(to: [u8; 6], from: [u8; 6], kind: u16, payload: &[u8]) -> Vec<u8> {
    [&to[..], &from[..], &kind.to_be_bytes()[..], payload].concat()
}

/// The answer to an ARP request for an IPv4 address, if the frame is one.
pub(super) fn arp_answer(request: &[u8], ours: [u8; 6], address: [u8; 4]) -> Option<Vec<u8>> {
    // RFC 826: 28 bytes behind the Ethernet header, operation at 6, target address at 24.
    let arp = request.get(14..42)?;
    if request[12..14] != [0x08, 0x06] || arp[6..8] != [0, 1] || arp[24..28] != address {
        return None;
    }
    let asker: [u8; 6] = arp[8..14].try_into().ok()?;
    let answer = [&arp[..6], &[0, 2], &ours, &address, &arp[8..18]].concat();
    Some(frame(asker, ours, 0x0806, &answer))
}
