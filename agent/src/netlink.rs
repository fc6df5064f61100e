//! The kernel's ACPI events, by generic netlink: how a guest learns that its power button was
//! pressed. Needs no device node and no input driver.
//!
//! Specification: Documentation/netlink/genetlink-legacy and include/linux/acpi: family
//! "acpi_event", multicast group "acpi_mc_group", one attribute with
//! `struct acpi_genl_event { char device_class[20]; char bus_id[15]; u32 type, data; }`.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, send, socket,
};
use tokio::io::unix::AsyncFd;

use crate::stdio::pump;

const FAMILY: &[u8] = b"acpi_event\0";
const GROUP: &[u8] = b"acpi_mc_group";
const BUTTON: &[u8] = b"button/power";

const GENL_ID_CTRL: u16 = 0x10;
const CTRL_CMD_GETFAMILY: u8 = 3;
const CTRL_ATTR_FAMILY_NAME: u16 = 2;
const CTRL_ATTR_MCAST_GROUPS: u16 = 7;
const CTRL_ATTR_MCAST_GRP_NAME: u16 = 1;
const CTRL_ATTR_MCAST_GRP_ID: u16 = 2;
const ACPI_GENL_ATTR_EVENT: u16 = 1;
const NLM_F_REQUEST: u16 = 1;
const HEADER: usize = 20; // nlmsghdr and genlmsghdr
const ATTRIBUTE_TYPE: u16 = 0x3fff;

/// Events of the kernel's ACPI layer.
pub struct AcpiEvents {
    socket: AsyncFd<OwnedFd>,
}

impl AcpiEvents {
    /// Subscribes. Fails when the kernel has no ACPI.
    pub fn open() -> io::Result<Self> {
        let flags = SockFlag::SOCK_CLOEXEC;
        let socket = socket(AddressFamily::Netlink, SockType::Raw, flags, SockProtocol::NetlinkGeneric)?;
        bind(socket.as_raw_fd(), &NetlinkAddr::new(0, 0))?;
        send(socket.as_raw_fd(), &get_family(), MsgFlags::empty())?;
        let mut answer = [0; 4096];
        let length = recv(socket.as_raw_fd(), &mut answer, MsgFlags::empty())?;
        let group = group_id(&answer[..length])
            .ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, "the kernel has no ACPI events"))?;
        join(&socket, group)?;
        Ok(Self { socket: pump::watch(socket)? })
    }

    /// Returns when the power button was pressed.
    pub async fn power_button(&self) -> io::Result<()> {
        let mut event = [0; 1024];
        loop {
            let length = pump::read_some(&self.socket, &mut event).await?;
            if is_power_button(&event[..length]) {
                return Ok(());
            }
        }
    }
}

#[allow(unsafe_code)] // nix has no NETLINK_ADD_MEMBERSHIP.
fn join(socket: &OwnedFd, group: u32) -> io::Result<()> {
    let length = libc::socklen_t::try_from(size_of::<u32>()).map_err(io::Error::other)?;
    // SAFETY: `group` is the u32 that the option reads.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_NETLINK,
            libc::NETLINK_ADD_MEMBERSHIP,
            (&raw const group).cast(),
            length,
        )
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn get_family() -> Vec<u8> {
    let attribute = 4 + FAMILY.len();
    let total = HEADER + attribute.next_multiple_of(4);
    let mut message = Vec::with_capacity(total);
    // Both are a few dozen bytes.
    message.extend_from_slice(&u32::try_from(total).unwrap_or(0).to_ne_bytes());
    message.extend_from_slice(&GENL_ID_CTRL.to_ne_bytes());
    message.extend_from_slice(&NLM_F_REQUEST.to_ne_bytes());
    message.extend_from_slice(&[0; 8]); // sequence, port
    message.extend_from_slice(&[CTRL_CMD_GETFAMILY, 1, 0, 0]);
    message.extend_from_slice(&u16::try_from(attribute).unwrap_or(0).to_ne_bytes());
    message.extend_from_slice(&CTRL_ATTR_FAMILY_NAME.to_ne_bytes());
    message.extend_from_slice(FAMILY);
    message.resize(total, 0);
    message
}

fn group_id(answer: &[u8]) -> Option<u32> {
    let groups = find(answer.get(HEADER..)?, CTRL_ATTR_MCAST_GROUPS)?;
    attributes(groups).find_map(|(_, group)| {
        let name = find(group, CTRL_ATTR_MCAST_GRP_NAME)?;
        if !name.starts_with(GROUP) {
            return None;
        }
        let id = find(group, CTRL_ATTR_MCAST_GRP_ID)?;
        Some(u32::from_ne_bytes(id.get(..4)?.try_into().ok()?))
    })
}

fn is_power_button(message: &[u8]) -> bool {
    let attributes = message.get(HEADER..).unwrap_or_default();
    find(attributes, ACPI_GENL_ATTR_EVENT).is_some_and(|event| event.starts_with(BUTTON))
}

fn find(bytes: &[u8], kind: u16) -> Option<&[u8]> {
    attributes(bytes).find(|(found, _)| *found == kind).map(|(_, value)| value)
}

/// Netlink attributes: length u16 (with header), type u16, value, padded to 4 bytes.
fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let length = usize::from(u16::from_ne_bytes([*bytes.first()?, *bytes.get(1)?]));
        let kind = u16::from_ne_bytes([*bytes.get(2)?, *bytes.get(3)?]) & ATTRIBUTE_TYPE;
        let value = bytes.get(4..length)?;
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, value))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::new();
        bytes.extend_from_slice(&u16::try_from(4 + value.len()).unwrap().to_ne_bytes());
        bytes.extend_from_slice(&kind.to_ne_bytes());
        bytes.extend_from_slice(value);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    }

    #[test]
    fn the_group_is_found_in_the_familys_description() {
        let other = [attribute(1, b"other\0"), attribute(2, &9u32.to_ne_bytes())].concat();
        let ours = [attribute(1, b"acpi_mc_group\0"), attribute(2, &5u32.to_ne_bytes())].concat();
        let groups = [attribute(1, &other), attribute(2, &ours)].concat();
        let mut answer = vec![0; HEADER];
        answer.extend(attribute(2, FAMILY));
        answer.extend(attribute(CTRL_ATTR_MCAST_GROUPS | 0x8000, &groups));
        assert_eq!(group_id(&answer), Some(5));
        assert_eq!(group_id(&answer[..30]), None);
        assert_eq!(group_id(&[]), None);
    }

    #[test]
    fn only_the_power_button_counts() {
        let event = |class: &[u8]| [vec![0; HEADER], attribute(ACPI_GENL_ATTR_EVENT, class)].concat();
        assert!(is_power_button(&event(b"button/power\0PNP0C0C:00")));
        assert!(!is_power_button(&event(b"button/lid\0")));
        assert!(!is_power_button(&[0; 7]));
    }
}
