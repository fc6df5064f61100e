//! Policy rules.

use nix::errno::Errno;
use rtnetlink::packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::packet_route::rule::{
    RuleAction, RuleAttribute, RuleFlags, RuleMessage, RulePortRange, RuleUidRange,
};

use super::address::gone;
use super::config::Rule;
use super::netlink::{Netlink, Refusal};

fn message(wanted: &Rule) -> RuleMessage {
    let mut message = RuleMessage::default();
    let header = &mut message.header;
    header.family = wanted.family;
    header.action = RuleAction::from(wanted.action);
    header.table = u8::try_from(wanted.table).unwrap_or(0);
    header.src_len = wanted.source.length;
    header.dst_len = wanted.destination.length;
    header.tos = wanted.tos;
    if wanted.invert {
        header.flags |= RuleFlags::Invert;
    }
    let ports = |(start, end)| RulePortRange { start, end };
    let attributes = [
        Some(RuleAttribute::Priority(wanted.priority)),
        Some(RuleAttribute::Table(wanted.table)),
        wanted.source.address.map(RuleAttribute::Source),
        wanted.destination.address.map(RuleAttribute::Destination),
        wanted.mark.map(RuleAttribute::FwMark),
        wanted.mask.map(RuleAttribute::FwMask),
        name(&wanted.input).map(RuleAttribute::Iifname),
        name(&wanted.output).map(RuleAttribute::Oifname),
        wanted.suppress_prefix_length.map(RuleAttribute::SuppressPrefixLen),
        wanted.ip_protocol.map(|protocol| RuleAttribute::IpProtocol(protocol.into())),
        wanted.source_ports.map(|range| RuleAttribute::SourcePortRange(ports(range))),
        wanted.destination_ports.map(|range| RuleAttribute::DestinationPortRange(ports(range))),
        wanted.uids.map(|(start, end)| RuleAttribute::UidRange(RuleUidRange { start, end })),
        wanted.goto_priority.map(RuleAttribute::Goto),
        Some(RuleAttribute::Protocol(wanted.protocol.into())),
    ];
    message.attributes.extend(attributes.into_iter().flatten());
    message
}

fn name(name: &str) -> Option<String> {
    (!name.is_empty()).then(|| name.to_owned())
}

pub async fn add(netlink: &Netlink, wanted: &Rule) -> Result<(), Refusal> {
    let message = RouteNetlinkMessage::NewRule(message(wanted));
    match netlink.request(message, NLM_F_CREATE | NLM_F_EXCL).await {
        Err(Refusal { errno: Errno::EEXIST, .. }) => Ok(()),
        other => other,
    }
}

pub async fn remove(netlink: &Netlink, unwanted: &Rule) -> Result<(), Refusal> {
    gone(netlink.request(RouteNetlinkMessage::DelRule(message(unwanted)), 0).await)
}
