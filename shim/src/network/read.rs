//! Reads what belongs to the joined interfaces: addresses, neighbours, routes, policy rules,
//! settings. What the guest's kernel makes by itself from these is left out.

use std::collections::BTreeMap;
use std::net::IpAddr;

use rtnetlink::packet_route::address::{AddressAttribute, AddressFlags, AddressMessage};
use rtnetlink::packet_route::link::LinkFlags;
use rtnetlink::packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourFlags, NeighbourMessage, NeighbourState,
};
use rtnetlink::packet_route::{AddressFamily, RouteNetlinkMessage};
use spore_agent_api::network::{MAX_ADDRESSES, MAX_NEIGHBOURS, SYSCTLS};

use super::error::NetworkError;
use super::links::Link;
use super::mirror::{Address, Interface, Neighbour, Route};
use super::netlink::Netlink;

/// Which link is in which slot: index and slot.
pub(super) type Slots = [(u32, u8)];

pub(super) fn slot_of(slots: &Slots, index: u32) -> Option<u8> {
    slots.iter().find(|(of, _)| *of == index).map(|(_, slot)| *slot)
}

/// What could not be mirrored goes here; the rest is.
pub(super) type Refused = Vec<NetworkError>;

pub(super) async fn dump(
    netlink: &Netlink,
    operation: &'static str,
    request: RouteNetlinkMessage,
) -> Result<Vec<RouteNetlinkMessage>, NetworkError> {
    netlink.dump(request).await.map_err(|refusal| NetworkError::Netlink { operation, refusal })
}

pub(super) fn too_many<T>(what: &'static str, list: &[T], max: usize) -> Result<(), NetworkError> {
    let found = list.len();
    if found > max { Err(NetworkError::TooMany { what, found, max }) } else { Ok(()) }
}

/// An address and the link that has it.
#[derive(Debug)]
pub(super) struct Found {
    pub(super) index: u32,
    pub(super) address: Address,
    flags: AddressFlags,
}

impl Found {
    /// Somebody gave it, as opposed to the kernel.
    pub(super) fn is_given(&self) -> bool {
        let link_local =
            matches!(self.address.address, IpAddr::V6(address) if address.is_unicast_link_local());
        !link_local && !self.is_autoconfigured()
    }

    /// Made of a router's advertisement, as the guest's kernel makes its own.
    fn is_autoconfigured(&self) -> bool {
        self.address.address.is_ipv6() && !self.flags.contains(AddressFlags::Permanent)
    }
}

/// Addresses of all links.
pub(super) async fn addresses(netlink: &Netlink) -> Result<Vec<Found>, NetworkError> {
    let request = RouteNetlinkMessage::GetAddress(AddressMessage::default());
    let found = dump(netlink, "list its addresses", request).await?;
    Ok(found
        .into_iter()
        .filter_map(|message| match message {
            RouteNetlinkMessage::NewAddress(message) => address(message),
            _ => None,
        })
        .collect())
}

fn address(message: AddressMessage) -> Option<Found> {
    let (mut local, mut other, mut broadcast) = (None, None, None);
    let (mut label, mut metric) = (String::new(), 0);
    let mut flags = AddressFlags::from_bits_retain(message.header.flags.bits().into());
    for attribute in message.attributes {
        match attribute {
            AddressAttribute::Local(address) => local = Some(address),
            AddressAttribute::Address(address) => other = Some(address),
            AddressAttribute::Broadcast(address) => broadcast = Some(address.into()),
            AddressAttribute::Label(found) => label = found,
            AddressAttribute::Flags(found) => flags = found,
            AddressAttribute::RoutePriority(found) => metric = found,
            _ => {}
        }
    }
    // With a peer, IFA_ADDRESS is the peer's.
    let address = local.or(other)?;
    let kept = AddressFlags::Noprefixroute | AddressFlags::Mcautojoin | AddressFlags::Homeaddress;
    let address = Address {
        address,
        prefix: message.header.prefix_len,
        scope: message.header.scope.into(),
        flags: (flags & kept).bits(),
        peer: other.filter(|other| *other != address),
        broadcast,
        label,
        metric,
    };
    Some(Found { index: message.header.index, address, flags })
}

/// The joined links as interfaces of the guest, without those settings that a thread in the
/// namespace reads.
pub(super) fn interfaces(
    links: &[&Link],
    slots: &Slots,
    found: &[Found],
    refused: &mut Refused,
) -> Result<Vec<Interface>, NetworkError> {
    let mut interfaces = Vec::new();
    for link in links {
        let Some(slot) = slot_of(slots, link.index) else { continue };
        let mut addresses = Vec::new();
        for found in found.iter().filter(|found| found.index == link.index && !found.is_autoconfigured()) {
            if found.flags.contains(AddressFlags::Dadfailed) {
                let address = found.address.address.to_string();
                refused.push(NetworkError::Duplicate { name: link.name.clone(), address });
                continue;
            }
            let mut address = found.address.clone();
            if address.label == link.name {
                address.label.clear();
            }
            addresses.push(address);
        }
        too_many("addresses of an interface", &addresses, MAX_ADDRESSES)?;
        interfaces.push(Interface {
            slot,
            name: link.name.clone(),
            mac: link.mac.clone(),
            mtu: link.mtu,
            up: link.flags.contains(LinkFlags::Up),
            no_arp: link.flags.contains(LinkFlags::Noarp),
            addresses,
            neighbours: Vec::new(),
            sysctls: BTreeMap::new(),
        });
    }
    Ok(interfaces)
}

