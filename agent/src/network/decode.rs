//! From an Update's messages to [`Config`]: every number in its range, every list within its limit,
//! no name that leads out of `/proc/sys/net`.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use rtnetlink::packet_route::AddressFamily;
use spore_agent_api::network::{
    MAX_ADDRESSES, MAX_NEIGHBOURS, MAX_NEXT_HOPS, MAX_ROUTES, MAX_RULES, MAX_SLOTS, MAX_SYSCTLS, SYSCTLS,
    is_name,
};
use spore_agent_api::v1::network as pb;

use super::config::{Address, Config, Interface, Neighbour, NextHop, Prefix, Route, Rule};
use crate::error::{AgentError, Result};

fn invalid(what: impl std::fmt::Display) -> AgentError {
    AgentError::InvalidArgument(format!("network: {what}"))
}

/// Checks a list's length before anything is made of it.
fn at_most<T>(what: &str, list: &[T], max: usize) -> Result<()> {
    let found = list.len();
    if found > max { Err(invalid(format!("{found} {what}, at most {max} are allowed"))) } else { Ok(()) }
}

fn number<T: TryFrom<u32>>(what: &str, value: u32) -> Result<T> {
    T::try_from(value).map_err(|_| invalid(format!("{what} {value} is out of range")))
}

pub fn config(request: pb::NetworkRequest) -> Result<Config> {
    at_most("interfaces", &request.interfaces, MAX_SLOTS.into())?;
    at_most("routes", &request.routes, MAX_ROUTES)?;
    at_most("policy rules", &request.rules, MAX_RULES)?;
    let mut interfaces: Vec<Interface> = Vec::new();
    for wanted in request.interfaces {
        let interface = interface(wanted)?;
        if let Some(other) =
            interfaces.iter().find(|other| other.slot == interface.slot || other.name == interface.name)
        {
            let (slot, name) = (other.slot, &other.name);
            return Err(invalid(format!("interface {name} in slot {slot}: its name or slot is there twice")));
        }
        interfaces.push(interface);
    }
    let known = |slot: u8| interfaces.iter().any(|interface| interface.slot == slot);
    let routes: Vec<Route> = request.routes.into_iter().map(route).collect::<Result<_>>()?;
    for route in &routes {
        if let Some(slot) = route.next_hops.iter().filter_map(|hop| hop.slot).find(|slot| !known(*slot)) {
            return Err(invalid(format!("route {route}: there is no interface in slot {slot}")));
        }
    }
    let rules = request.rules.into_iter().map(rule).collect::<Result<_>>()?;
    Ok(Config { interfaces, routes, rules, name_server: request.name_server })
}

fn interface(wanted: pb::Interface) -> Result<Interface> {
    let name = wanted.name;
    if !is_name(&name) {
        return Err(invalid(format!("interface {name:?}: the kernel takes no such name")));
    }
    let of = |what: &str| format!("interface {name}: {what}");
    let slot = u8::try_from(wanted.slot).ok().filter(|slot| *slot < MAX_SLOTS);
    let slot = slot.ok_or_else(|| {
        invalid(format!("interface {name}: slot {}, allowed is 0 to {}", wanted.slot, MAX_SLOTS - 1))
    })?;
    let mac = mac(&wanted.mac).map_err(|what| invalid(of(&what)))?;
    if mac[0] & 1 != 0 || mac == [0; 6] {
        return Err(invalid(of("its address is a group's, or none")));
    }
    at_most(&of("addresses"), &wanted.addresses, MAX_ADDRESSES)?;
    at_most(&of("neighbours"), &wanted.neighbours, MAX_NEIGHBOURS)?;
    if wanted.sysctls.len() > MAX_SYSCTLS {
        return Err(invalid(of("too many settings")));
    }
    let mut sysctls: Vec<_> = wanted.sysctls.into_iter().collect();
    sysctls.sort();
    for (key, value) in &sysctls {
        let plain = value.bytes().all(|byte| byte.is_ascii_digit() || byte == b'-');
        if !SYSCTLS.contains(&key.as_str()) || !plain || value.is_empty() || value.len() > 11 {
            return Err(invalid(format!("interface {name}: setting {key:?} = {value:?} is not allowed")));
        }
    }
    Ok(Interface {
        slot,
        mac,
        mtu: wanted.mtu,
        up: wanted.up,
        no_arp: wanted.no_arp,
        addresses: wanted.addresses.into_iter().map(address).collect::<Result<_>>()?,
        neighbours: wanted.neighbours.into_iter().map(neighbour).collect::<Result<_>>()?,
        sysctls,
        name,
    })
}

