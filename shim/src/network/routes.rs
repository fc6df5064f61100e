//! Reads routes and policy rules.

use std::collections::BTreeMap;
use std::net::IpAddr;

use rtnetlink::packet_core::Nla;
use rtnetlink::packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteMessage, RouteMetric, RouteNextHopFlags, RouteProtocol,
    RouteType, RouteVia,
};
use rtnetlink::packet_route::rule::{RuleAttribute, RuleFlags, RuleMessage};
use rtnetlink::packet_route::{AddressFamily, RouteNetlinkMessage};
use spore_agent_api::network::{MAX_NEXT_HOPS, MAX_ROUTES, MAX_RULES};

use super::error::NetworkError;
use super::mirror::{NextHop, Route, Rule};
use super::netlink::Netlink;
use super::read::{FAMILIES, Refused, Slots, dump, slot_of, too_many};

const RT_TABLE_LOCAL: u32 = 255;
/// RTAX_CC_ALGO, the one metric that is no number.
const RTAX_CC_ALGO: u16 = 16;

/// The routes of the namespace that lead through joined links, or nowhere.
pub(super) async fn routes(
    netlink: &Netlink,
    slots: &Slots,
    refused: &mut Refused,
) -> Result<Vec<Route>, NetworkError> {
    let mut routes = Vec::new();
    for family in FAMILIES {
        let mut request = RouteMessage::default();
        request.header.address_family = family;
        let request = RouteNetlinkMessage::GetRoute(request);
        for message in dump(netlink, "list its routes", request).await? {
            let RouteNetlinkMessage::NewRoute(message) = message else { continue };
            match route(&message, slots) {
                Ok(found) => routes.extend(found),
                Err(error) => refused.push(error),
            }
        }
    }
    too_many("routes", &routes, MAX_ROUTES)?;
    Ok(routes)
}

fn ip(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(address) => Some((*address).into()),
        RouteAddress::Inet6(address) => Some((*address).into()),
        _ => None,
    }
}

fn via(via: &RouteVia) -> Option<IpAddr> {
    match via {
        RouteVia::Inet(address) => Some((*address).into()),
        RouteVia::Inet6(address) => Some((*address).into()),
        _ => None,
    }
}

/// None for a route that is the kernel's own business, or leads through no joined link.
fn route(message: &RouteMessage, slots: &Slots) -> Result<Option<Route>, NetworkError> {
    let header = &message.header;
    let nowhere = matches!(
        header.kind,
        RouteType::BlackHole | RouteType::Unreachable | RouteType::Prohibit | RouteType::Throw
    );
    let learned = matches!(header.protocol, RouteProtocol::Ra | RouteProtocol::IcmpRedirect);
    if !nowhere && header.kind != RouteType::Unicast || learned || header.flags.contains(RouteFlags::Cloned) {
        return Ok(None);
    }
    let mut route = Route {
        ipv6: header.address_family == AddressFamily::Inet6,
        destination: None,
        destination_prefix: header.destination_prefix_length,
        source: None,
        source_prefix: header.source_prefix_length,
        tos: header.tos,
        table: header.table.into(),
        protocol: header.protocol.into(),
        scope: header.scope.into(),
        kind: header.kind.into(),
        metric: 0,
        preferred_source: None,
        next_hops: Vec::new(),
        metrics: BTreeMap::new(),
        preference: 0,
    };
    let (mut link, mut gateway, mut encapsulated) = (None, None, false);
    let mut hops = Vec::new();
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Destination(address) => route.destination = ip(address),
            RouteAttribute::Source(address) => route.source = ip(address),
            RouteAttribute::PrefSource(address) => route.preferred_source = ip(address),
            RouteAttribute::Priority(metric) => route.metric = *metric,
            RouteAttribute::Table(table) => route.table = *table,
            RouteAttribute::Preference(preference) => route.preference = (*preference).into(),
            RouteAttribute::Metrics(metrics) => route.metrics = metrics.iter().filter_map(metric).collect(),
            RouteAttribute::Oif(index) => link = Some(*index),
            RouteAttribute::Gateway(address) => gateway = ip(address),
            RouteAttribute::Via(address) => gateway = via(address),
            RouteAttribute::EncapType(_) | RouteAttribute::Encap(_) => encapsulated = true,
            RouteAttribute::MultiPath(found) => hops.clone_from(found),
            _ => {}
        }
    }
    if route.table == RT_TABLE_LOCAL {
        return Ok(None);
    }
    if !nowhere {
        if hops.is_empty() {
            let slot = link.and_then(|index| slot_of(slots, index));
            let onlink = header.flags.contains(RouteFlags::Onlink);
            route.next_hops.extend(slot.map(|slot| NextHop { slot: Some(slot), gateway, onlink, hops: 0 }));
        }
        for hop in hops {
            let Some(slot) = slot_of(slots, hop.interface_index) else { continue };
            let gateway = hop.attributes.iter().find_map(|attribute| match attribute {
                RouteAttribute::Gateway(address) => ip(address),
                RouteAttribute::Via(address) => via(address),
                _ => None,
            });
            encapsulated |= hop.attributes.iter().any(|one| matches!(one, RouteAttribute::EncapType(_)));
            let onlink = hop.flags.contains(RouteNextHopFlags::Onlink);
            route.next_hops.push(NextHop { slot: Some(slot), gateway, onlink, hops: hop.hops });
        }
        if route.next_hops.is_empty() {
            return Ok(None);
        }
    }
    let refused = |what| NetworkError::Route { route: describe(&route), what };
    if encapsulated {
        return Err(refused("encapsulation"));
    }
    if route.next_hops.len() > MAX_NEXT_HOPS {
        return Err(refused("so many next hops"));
    }
    Ok(Some(route))
}

