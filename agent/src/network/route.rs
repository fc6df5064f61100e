//! Routes.

use std::net::IpAddr;

use nix::errno::Errno;
use rtnetlink::packet_core::NlaBuffer;
use rtnetlink::packet_core::{Emitable, NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE, Parseable};
use rtnetlink::packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteMetric, RouteNextHop,
    RouteNextHopFlags, RoutePreference, RouteProtocol, RouteScope, RouteType, RouteVia,
};
use rtnetlink::packet_route::{AddressFamily, RouteNetlinkMessage};

use super::address::gone;
use super::config::{NextHop, Route};
use super::decode::family_of;
use super::netlink::{Netlink, Refusal};

/// Index of the loopback interface: the first of every namespace.
const LOOPBACK: u32 = 1;

/// Finds the index of the interface in a slot.
pub type Index<'a> = &'a dyn Fn(u8) -> Option<u32>;

/// The message of a route, unless one of its interfaces is missing.
fn message(wanted: &Route, index: Index<'_>) -> Option<RouteMessage> {
    let mut message = RouteMessage::default();
    let header = &mut message.header;
    header.address_family = wanted.family;
    header.destination_prefix_length = wanted.destination.length;
    header.source_prefix_length = wanted.source.length;
    header.tos = wanted.tos;
    header.table = u8::try_from(wanted.table).unwrap_or(RouteHeader::RT_TABLE_UNSPEC);
    header.protocol = RouteProtocol::from(wanted.protocol);
    header.scope = RouteScope::from(wanted.scope);
    header.kind = RouteType::from(wanted.kind);
    let attributes = &mut message.attributes;
    attributes.push(RouteAttribute::Table(wanted.table));
    if let Some(address) = wanted.destination.address {
        attributes.push(RouteAttribute::Destination(address.into()));
    }
    if let Some(address) = wanted.source.address {
        attributes.push(RouteAttribute::Source(address.into()));
    }
    if let Some(address) = wanted.preferred_source {
        attributes.push(RouteAttribute::PrefSource(address.into()));
    }
    if wanted.metric != 0 {
        attributes.push(RouteAttribute::Priority(wanted.metric));
    }
    if !wanted.metrics.is_empty() {
        attributes.push(RouteAttribute::Metrics(wanted.metrics.iter().filter_map(metric).collect()));
    }
    if wanted.family == AddressFamily::Inet6 && wanted.preference != 0 {
        attributes.push(RouteAttribute::Preference(RoutePreference::from(wanted.preference)));
    }
    match wanted.next_hops.as_slice() {
        [] => {}
        [hop] => {
            attributes.push(RouteAttribute::Oif(interface(hop, index)?));
            attributes.extend(gateway(wanted.family, hop));
            if hop.onlink {
                message.header.flags |= RouteFlags::Onlink;
            }
        }
        hops => {
            let hops = hops.iter().map(|hop| {
                let mut next = RouteNextHop::default();
                next.interface_index = interface(hop, index)?;
                next.hops = hop.hops;
                next.attributes.extend(gateway(wanted.family, hop));
                if hop.onlink {
                    next.flags |= RouteNextHopFlags::Onlink;
                }
                Some(next)
            });
            attributes.push(RouteAttribute::MultiPath(hops.collect::<Option<_>>()?));
        }
    }
    Some(message)
}

fn interface(hop: &NextHop, index: Index<'_>) -> Option<u32> {
    hop.slot.map_or(Some(LOOPBACK), index)
}

fn gateway(family: AddressFamily, hop: &NextHop) -> Option<RouteAttribute> {
    let gateway = hop.gateway?;
    if family_of(gateway) == family {
        return Some(RouteAttribute::Gateway(RouteAddress::from(gateway)));
    }
    Some(RouteAttribute::Via(match gateway {
        IpAddr::V4(gateway) => RouteVia::Inet(gateway),
        IpAddr::V6(gateway) => RouteVia::Inet6(gateway),
    }))
}

