//! What the guest is told of a namespace.

use rtnetlink::packet_core::{NLM_F_CREATE, NLM_F_REPLACE};
use rtnetlink::packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState,
};
use rtnetlink::packet_route::route::{RouteAttribute, RouteFlags, RouteMetric, RouteScope, RouteType};
use rtnetlink::packet_route::rule::{RuleAction, RuleAttribute, RuleMessage};
use rtnetlink::packet_route::{AddressFamily, RouteNetlinkMessage};
use rtnetlink::{LinkUnspec, RouteMessageBuilder};

use super::space::{Space, desk, look, refusal, route};
use crate::network::mirror::{Mirror, Route};

const NOPREFIXROUTE: u32 = 0x200;

async fn space() -> (Space, Space) {
    let (space, outside) = (Space::new(), Space::new());
    space.veth("eth0", &outside, "out0", 1450).await;
    space.enter();
    (space, outside)
}

async fn mirror() -> Mirror {
    let mut desk = desk();
    let looked = look(&mut desk).await;
    desk.leave_all().await.unwrap();
    looked.mirror.unwrap()
}

fn routes(mirror: &Mirror) -> Vec<String> {
    let describe = |route: &Route| {
        let to =
            route.destination.map_or("default".to_owned(), |to| format!("{to}/{}", route.destination_prefix));
        let hop = route.next_hops.first();
        let via = hop.and_then(|hop| hop.gateway).map(|via| format!(" via {via}")).unwrap_or_default();
        let onlink = if hop.is_some_and(|hop| hop.onlink) { " onlink" } else { "" };
        format!("{to}{via}{onlink}")
    };
    mirror.routes.iter().map(describe).collect()
}

#[tokio::test]
async fn an_interface_as_the_bridge_plugin_leaves_it() {
    let (space, _outside) = space().await;
    space.address("eth0", "10.22.0.5", 16).await;
    space.address("eth0", "fd00:22::5", 64).await;
    let index = space.index("eth0").await;
    space.route(route(("0.0.0.0", 0), Some("10.22.0.1"), index, RouteScope::Universe)).await;
    std::fs::write("/proc/sys/net/ipv6/conf/eth0/accept_ra", "0").unwrap();
    let mirror = mirror().await;
    let [eth0] = &mirror.interfaces[..] else { panic!("{mirror:?}") };
    assert_eq!((eth0.slot, eth0.name.as_str(), eth0.mtu, eth0.up), (0, "eth0", 1450, true));
    assert_eq!(eth0.mac, space.mac("eth0").await);
    let mut addresses: Vec<_> =
        eth0.addresses.iter().map(|one| (one.address.to_string(), one.prefix, one.flags)).collect();
    addresses.retain(|(address, ..)| !address.starts_with("fe80"));
    assert_eq!(addresses, [("10.22.0.5".into(), 16, 0), ("fd00:22::5".into(), 64, 0)]);
    // Those to the prefixes come with the addresses.
    assert_eq!(routes(&mirror), ["default via 10.22.0.1"]);
    assert!(mirror.rules.is_empty(), "the kernel's own are everywhere");
    assert_eq!(eth0.sysctls["ipv6/accept_ra"], "0");
    assert!(eth0.sysctls.contains_key("ipv4/rp_filter"));
}

#[tokio::test]
async fn an_interface_as_the_ptp_plugin_leaves_it() {
    let (space, _outside) = space().await;
    // Its prefix is reached by the gateway, not directly.
    space.change_address("eth0", "10.33.0.5", 24, NOPREFIXROUTE, true).await;
    let index = space.index("eth0").await;
    space.route(route(("10.33.0.1", 32), None, index, RouteScope::Link)).await;
    space.route(route(("10.33.0.0", 24), Some("10.33.0.1"), index, RouteScope::Universe)).await;
    let mirror = mirror().await;
    let address = mirror.interfaces[0].addresses.iter().find(|one| one.address.is_ipv4()).unwrap();
    assert_eq!(address.flags & NOPREFIXROUTE, NOPREFIXROUTE);
    let mut found = routes(&mirror);
    found.sort();
    assert_eq!(found, ["10.33.0.0/24 via 10.33.0.1", "10.33.0.1/32"]);
}

