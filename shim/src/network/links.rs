//! The links of a network namespace, and which of them can be joined.

use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::packet_route::link::{
    InfoData, InfoIpVlan, InfoIpVtap, InfoKind, IpVlanMode, LinkAttribute, LinkFlags, LinkInfo,
    LinkLayerType, LinkMessage, Stats64,
};
use spore_agent_api::network::is_name;

use super::error::NetworkError;
use super::mirror::Counters;
use super::netlink::{Netlink, Refusal};
use super::tap;

/// A link, as far as anybody asks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Link {
    pub(super) index: u32,
    pub(super) name: String,
    pub(super) mac: Vec<u8>,
    pub(super) mtu: u32,
    pub(super) flags: LinkFlags,
    pub(super) is_tap_of_ours: bool,
    ethernet: bool,
    kind: Option<InfoKind>,
    /// Frames come and go as IP packets.
    layer3: bool,
    /// It is a port of another link of the namespace.
    port: bool,
    pub(super) counters: Counters,
}

/// What is to be done with a link.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Use {
    Join,
    Ignore,
    /// It is in use and cannot be joined; this is what it is.
    Refuse(String),
}

impl Link {
    /// `addressed`: it has addresses that somebody gave it.
    pub(super) fn use_of(&self, addressed: bool) -> Use {
        if self.flags.contains(LinkFlags::Loopback) || self.is_tap_of_ours || self.port {
            return Use::Ignore;
        }
        // Whoever sets a link up is not done yet; tunnels' fallback devices stay so for ever.
        if !self.flags.contains(LinkFlags::Up) && !addressed {
            return Use::Ignore;
        }
        let name = self.kind.as_ref().map_or("a device without a kind".to_owned(), ToString::to_string);
        if !self.ethernet || self.mac.len() != 6 {
            return Use::Refuse(format!("{name}, which does not carry Ethernet,"));
        }
        match &self.kind {
            Some(InfoKind::IpVlan | InfoKind::IpVtap) if self.layer3 => {
                Use::Refuse(format!("{name} in mode l3"))
            }
            None
            | Some(
                InfoKind::Veth
                | InfoKind::MacVlan
                | InfoKind::MacVtap
                | InfoKind::IpVlan
                | InfoKind::IpVtap
                | InfoKind::Vlan
                | InfoKind::Bridge
                | InfoKind::Tun
                | InfoKind::Dummy
                | InfoKind::Bond
                | InfoKind::Team
                | InfoKind::Vxlan
                | InfoKind::Geneve
                | InfoKind::GreTap
                | InfoKind::GreTap6,
            ) => Use::Join,
            Some(_) => Use::Refuse(format!("a device of kind {name}")),
        }
    }

    pub(super) fn is_nameable(&self) -> bool {
        is_name(&self.name)
    }
}

/// All links of the namespace.
pub(super) async fn list(netlink: &Netlink) -> Result<Vec<Link>, Refusal> {
    let found = netlink.dump(RouteNetlinkMessage::GetLink(LinkMessage::default())).await?;
    let links = found.into_iter().filter_map(|message| match message {
        RouteNetlinkMessage::NewLink(message) => link(message),
        _ => None,
    });
    Ok(links.collect())
}

fn link(message: LinkMessage) -> Option<Link> {
    let mut link = Link {
        index: message.header.index,
        name: String::new(),
        mac: Vec::new(),
        mtu: 0,
        flags: message.header.flags,
        is_tap_of_ours: false,
        ethernet: message.header.link_layer_type == LinkLayerType::Ether,
        kind: None,
        layer3: false,
        port: false,
        counters: Counters::default(),
    };
    for attribute in message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => link.name = name,
            LinkAttribute::Address(mac) => link.mac = mac,
            LinkAttribute::Mtu(mtu) => link.mtu = mtu,
            LinkAttribute::Controller(_) => link.port = true,
            LinkAttribute::Stats64(stats) => link.counters = counters(&stats),
            LinkAttribute::LinkInfo(infos) => infos.into_iter().for_each(|info| match info {
                LinkInfo::Kind(kind) => link.kind = Some(kind),
                LinkInfo::Data(data) => link.layer3 = is_layer3(&data),
                _ => {}
            }),
            _ => {}
        }
    }
    link.is_tap_of_ours = link.kind == Some(InfoKind::Tun) && tap::is_name(&link.name);
    link.counters.name.clone_from(&link.name);
    Some(link).filter(|link| !link.name.is_empty())
}

