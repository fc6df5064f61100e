#![allow(unsafe_code)] // ioctls of the tun driver
//! A tap device by open descriptor (Linux, Documentation/networking/tuntap.rst): one frame each
//! read or write, behind a `virtio_net_hdr` of 12 bytes, without blocking.
//!
//! The peer opened it, chose its namespace and its flags; here only the offloads are set, for which no
//! privilege is needed. The header goes through as the guest or the kernel wrote it.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::guest_buffers::GuestBuffers;

/// Bytes of the header before each frame (virtio 1.2, 5.1.6: with `num_buffers`).
pub const HEADER: usize = 12;

/// IFF_NO_PI is needed as well, and cannot be asked for: in the kernel's answer the bit says that no
/// filter is attached (IFF_NOFILTER).
const NEEDED: [(libc::c_int, &str); 2] = [(libc::IFF_TAP, "IFF_TAP"), (libc::IFF_VNET_HDR, "IFF_VNET_HDR")];

/// Why a descriptor cannot serve as a tap.
#[derive(Debug, thiserror::Error)]
pub enum TapError {
    #[error(
        "the descriptor is not attached to a tap interface (TUNGETIFF: {0}); open /dev/net/tun and use TUNSETIFF"
    )]
    NotAttached(#[source] io::Error),
    #[error("the interface was made without {missing}; needed are IFF_TAP, IFF_NO_PI and IFF_VNET_HDR")]
    Flags { missing: &'static str },
    #[error("its frames have a header of {found} bytes; set {HEADER} with TUNSETVNETHDRSZ")]
    Header { found: i32 },
    #[error("{operation}: {source}")]
    System { operation: &'static str, source: io::Error },
}

/// What the reader of a tap takes: frames that the kernel need not finish.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Offloads {
    /// Without checksums. The others need this one.
    pub checksum: bool,
    /// TCP over IPv4, segmented by the reader.
    pub tso4: bool,
    pub tso6: bool,
    /// Segments with congestion notification.
    pub ecn: bool,
}

impl Offloads {
    fn flags(self) -> libc::c_uint {
        if !self.checksum {
            return 0;
        }
        let mut flags = libc::TUN_F_CSUM;
        for (wanted, flag) in [
            (self.tso4, libc::TUN_F_TSO4),
            (self.tso6, libc::TUN_F_TSO6),
            (self.ecn && (self.tso4 || self.tso6), libc::TUN_F_TSO_ECN),
        ] {
            if wanted {
                flags |= flag;
            }
        }
        flags
    }
}

/// See the module.
#[derive(Debug)]
pub struct Tap(OwnedFd);

impl Tap {
    /// Takes `fd` as it is open, and makes it non-blocking.
    pub fn new(fd: OwnedFd) -> Result<Self, TapError> {
        // SAFETY: all zeroes is a valid ifreq.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        // SAFETY: the ioctl fills an ifreq in, which lives over the call. On a descriptor of
        // another kind it is unknown, and fails.
        if unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNGETIFF, &raw mut request) } < 0 {
            return Err(TapError::NotAttached(io::Error::last_os_error()));
        }
        // SAFETY: TUNGETIFF gives the flags in this member.
        let flags = libc::c_int::from(unsafe { request.ifr_ifru.ifru_flags });
        if let Some((_, missing)) = NEEDED.iter().find(|(flag, _)| flags & flag == 0) {
            return Err(TapError::Flags { missing });
        }
        let mut found: libc::c_int = 0;
        // SAFETY: the ioctl writes one int, which lives over the call.
        if unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNGETVNETHDRSZ, &raw mut found) } < 0 {
            return Err(system("TUNGETVNETHDRSZ")(io::Error::last_os_error()));
        }
        if usize::try_from(found) != Ok(HEADER) {
            return Err(TapError::Header { found });
        }
        let nonblocking = |error: nix::Error| system("make the descriptor non-blocking")(error.into());
        let flags = OFlag::from_bits_retain(fcntl(&fd, FcntlArg::F_GETFL).map_err(nonblocking)?);
        if !flags.contains(OFlag::O_NONBLOCK) {
            fcntl(&fd, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK)).map_err(nonblocking)?;
        }
        Ok(Self(fd))
    }

    /// A socket that keeps messages apart, and takes no more while its queue is full, in a tap's place.
    #[cfg(test)]
    pub(crate) fn of_socket(socket: std::os::unix::net::UnixDatagram) -> Self {
        socket.set_nonblocking(true).unwrap();
        Self(socket.into())
    }

    /// Sets what the frames that are read may leave to the reader.
    pub fn set_offloads(&self, offloads: Offloads) -> Result<(), TapError> {
        let flags = libc::c_ulong::from(offloads.flags());
        // SAFETY: the ioctl takes a number and touches no memory.
        match unsafe { libc::ioctl(self.0.as_raw_fd(), libc::TUNSETOFFLOAD, flags) } {
            0 => Ok(()),
            _ => Err(system("TUNSETOFFLOAD")(io::Error::last_os_error())),
        }
    }

    /// Reads one frame and its header into `buffers`, what they have no room for into `rest`. A
    /// frame that fills both may have been longer. `num_buffers` is left as it was.
    pub fn read(&self, buffers: &mut GuestBuffers, rest: &mut [u8]) -> io::Result<usize> {
        buffers.read(self.0.as_fd(), rest)
    }

    /// Writes one frame, whose header comes first. `InvalidInput`: the header or the frame is not
    /// acceptable.
    pub fn write(&self, buffers: &GuestBuffers) -> io::Result<usize> {
        buffers.write(self.0.as_fd())
    }

    /// Whether the interface is gone, so that the descriptor will never be of use again.
    pub fn is_gone(&self) -> bool {
        let mut set = [PollFd::new(self.0.as_fd(), PollFlags::empty())];
        let broken = PollFlags::POLLERR | PollFlags::POLLHUP | PollFlags::POLLNVAL;
        poll(&mut set, PollTimeout::ZERO).is_ok()
            && set[0].revents().is_some_and(|found| found.intersects(broken))
    }
}

fn system(operation: &'static str) -> impl FnOnce(io::Error) -> TapError {
    move |source| TapError::System { operation, source }
}

/// Whether an error of [`Tap::write`] says that the interface is gone.
pub fn says_gone(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EBADFD | libc::ENODEV))
}

impl AsRawFd for Tap {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_tap_is_refused() {
        let file = tempfile::tempfile().unwrap();
        assert!(matches!(Tap::new(file.into()), Err(TapError::NotAttached(_))));
        let null = std::fs::File::open("/dev/null").unwrap();
        assert!(matches!(Tap::new(null.into()), Err(TapError::NotAttached(_))));
        let tun = std::fs::File::options().read(true).write(true).open("/dev/net/tun").unwrap();
        assert!(matches!(Tap::new(tun.into()), Err(TapError::NotAttached(_))), "no interface");
    }

    #[test]
    fn segmentation_is_asked_for_only_where_it_can_be() {
        let all = Offloads { checksum: true, tso4: true, tso6: true, ecn: true };
        assert_eq!(all.flags(), 0xf);
        assert_eq!(Offloads { checksum: false, ..all }.flags(), 0);
        assert_eq!(Offloads { tso4: false, tso6: false, ..all }.flags(), 1);
        assert_eq!(Offloads { tso4: false, ..all }.flags(), 0xd);
    }
}
