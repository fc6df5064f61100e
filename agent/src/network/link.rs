//! NICs: found in the agent's network namespace by their permanent address, moved to the
//! containers' namespace, named and set like the host's interface, and moved back.

use std::fs::File;
use std::os::fd::AsRawFd;

use nix::errno::Errno;
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::packet_route::link::{LinkAttribute, LinkFlags, LinkMessage};
use spore_agent_api::network::slot_of;

use super::config::Interface;
use super::netlink::{Netlink, Refusal};

/// A NIC as the kernel has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Nic {
    pub slot: u8,
    pub index: u32,
    pub name: String,
    mac: Vec<u8>,
    mtu: u32,
    flags: LinkFlags,
}

/// Tells which link is the NIC of which slot.
pub type Recognise = fn(&LinkMessage) -> Option<u8>;

/// By the permanent address, which no driver and no container changes.
pub fn by_permanent_address(link: &LinkMessage) -> Option<u8> {
    link.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::PermAddress(mac) => slot_of(mac),
        _ => None,
    })
}

/// The NICs of a namespace.
pub async fn list(netlink: &Netlink, recognise: Recognise) -> Result<Vec<Nic>, Refusal> {
    let links = netlink.dump(RouteNetlinkMessage::GetLink(LinkMessage::default())).await?;
    Ok(links
        .into_iter()
        .filter_map(|message| match message {
            RouteNetlinkMessage::NewLink(link) => nic(&link, recognise(&link)?),
            _ => None,
        })
        .collect())
}

fn nic(link: &LinkMessage, slot: u8) -> Option<Nic> {
    let (mut name, mut mac, mut mtu) = (None, Vec::new(), 0);
    for attribute in &link.attributes {
        match attribute {
            LinkAttribute::IfName(found) => name = Some(found.clone()),
            LinkAttribute::Address(found) => mac.clone_from(found),
            LinkAttribute::Mtu(found) => mtu = *found,
            _ => {}
        }
    }
    Some(Nic { slot, index: link.header.index, name: name?, mac, mtu, flags: link.header.flags })
}

fn change(index: u32) -> LinkMessage {
    let mut message = LinkMessage::default();
    message.header.index = index;
    message
}

async fn set(netlink: &Netlink, message: LinkMessage) -> Result<(), Refusal> {
    netlink.request(RouteNetlinkMessage::SetLink(message), 0).await
}

/// Moves a NIC to another namespace under a name that nothing there has; its addresses, routes and
/// settings stay behind.
pub async fn move_to(netlink: &Netlink, nic: &Nic, namespace: &File, name: &str) -> Result<(), Refusal> {
    let mut message = change(nic.index);
    message.attributes.push(LinkAttribute::IfName(name.to_owned()));
    message.attributes.push(LinkAttribute::NetNsFd(namespace.as_raw_fd()));
    set(netlink, message).await
}

/// A name that the NIC has as long as it has none of the host's.
pub fn spare_name(slot: u8) -> String {
    format!("spore{slot}")
}

/// What could not be set, and why.
pub type Failure = (&'static str, Refusal);

/// Gives a NIC the interface's name, address and MTU. It is down afterwards if its name or address
/// was another: not every driver and kernel changes them of one that is up.
pub async fn shape(netlink: &Netlink, nic: &Nic, wanted: &Interface) -> Result<(), Failure> {
    let renamed = nic.name != wanted.name;
    let readdressed = nic.mac != wanted.mac;
    let arp = nic.flags.contains(LinkFlags::Noarp) == wanted.no_arp;
    if nic.flags.contains(LinkFlags::Up) && (renamed || readdressed || !wanted.up) {
        set_up(netlink, nic.index, false).await.map_err(|error| ("set down", error))?;
    }
    if renamed {
        let mut message = change(nic.index);
        message.attributes.push(LinkAttribute::IfName(wanted.name.clone()));
        set(netlink, message).await.map_err(|error| ("rename", error))?;
    }
    if readdressed {
        let mut message = change(nic.index);
        message.attributes.push(LinkAttribute::Address(wanted.mac.to_vec()));
        set(netlink, message).await.map_err(|error| ("set its Ethernet address", error))?;
    }
    if nic.mtu != wanted.mtu {
        let mut message = change(nic.index);
        message.attributes.push(LinkAttribute::Mtu(wanted.mtu));
        set(netlink, message).await.map_err(|error| ("set its MTU", error))?;
    }
    if !arp {
        let mut message = change(nic.index);
        message.header.change_mask = LinkFlags::Noarp;
        message.header.flags = if wanted.no_arp { LinkFlags::Noarp } else { LinkFlags::empty() };
        set(netlink, message).await.map_err(|error| ("switch ARP", error))?;
    }
    Ok(())
}

pub async fn set_up(netlink: &Netlink, index: u32, up: bool) -> Result<(), Refusal> {
    let mut message = change(index);
    message.header.change_mask = LinkFlags::Up;
    message.header.flags = if up { LinkFlags::Up } else { LinkFlags::empty() };
    set(netlink, message).await
}

/// Gives way: another interface gets the name that this one has.
pub async fn set_aside(netlink: &Netlink, nic: &Nic) -> Result<(), Refusal> {
    set_up(netlink, nic.index, false).await?;
    let mut message = change(nic.index);
    message.attributes.push(LinkAttribute::IfName(spare_name(nic.slot)));
    set(netlink, message).await
}

/// Writes the interface's settings, those that differ; for a thread in its namespace. A family
/// that the kernel lacks has none.
pub fn write_sysctls(interface: &Interface) -> Vec<String> {
    let mut problems = Vec::new();
    // The link-local address is the host's, like all others; the kernel's own would be checked for
    // duplicates first.
    let own_addresses = ("ipv6/addr_gen_mode".to_owned(), "1".to_owned());
    for (key, value) in interface.sysctls.iter().chain([&own_addresses]) {
        let Some((family, setting)) = key.split_once('/') else { continue };
        let path = format!("/proc/sys/net/{family}/conf/{}/{setting}", interface.name);
        let written = match std::fs::read_to_string(&path) {
            Ok(present) if present.trim() == value => Ok(()),
            Ok(_) => std::fs::write(&path, value),
            Err(error) => Err(error),
        };
        match written {
            Err(error) if error.raw_os_error() == Some(Errno::ENOENT as i32) => {}
            Err(error) => {
                problems.push(format!("interface {}: setting {key} = {value}: {error}", interface.name));
            }
            Ok(()) => {}
        }
    }
    problems
}