fn mac(bytes: &[u8]) -> std::result::Result<[u8; 6], String> {
    bytes.try_into().map_err(|_| format!("an Ethernet address of {} bytes, six are needed", bytes.len()))
}

fn ip(what: &str, bytes: &[u8]) -> Result<IpAddr> {
    let wrong = || invalid(format!("{what}: an address of {} bytes, 4 or 16 are needed", bytes.len()));
    match bytes.len() {
        4 => Ok(Ipv4Addr::from(<[u8; 4]>::try_from(bytes).map_err(|_| wrong())?).into()),
        16 => Ok(Ipv6Addr::from(<[u8; 16]>::try_from(bytes).map_err(|_| wrong())?).into()),
        _ => Err(wrong()),
    }
}

fn optional_ip(what: &str, bytes: &[u8]) -> Result<Option<IpAddr>> {
    if bytes.is_empty() { Ok(None) } else { ip(what, bytes).map(Some) }
}

/// The length of a prefix, within the family's.
fn length(what: &str, family: AddressFamily, length: u32) -> Result<u8> {
    let most = if family == AddressFamily::Inet6 { 128 } else { 32 };
    match u8::try_from(length) {
        Ok(length) if length <= most => Ok(length),
        _ => Err(invalid(format!("{what}: a prefix of {length} bits, at most {most} are allowed"))),
    }
}

pub fn family_of(address: IpAddr) -> AddressFamily {
    if address.is_ipv6() { AddressFamily::Inet6 } else { AddressFamily::Inet }
}

fn address(wanted: pb::Address) -> Result<Address> {
    let address = ip("address", &wanted.address)?;
    let broadcast = match optional_ip("broadcast", &wanted.broadcast)? {
        None => None,
        Some(IpAddr::V4(broadcast)) if address.is_ipv4() => Some(broadcast),
        Some(other) => return Err(invalid(format!("address {address}: broadcast {other} cannot be"))),
    };
    let peer = optional_ip("peer", &wanted.peer)?;
    if peer.is_some_and(|peer| peer.is_ipv6() != address.is_ipv6()) {
        return Err(invalid(format!("address {address}: its peer is of another family")));
    }
    if wanted.label.len() > spore_agent_api::network::MAX_NAME || wanted.label.contains('\0') {
        return Err(invalid(format!("address {address}: label {:?} is too long", wanted.label)));
    }
    Ok(Address {
        prefix: length(&format!("address {address}"), family_of(address), wanted.prefix)?,
        scope: number("scope", wanted.scope)?,
        flags: wanted.flags,
        peer,
        broadcast,
        label: wanted.label,
        metric: wanted.metric,
        address,
    })
}

fn neighbour(wanted: pb::Neighbour) -> Result<Neighbour> {
    let address = ip("neighbour", &wanted.address)?;
    let mac = match wanted.mac.is_empty() {
        true => None,
        false => Some(mac(&wanted.mac).map_err(|what| invalid(format!("neighbour {address}: {what}")))?),
    };
    if mac.is_none() != wanted.proxy {
        return Err(invalid(format!("neighbour {address}: either a proxy entry or one with an address")));
    }
    Ok(Neighbour { address, mac, proxy: wanted.proxy, router: wanted.router })
}

