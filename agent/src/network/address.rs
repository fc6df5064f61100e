//! Addresses and permanent neighbours of a NIC.

use std::net::IpAddr;

use nix::errno::Errno;
use rtnetlink::packet_core::{NLM_F_CREATE, NLM_F_REPLACE};
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::packet_route::address::{
    AddressAttribute, AddressFlags, AddressHeaderFlags, AddressMessage, AddressScope,
};
use rtnetlink::packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourFlags, NeighbourMessage, NeighbourState,
};

use super::config::{Address, Neighbour};
use super::decode::family_of;
use super::netlink::{Netlink, Refusal};

fn message(index: u32, wanted: &Address) -> AddressMessage {
    let mut message = AddressMessage::default();
    message.header.family = family_of(wanted.address);
    message.header.prefix_len = wanted.prefix;
    message.header.scope = AddressScope::from(wanted.scope);
    message.header.index = index;
    let mut flags = AddressFlags::from_bits_retain(wanted.flags);
    if wanted.address.is_ipv6() {
        // The host has done that, and a container must be able to use its address at once.
        flags |= AddressFlags::Nodad;
    }
    message.header.flags = AddressHeaderFlags::from_bits_retain((flags.bits() & 0xff) as u8);
    let attributes = &mut message.attributes;
    attributes.push(AddressAttribute::Local(wanted.address));
    attributes.push(AddressAttribute::Address(wanted.peer.unwrap_or(wanted.address)));
    attributes.push(AddressAttribute::Flags(flags));
    if let Some(broadcast) = wanted.broadcast {
        attributes.push(AddressAttribute::Broadcast(broadcast));
    }
    if !wanted.label.is_empty() && wanted.address.is_ipv4() {
        attributes.push(AddressAttribute::Label(wanted.label.clone()));
    }
    if wanted.metric != 0 {
        attributes.push(AddressAttribute::RoutePriority(wanted.metric));
    }
    message
}

pub async fn add(netlink: &Netlink, index: u32, wanted: &Address) -> Result<(), Refusal> {
    let message = RouteNetlinkMessage::NewAddress(message(index, wanted));
    netlink.request(message, NLM_F_CREATE | NLM_F_REPLACE).await
}

/// Removes an address; one that is not there is none the less gone.
pub async fn remove(netlink: &Netlink, index: u32, unwanted: &Address) -> Result<(), Refusal> {
    let message = RouteNetlinkMessage::DelAddress(message(index, unwanted));
    gone(netlink.request(message, 0).await)
}

pub fn gone(result: Result<(), Refusal>) -> Result<(), Refusal> {
    match result {
        Err(Refusal {
            errno: Errno::EADDRNOTAVAIL | Errno::ESRCH | Errno::ENOENT | Errno::ENODEV, ..
        }) => Ok(()),
        other => other,
    }
}

fn neighbour(index: u32, wanted: &Neighbour) -> NeighbourMessage {
    let mut message = NeighbourMessage::default();
    message.header.family = family_of(wanted.address);
    message.header.ifindex = index;
    message.header.state = NeighbourState::Permanent;
    if wanted.proxy {
        message.header.flags |= NeighbourFlags::Proxy;
    }
    if wanted.router {
        message.header.flags |= NeighbourFlags::Router;
    }
    let address = match wanted.address {
        IpAddr::V4(address) => NeighbourAddress::Inet(address),
        IpAddr::V6(address) => NeighbourAddress::Inet6(address),
    };
    message.attributes.push(NeighbourAttribute::Destination(address));
    if let Some(mac) = wanted.mac {
        message.attributes.push(NeighbourAttribute::LinkLayerAddress(mac.to_vec()));
    }
    message
}

pub async fn add_neighbour(netlink: &Netlink, index: u32, wanted: &Neighbour) -> Result<(), Refusal> {
    let message = RouteNetlinkMessage::NewNeighbour(neighbour(index, wanted));
    netlink.request(message, NLM_F_CREATE | NLM_F_REPLACE).await
}

pub async fn remove_neighbour(netlink: &Netlink, index: u32, unwanted: &Neighbour) -> Result<(), Refusal> {
    let message = RouteNetlinkMessage::DelNeighbour(neighbour(index, unwanted));
    gone(netlink.request(message, 0).await)
}