fn is_layer3(data: &InfoData) -> bool {
    match data {
        InfoData::IpVlan(infos) => {
            infos.iter().any(|info| matches!(info, InfoIpVlan::Mode(mode) if *mode != IpVlanMode::L2))
        }
        InfoData::IpVtap(infos) => {
            infos.iter().any(|info| matches!(info, InfoIpVtap::Mode(mode) if *mode != IpVlanMode::L2))
        }
        _ => false,
    }
}

fn counters(stats: &Stats64) -> Counters {
    Counters {
        name: String::new(),
        rx_bytes: stats.rx_bytes,
        rx_packets: stats.rx_packets,
        rx_errors: stats.rx_errors,
        rx_dropped: stats.rx_dropped,
        tx_bytes: stats.tx_bytes,
        tx_packets: stats.tx_packets,
        tx_errors: stats.tx_errors,
        tx_dropped: stats.tx_dropped,
    }
}

/// Looks for a link that the kernel has and the list has not: what cannot be read must not be
/// missing in silence. For a thread in the namespace.
pub(super) fn unreadable(links: &[Link]) -> Option<NetworkError> {
    let table = std::fs::read("/proc/thread-self/net/dev").unwrap_or_default();
    // Two lines of heading.
    table.split(|byte| *byte == b'\n').skip(2).find_map(|line| {
        // A name may have no colon in it but that of an alias.
        let colon = line.iter().position(|byte| *byte == b':')?;
        let name = line[..colon].trim_ascii();
        let known = links.iter().any(|link| link.name.as_bytes() == name);
        (!known).then(|| NetworkError::Unreadable { name: name.escape_ascii().to_string() })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn veth() -> Link {
        Link {
            index: 2,
            name: "eth0".into(),
            mac: vec![2, 0, 0, 0, 0, 1],
            mtu: 1500,
            flags: LinkFlags::Up,
            is_tap_of_ours: false,
            ethernet: true,
            kind: Some(InfoKind::Veth),
            layer3: false,
            port: false,
            counters: Counters::default(),
        }
    }

    #[test]
    fn what_carries_ethernet_is_joined_once_it_is_in_use() {
        for kind in [None, Some(InfoKind::Veth), Some(InfoKind::MacVlan), Some(InfoKind::Tun)] {
            assert_eq!(Link { kind, ..veth() }.use_of(false), Use::Join);
        }
        let down = Link { flags: LinkFlags::empty(), ..veth() };
        assert_eq!((down.use_of(false), down.use_of(true)), (Use::Ignore, Use::Join));
        assert_eq!(Link { port: true, ..veth() }.use_of(true), Use::Ignore);
        assert_eq!(Link { is_tap_of_ours: true, ..veth() }.use_of(true), Use::Ignore);
    }

    #[test]
    fn what_does_not_is_refused_by_its_kind() {
        let refused = |link: Link| match link.use_of(true) {
            Use::Refuse(kind) => kind,
            other => panic!("{other:?}"),
        };
        let tunnel = Link { ethernet: false, kind: Some(InfoKind::Wireguard), ..veth() };
        assert!(refused(tunnel).contains("wireguard, which does not carry Ethernet"));
        let ipvlan = Link { layer3: true, kind: Some(InfoKind::IpVlan), ..veth() };
        assert!(refused(ipvlan).contains("ipvlan in mode l3"));
        assert!(refused(Link { kind: Some(InfoKind::Vrf), ..veth() }).contains("of kind vrf"));
        let fallback = Link { ethernet: false, flags: LinkFlags::empty(), ..veth() };
        assert_eq!(fallback.use_of(false), Use::Ignore);
    }
}