/// Adds the neighbours that somebody entered.
pub(super) async fn neighbours(
    netlink: &Netlink,
    slots: &Slots,
    interfaces: &mut [Interface],
) -> Result<(), NetworkError> {
    for proxies in [false, true] {
        let mut request = NeighbourMessage::default();
        if proxies {
            request.header.flags = NeighbourFlags::Proxy;
        }
        let request = RouteNetlinkMessage::GetNeighbour(request);
        for message in dump(netlink, "list its neighbours", request).await? {
            let RouteNetlinkMessage::NewNeighbour(message) = message else { continue };
            let slot = slot_of(slots, message.header.ifindex);
            let interface = interfaces.iter_mut().find(|interface| Some(interface.slot) == slot);
            if let Some((interface, neighbour)) = interface.zip(neighbour(&message, proxies)) {
                interface.neighbours.push(neighbour);
            }
        }
    }
    for interface in interfaces {
        too_many("neighbours of an interface", &interface.neighbours, MAX_NEIGHBOURS)?;
    }
    Ok(())
}

fn neighbour(message: &NeighbourMessage, proxy: bool) -> Option<Neighbour> {
    if !proxy && message.header.state != NeighbourState::Permanent {
        return None;
    }
    let (mut address, mut mac) = (None, Vec::new());
    for attribute in &message.attributes {
        match attribute {
            NeighbourAttribute::Destination(NeighbourAddress::Inet(found)) => address = Some((*found).into()),
            NeighbourAttribute::Destination(NeighbourAddress::Inet6(found)) => {
                address = Some((*found).into())
            }
            NeighbourAttribute::LinkLayerAddress(found) if !proxy => mac.clone_from(found),
            _ => {}
        }
    }
    let router = message.header.flags.contains(NeighbourFlags::Router);
    let neighbour = Neighbour { address: address?, mac, proxy, router };
    (proxy || neighbour.mac.len() == 6).then_some(neighbour)
}

/// Adds the settings; for a thread in the namespace. A family that the kernel lacks has none.
pub(super) fn sysctls(interfaces: &mut [Interface]) {
    for interface in interfaces {
        for setting in SYSCTLS {
            let Some((family, key)) = setting.split_once('/') else { continue };
            let path = format!("/proc/sys/net/{family}/conf/{}/{key}", interface.name);
            if let Ok(value) = std::fs::read_to_string(path) {
                interface.sysctls.insert(setting.to_owned(), value.trim().to_owned());
            }
        }
    }
}

/// Finds, for each address, the route to its prefix that the kernel made: it goes from the list, for the
/// guest's kernel makes it too. An address without one says so.
pub(super) fn imply_prefix_routes(interfaces: &mut [Interface], routes: &mut Vec<Route>) {
    for interface in interfaces.iter_mut().filter(|interface| interface.up) {
        for address in &mut interface.addresses {
            let network = network(address.peer.unwrap_or(address.address), address.prefix);
            let made = |route: &Route| {
                is_kernels(route)
                    && route.destination == Some(network)
                    && route.destination_prefix == address.prefix
                    && matches!(route.next_hops.as_slice(), [hop] if hop.slot == Some(interface.slot))
                    && route.preferred_source.is_none_or(|source| source == address.address)
            };
            match routes.iter().find(|route| made(route)) {
                Some(route) => {
                    let usual = if route.ipv6 { 256 } else { 0 };
                    address.metric = if route.metric == usual { 0 } else { route.metric };
                }
                None => address.flags |= AddressFlags::Noprefixroute.bits(),
            }
        }
    }
    let made_by_address = |route: &Route| {
        let of = |interface: &Interface| {
            matches!(route.next_hops.as_slice(), [hop] if hop.slot == Some(interface.slot))
                && interface.addresses.iter().any(|address| {
                    let network = network(address.peer.unwrap_or(address.address), address.prefix);
                    route.destination == Some(network)
                        && route.destination_prefix == address.prefix
                        && route.preferred_source.is_none_or(|source| source == address.address)
                })
        };
        is_kernels(route) && interfaces.iter().any(of)
    };
    // IPv6's others of the kernel belong to addresses that a router advertised.
    routes.retain(|route| !(made_by_address(route) || is_kernels(route) && route.ipv6));
}

fn is_kernels(route: &Route) -> bool {
    const RTPROT_KERNEL: u8 = 2;
    const RT_TABLE_MAIN: u32 = 254;
    route.protocol == RTPROT_KERNEL && route.table == RT_TABLE_MAIN
}

/// The first address of a prefix.
fn network(address: IpAddr, prefix: u8) -> IpAddr {
    match address {
        IpAddr::V4(address) => {
            let mask = u32::MAX.checked_shl(32 - u32::from(prefix.min(32))).unwrap_or(0);
            IpAddr::V4((u32::from(address) & mask).into())
        }
        IpAddr::V6(address) => {
            let mask = u128::MAX.checked_shl(128 - u32::from(prefix.min(128))).unwrap_or(0);
            IpAddr::V6((u128::from(address) & mask).into())
        }
    }
}

pub(super) const FAMILIES: [AddressFamily; 2] = [AddressFamily::Inet, AddressFamily::Inet6];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prefixes_of_every_length_have_a_first_address() {
        let first = |address: &str, prefix| network(address.parse().unwrap(), prefix).to_string();
        assert_eq!(first("10.1.2.3", 24), "10.1.2.0");
        assert_eq!(first("10.1.2.3", 32), "10.1.2.3");
        assert_eq!(first("10.1.2.3", 0), "0.0.0.0");
        assert_eq!(first("fd00::1:2", 64), "fd00::");
        assert_eq!(first("fd00::1:2", 128), "fd00::1:2");
        assert_eq!(first("fd00::1:2", 0), "::");
    }
}