fn describe(route: &Route) -> String {
    match route.destination {
        Some(destination) => format!("{destination}/{}", route.destination_prefix),
        None => "default".into(),
    }
}

fn metric(metric: &RouteMetric) -> Option<(u32, u32)> {
    let mut value = [0; 4];
    if metric.kind() == RTAX_CC_ALGO || metric.value_len() != value.len() {
        return None;
    }
    metric.emit_value(&mut value);
    Some((metric.kind().into(), u32::from_ne_bytes(value)))
}

/// The policy rules of the namespace but the three that every one has.
pub(super) async fn rules(netlink: &Netlink, refused: &mut Refused) -> Result<Vec<Rule>, NetworkError> {
    let mut rules = Vec::new();
    for family in FAMILIES {
        let mut request = RuleMessage::default();
        request.header.family = family;
        let request = RouteNetlinkMessage::GetRule(request);
        for message in dump(netlink, "list its policy rules", request).await? {
            let RouteNetlinkMessage::NewRule(message) = message else { continue };
            if message.header.family != family {
                continue;
            }
            match rule(&message) {
                Ok(rule) => rules.extend(Some(rule).filter(|rule| !is_usual(rule))),
                Err(error) => refused.push(error),
            }
        }
    }
    too_many("policy rules", &rules, MAX_RULES)?;
    Ok(rules)
}

fn is_usual(rule: &Rule) -> bool {
    let all = rule.source.is_none() && rule.destination.is_none() && rule.mark.is_none();
    all && [(0, 255), (32766, 254), (32767, 253)].contains(&(rule.priority, rule.table))
}

fn rule(message: &RuleMessage) -> Result<Rule, NetworkError> {
    let header = &message.header;
    let mut rule = Rule {
        ipv6: header.family == AddressFamily::Inet6,
        action: header.action.into(),
        table: header.table.into(),
        source_prefix: header.src_len,
        destination_prefix: header.dst_len,
        tos: header.tos,
        invert: header.flags.contains(RuleFlags::Invert),
        ..Rule::default()
    };
    let mut odd = None;
    for attribute in &message.attributes {
        match attribute {
            RuleAttribute::Priority(priority) => rule.priority = *priority,
            RuleAttribute::Table(table) => rule.table = *table,
            RuleAttribute::Source(address) => rule.source = Some(*address),
            RuleAttribute::Destination(address) => rule.destination = Some(*address),
            RuleAttribute::FwMark(mark) => rule.mark = Some(*mark),
            RuleAttribute::FwMask(mask) => rule.mask = Some(*mask),
            RuleAttribute::Iifname(name) => rule.input.clone_from(name),
            RuleAttribute::Oifname(name) => rule.output.clone_from(name),
            RuleAttribute::SuppressPrefixLen(length) => rule.suppress_prefix_length = Some(*length),
            RuleAttribute::IpProtocol(protocol) => rule.ip_protocol = Some(u8::from(*protocol)),
            RuleAttribute::SourcePortRange(range) => rule.source_ports = Some((range.start, range.end)),
            RuleAttribute::DestinationPortRange(range) => {
                rule.destination_ports = Some((range.start, range.end));
            }
            RuleAttribute::UidRange(range) => rule.uids = Some((range.start, range.end)),
            RuleAttribute::Goto(priority) => rule.goto_priority = Some(*priority),
            RuleAttribute::Protocol(protocol) => rule.protocol = (*protocol).into(),
            other => odd = Some(format!("attribute {} (linux/fib_rules.h)", other.kind())),
        }
    }
    match odd {
        Some(what) => Err(NetworkError::Rule { priority: rule.priority, what }),
        None => Ok(rule),
    }
}