fn family(family: protobuf::EnumOrUnknown<pb::Family>) -> Result<AddressFamily> {
    match family.enum_value() {
        Ok(pb::Family::FAMILY_IPV4) => Ok(AddressFamily::Inet),
        Ok(pb::Family::FAMILY_IPV6) => Ok(AddressFamily::Inet6),
        _ => Err(invalid("a route or rule of no known family")),
    }
}

fn prefix(what: &str, family: AddressFamily, bytes: &[u8], bits: u32) -> Result<Prefix> {
    let length = length(what, family, bits)?;
    let address = optional_ip(what, bytes)?;
    if address.is_some_and(|address| family_of(address) != family) || address.is_none() && length != 0 {
        return Err(invalid(format!("{what}: address and family or prefix do not fit")));
    }
    // The kernel tells the default route by the missing address.
    Ok(Prefix { address: address.filter(|_| length != 0), length })
}

fn route(wanted: pb::Route) -> Result<Route> {
    let family = family(wanted.family)?;
    at_most("next hops of a route", &wanted.next_hops, MAX_NEXT_HOPS)?;
    at_most("metrics of a route", &Vec::from_iter(&wanted.metrics), 32)?;
    let preferred_source = optional_ip("preferred source", &wanted.preferred_source)?;
    if preferred_source.is_some_and(|address| family_of(address) != family) {
        return Err(invalid("a route's preferred source is of another family"));
    }
    let mut metrics = Vec::new();
    for (kind, value) in wanted.metrics {
        metrics.push((number("metric", kind)?, value));
    }
    metrics.sort_unstable();
    let next_hop = |hop: pb::NextHop| {
        let slot = hop.slot.map(|slot| number("slot", slot)).transpose()?;
        let gateway = optional_ip("gateway", &hop.gateway)?;
        Ok(NextHop { slot, gateway, onlink: hop.onlink, hops: number("weight", hop.hops)? })
    };
    Ok(Route {
        family,
        destination: prefix("destination", family, &wanted.destination, wanted.destination_prefix)?,
        source: prefix("source", family, &wanted.source, wanted.source_prefix)?,
        tos: number("tos", wanted.tos)?,
        table: wanted.table,
        protocol: number("protocol", wanted.protocol)?,
        scope: number("scope", wanted.scope)?,
        kind: number("type", wanted.type_)?,
        metric: wanted.metric,
        preferred_source,
        next_hops: wanted.next_hops.into_iter().map(next_hop).collect::<Result<_>>()?,
        metrics,
        preference: number("preference", wanted.preference)?,
    })
}

fn rule(wanted: pb::Rule) -> Result<Rule> {
    let family = family(wanted.family)?;
    for name in [&wanted.input, &wanted.output] {
        if !name.is_empty() && !is_name(name) {
            return Err(invalid(format!("policy rule {}: interface {name:?}", wanted.priority)));
        }
    }
    let ports = |range: protobuf::MessageField<pb::Range>| {
        range.into_option().map(|range| Ok((number("port", range.first)?, number("port", range.last)?)))
    };
    Ok(Rule {
        family,
        priority: wanted.priority,
        action: number("action", wanted.action)?,
        table: wanted.table,
        source: prefix("source", family, &wanted.source, wanted.source_prefix)?,
        destination: prefix("destination", family, &wanted.destination, wanted.destination_prefix)?,
        tos: number("tos", wanted.tos)?,
        invert: wanted.invert,
        mark: wanted.mark,
        mask: wanted.mask,
        input: wanted.input,
        output: wanted.output,
        suppress_prefix_length: wanted.suppress_prefix_length,
        ip_protocol: wanted.ip_protocol.map(|protocol| number("protocol", protocol)).transpose()?,
        source_ports: ports(wanted.source_ports).transpose()?,
        destination_ports: ports(wanted.destination_ports).transpose()?,
        uids: wanted.uids.into_option().map(|range| (range.first, range.last)),
        goto_priority: wanted.goto_priority,
        protocol: number("protocol", wanted.protocol)?,
    })
}
