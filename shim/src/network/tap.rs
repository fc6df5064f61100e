#![allow(unsafe_code)] // Three ioctls of /dev/net/tun.
//! Taps: the descriptor is the VMM's end, the interface is in the calling thread's network
//! namespace and vanishes with the last descriptor (Linux Documentation/networking/tuntap.rst).

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;

/// Of the names of taps; a number follows.
pub(crate) const PREFIX: &str = "spore";
pub(crate) const DEVICE: &str = "/dev/net/tun";
/// `virtio_net_hdr_mrg_rxbuf`, which comes before every frame.
const HEADER: libc::c_int = 12;
/// Bytes of the guest's frames that may be under way in the host before the tap takes no more, which the VMM
/// waits for. Without a limit the kernel takes any number, and drops those for which the next queue has no
/// room: 1000 behind a veth pair (net.core.netdev_max_backlog), of which the smallest count 768 bytes each.
const UNDER_WAY: libc::c_int = 512 * 1024;

// linux/if_tun.h
nix::ioctl_write_ptr_bad!(set_interface, nix::request_code_write!(b'T', 202, 4), libc::ifreq);
nix::ioctl_write_ptr_bad!(set_header_size, nix::request_code_write!(b'T', 216, 4), libc::c_int);
nix::ioctl_write_ptr_bad!(set_send_buffer, nix::request_code_write!(b'T', 212, 4), libc::c_int);

/// An operation that failed, and why.
pub(super) type Failure = (&'static str, io::Error);

#[derive(Debug)]
pub(super) struct Tap {
    pub(super) fd: OwnedFd,
    pub(super) name: String,
    pub(super) index: u32,
}

/// Whether a link has the name of a tap of Spore's.
pub(super) fn is_name(name: &str) -> bool {
    name.strip_prefix(PREFIX)
        .is_some_and(|number| !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit()))
}

/// Opens a new tap whose name the kernel chooses, `spore0` if that is free.
pub(super) fn open() -> Result<Tap, Failure> {
    let flags = libc::O_NONBLOCK | libc::O_CLOEXEC;
    let file = File::options().read(true).write(true).custom_flags(flags).open(DEVICE);
    let file = file.map_err(|error| ("open /dev/net/tun", error))?;
    // SAFETY: ifreq is plain data; all zeroes is valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(format!("{PREFIX}%d").bytes()) {
        *to = from.cast_signed();
    }
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    request.ifr_ifru.ifru_flags = i16::try_from(flags).unwrap_or_default();
    let failed = |what| move |errno: nix::Error| (what, io::Error::from(errno));
    // SAFETY: TUNSETIFF reads an ifreq and writes the name into it; `request` outlives the call,
    // and nothing else refers to it.
    unsafe { set_interface(file.as_raw_fd(), &raw mut request) }.map_err(failed("TUNSETIFF"))?;
    // SAFETY: TUNSETVNETHDRSZ reads one int, which is a constant.
    unsafe { set_header_size(file.as_raw_fd(), &HEADER) }.map_err(failed("TUNSETVNETHDRSZ"))?;
    // SAFETY: TUNSETSNDBUF reads one int, which is a constant.
    unsafe { set_send_buffer(file.as_raw_fd(), &UNDER_WAY) }.map_err(failed("TUNSETSNDBUF"))?;
    let name: Vec<u8> =
        request.ifr_name.iter().map(|byte| byte.cast_unsigned()).take_while(|byte| *byte != 0).collect();
    let name = String::from_utf8_lossy(&name).into_owned();
    let index = nix::net::if_::if_nametoindex(name.as_str()).map_err(failed("look its interface up"))?;
    Ok(Tap { fd: file.into(), name, index })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_taps_are_told_from_others() {
        assert!(is_name("spore0") && is_name("spore17"));
        for other in ["spore", "spore%d", "spores1", "eth0", "sporeA"] {
            assert!(!is_name(other), "{other}");
        }
    }
}