/// The library's name for a metric's number.
fn metric(&(kind, value): &(u16, u32)) -> Option<RouteMetric> {
    let mut bytes = [0; 8];
    bytes[..2].copy_from_slice(&8u16.to_ne_bytes());
    bytes[2..4].copy_from_slice(&kind.to_ne_bytes());
    bytes[4..].copy_from_slice(&value.to_ne_bytes());
    let parsed = RouteMetric::parse(&NlaBuffer::new_checked(&bytes[..]).ok()?).ok()?;
    (parsed.buffer_len() == bytes.len()).then_some(parsed)
}

/// Those that need no other route first.
pub fn in_order(routes: &[Route]) -> Vec<&Route> {
    let through_gateway = |route: &&Route| route.next_hops.iter().any(|hop| hop.gateway.is_some());
    let mut ordered: Vec<_> = routes.iter().collect();
    ordered.sort_by_key(through_gateway);
    ordered
}

/// Adds a route, or makes one to the same destination what it shall be.
pub async fn add(netlink: &Netlink, wanted: &Route, index: Index<'_>) -> Result<(), Refusal> {
    let Some(message) = message(wanted, index) else {
        let words = "its interface is missing".into();
        return Err(Refusal { errno: Errno::ENODEV, words });
    };
    let request = RouteNetlinkMessage::NewRoute(message);
    match netlink.request(request.clone(), NLM_F_CREATE | NLM_F_EXCL).await {
        Err(Refusal { errno: Errno::EEXIST, .. }) => {
            netlink.request(request, NLM_F_CREATE | NLM_F_REPLACE).await
        }
        other => other,
    }
}

pub async fn remove(netlink: &Netlink, unwanted: &Route, index: Index<'_>) -> Result<(), Refusal> {
    match message(unwanted, index) {
        Some(message) => gone(netlink.request(RouteNetlinkMessage::DelRoute(message), 0).await),
        // It has gone with its interface.
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::network::tests::support::{default_route, link_route};

    #[test]
    fn gateways_come_after_the_routes_to_them() {
        let routes = [default_route("10.1.1.1"), link_route("10.1.1.1", 32)];
        let ordered: Vec<_> = in_order(&routes).iter().map(ToString::to_string).collect();
        assert_eq!(ordered, ["10.1.1.1/32", "default via 10.1.1.1"]);
    }

    #[test]
    fn a_message_has_what_the_route_has() {
        let mut route = default_route("10.1.1.1");
        route.metrics = vec![(2, 1400), (8, 1360), (9999, 1)];
        route.table = 1000;
        let message = message(&route, &|slot| Some(u32::from(slot) + 7)).unwrap();
        assert_eq!(message.header.table, 0, "a large table is told by its attribute alone");
        for wanted in [
            RouteAttribute::Table(1000),
            RouteAttribute::Oif(7),
            RouteAttribute::Gateway(RouteAddress::Inet([10, 1, 1, 1].into())),
        ] {
            assert!(message.attributes.contains(&wanted), "{wanted:?}: {message:?}");
        }
        let metrics = message.attributes.iter().find_map(|attribute| match attribute {
            RouteAttribute::Metrics(metrics) => Some(metrics.clone()),
            _ => None,
        });
        assert_eq!(metrics.unwrap()[..2], [RouteMetric::Mtu(1400), RouteMetric::Advmss(1360)]);
    }

    #[test]
    fn a_gateway_of_the_other_family_and_a_missing_interface_are_seen() {
        let mut route = default_route("10.1.1.1");
        route.next_hops[0].gateway = Some("fe80::1".parse().unwrap());
        let message_of = |route: &Route| message(route, &|slot| (slot == 0).then_some(3));
        let via = RouteAttribute::Via(RouteVia::Inet6("fe80::1".parse().unwrap()));
        assert!(message_of(&route).unwrap().attributes.contains(&via));
        route.next_hops[0].slot = Some(1);
        assert_eq!(message_of(&route), None);
    }
}