#[tokio::test]
async fn routes_keep_what_makes_them_special() {
    let (space, _outside) = space().await;
    space.address("eth0", "10.22.0.5", 16).await;
    let index = space.index("eth0").await;
    let mut onlink = route(("0.0.0.0", 0), Some("169.254.1.1"), index, RouteScope::Universe);
    onlink.header.flags |= RouteFlags::Onlink;
    onlink.attributes.push(RouteAttribute::Priority(50));
    onlink.attributes.push(RouteAttribute::Metrics(vec![RouteMetric::Mtu(1400), RouteMetric::Advmss(1360)]));
    onlink.attributes.push(RouteAttribute::PrefSource(std::net::Ipv4Addr::new(10, 22, 0, 5).into()));
    space.route(onlink).await;
    let mut table = route(("10.99.0.0", 16), Some("10.22.0.1"), index, RouteScope::Universe);
    table.header.table = 0;
    table.attributes.push(RouteAttribute::Table(1000));
    space.route(table).await;
    let mut blackhole = RouteMessageBuilder::<std::net::Ipv4Addr>::new()
        .destination_prefix([192, 0, 2, 0].into(), 24)
        .build();
    blackhole.header.kind = RouteType::BlackHole;
    space.route(blackhole).await;
    let mut rule = RuleMessage::default();
    rule.header.family = AddressFamily::Inet;
    rule.header.action = RuleAction::ToTable;
    rule.attributes =
        vec![RuleAttribute::Priority(100), RuleAttribute::Table(1000), RuleAttribute::FwMark(7)];
    space.request(RouteNetlinkMessage::NewRule(rule)).await;

    let mirror = mirror().await;
    let find = |to: &str| {
        let named = |route: &&Route| route.destination.map(|to| to.to_string()).unwrap_or_default() == to;
        mirror.routes.iter().find(named).unwrap()
    };
    let onlink = find("");
    assert!(onlink.next_hops[0].onlink && onlink.metric == 50);
    assert_eq!(onlink.preferred_source, Some("10.22.0.5".parse().unwrap()));
    assert_eq!(onlink.metrics, [(2, 1400), (8, 1360)].into());
    assert_eq!(find("10.99.0.0").table, 1000);
    assert!(find("192.0.2.0").next_hops.is_empty() && find("192.0.2.0").kind == 6);
    let [rule] = &mirror.rules[..] else { panic!("{:?}", mirror.rules) };
    assert_eq!((rule.priority, rule.table, rule.mark, rule.mask), (100, 1000, Some(7), Some(u32::MAX)));
}

#[tokio::test]
async fn permanent_neighbours_are_told_and_found_ones_are_not() {
    let (space, _outside) = space().await;
    for (last, state) in [(8, NeighbourState::Reachable), (9, NeighbourState::Permanent)] {
        let mut message = NeighbourMessage::default();
        message.header.family = AddressFamily::Inet;
        message.header.ifindex = space.index("eth0").await;
        message.header.state = state;
        message.attributes = vec![
            NeighbourAttribute::Destination(NeighbourAddress::Inet([10, 22, 0, last].into())),
            NeighbourAttribute::LinkLayerAddress(vec![2, 0, 0, 0, 0, last]),
        ];
        let message = RouteNetlinkMessage::NewNeighbour(message);
        space.netlink.request(message, NLM_F_CREATE | NLM_F_REPLACE).await.unwrap();
    }
    let mirror = mirror().await;
    let neighbours: Vec<_> =
        mirror.interfaces[0].neighbours.iter().map(|one| one.address.to_string()).collect();
    assert_eq!(neighbours, ["10.22.0.9"]);
}

#[tokio::test]
async fn routes_of_what_is_not_joined_are_not_the_guests() {
    let (space, outside) = space().await;
    space.veth("idle0", &outside, "idle0", 1500).await;
    space.address("eth0", "10.22.0.5", 16).await;
    let index = space.index("idle0").await;
    space.set(LinkUnspec::new_with_name("idle0").down().build()).await;
    let mirror = mirror().await;
    assert_eq!(mirror.interfaces.len(), 1);
    assert!(mirror.routes.iter().all(|route| !route.next_hops.is_empty()), "{index}: {:?}", mirror.routes);
}

#[tokio::test]
async fn a_configuration_beyond_all_bounds_is_refused_and_nothing_stays_joined() {
    let (space, _outside) = space().await;
    let before = space.counts().await;
    for number in 0..300u32 {
        let address = std::net::Ipv4Addr::from(0x0a16_0000 + number);
        space.address("eth0", &address.to_string(), 32).await;
    }
    let (message, looked) = refusal(&mut desk()).await;
    assert!(message.contains("addresses of an interface, at most 256"), "{message}");
    assert!(looked.mirror.is_none() && looked.joined.is_empty());
    assert_eq!(space.counts().await, before);
}

#[tokio::test]
async fn a_name_that_is_no_text_is_not_passed_over_in_silence() {
    let (space, _outside) = space().await;
    let mut message = LinkUnspec::new_with_name("eth0").down().build();
    space.set(message).await;
    // The library writes text only, so the byte is put in by hand.
    message = LinkUnspec::new_with_index(space.index("eth0").await).build();
    let name = rtnetlink::packet_core::DefaultNla::new(3, b"eth\xff\0".to_vec());
    message.attributes.push(rtnetlink::packet_route::link::LinkAttribute::Other(name));
    space.set(message).await;
    let (message, _) = refusal(&mut desk()).await;
    assert!(message.contains("interface eth\\xff: its description cannot be read"), "{message}");
}
