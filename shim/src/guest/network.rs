//! The network as the agent's API has it.

use std::net::IpAddr;

use spore_agent_api::v1::network as pb;

use crate::network::mirror::{Address, Interface, Mirror, Neighbour, NextHop, Route, Rule};

pub(super) fn request(mirror: &Mirror) -> pb::NetworkRequest {
    pb::NetworkRequest {
        interfaces: mirror.interfaces.iter().map(interface).collect(),
        routes: mirror.routes.iter().map(route).collect(),
        rules: mirror.rules.iter().map(rule).collect(),
        name_server: mirror.name_server,
        ..Default::default()
    }
}

fn bytes(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(address) => address.octets().into(),
        IpAddr::V6(address) => address.octets().into(),
    }
}

fn optional(address: Option<IpAddr>) -> Vec<u8> {
    address.map(bytes).unwrap_or_default()
}

fn family(ipv6: bool) -> protobuf::EnumOrUnknown<pb::Family> {
    if ipv6 { pb::Family::FAMILY_IPV6 } else { pb::Family::FAMILY_IPV4 }.into()
}

fn interface(interface: &Interface) -> pb::Interface {
    let neighbour = |neighbour: &Neighbour| pb::Neighbour {
        address: bytes(neighbour.address),
        mac: neighbour.mac.clone(),
        proxy: neighbour.proxy,
        router: neighbour.router,
        ..Default::default()
    };
    pb::Interface {
        slot: interface.slot.into(),
        name: interface.name.clone(),
        mac: interface.mac.clone(),
        mtu: interface.mtu,
        up: interface.up,
        no_arp: interface.no_arp,
        addresses: interface.addresses.iter().map(address).collect(),
        neighbours: interface.neighbours.iter().map(neighbour).collect(),
        sysctls: interface.sysctls.clone().into_iter().collect(),
        ..Default::default()
    }
}

fn address(address: &Address) -> pb::Address {
    pb::Address {
        address: bytes(address.address),
        prefix: address.prefix.into(),
        scope: address.scope.into(),
        flags: address.flags,
        peer: optional(address.peer),
        broadcast: optional(address.broadcast),
        label: address.label.clone(),
        metric: address.metric,
        ..Default::default()
    }
}

fn route(route: &Route) -> pb::Route {
    let next_hop = |hop: &NextHop| pb::NextHop {
        slot: hop.slot.map(u32::from),
        gateway: optional(hop.gateway),
        onlink: hop.onlink,
        hops: hop.hops.into(),
        ..Default::default()
    };
    pb::Route {
        family: family(route.ipv6),
        destination: optional(route.destination),
        destination_prefix: route.destination_prefix.into(),
        source: optional(route.source),
        source_prefix: route.source_prefix.into(),
        tos: route.tos.into(),
        table: route.table,
        protocol: route.protocol.into(),
        scope: route.scope.into(),
        type_: route.kind.into(),
        metric: route.metric,
        preferred_source: optional(route.preferred_source),
        next_hops: route.next_hops.iter().map(next_hop).collect(),
        metrics: route.metrics.clone().into_iter().collect(),
        preference: route.preference.into(),
        ..Default::default()
    }
}

fn rule(rule: &Rule) -> pb::Rule {
    let range = |(first, last): (u32, u32)| pb::Range { first, last, ..Default::default() };
    let ports = |(first, last): (u16, u16)| range((first.into(), last.into()));
    pb::Rule {
        family: family(rule.ipv6),
        priority: rule.priority,
        action: rule.action.into(),
        table: rule.table,
        source: optional(rule.source),
        source_prefix: rule.source_prefix.into(),
        destination: optional(rule.destination),
        destination_prefix: rule.destination_prefix.into(),
        tos: rule.tos.into(),
        invert: rule.invert,
        mark: rule.mark,
        mask: rule.mask,
        input: rule.input.clone(),
        output: rule.output.clone(),
        suppress_prefix_length: rule.suppress_prefix_length,
        ip_protocol: rule.ip_protocol.map(u32::from),
        source_ports: rule.source_ports.map(ports).into(),
        destination_ports: rule.destination_ports.map(ports).into(),
        uids: rule.uids.map(range).into(),
        goto_priority: rule.goto_priority,
        protocol: rule.protocol.into(),
        ..Default::default()
    }
}
