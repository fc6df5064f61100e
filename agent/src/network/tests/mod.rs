//! Updates in namespaces of the test's own, with veth pairs standing for NICs: one end is the
//! NIC, the other what the host would be. Needs root.

mod decoding;
mod naming;
pub(super) mod support;

use std::net::UdpSocket;
use std::time::Duration;

use rtnetlink::packet_route::AddressFamily;

use self::support::{Ground, address, default_route, interface, link_route, neighbour};
use super::config::{Config, Interface, NextHop, Rule};

fn config(interfaces: Vec<Interface>) -> Config {
    Config { interfaces, ..Config::default() }
}

#[tokio::test]
async fn a_nic_becomes_the_interface_and_packets_pass() {
    let ground = Ground::new(1).await;
    let mut eth0 = interface(0, "eth0");
    eth0.mtu = 9000;
    eth0.addresses = vec![address("10.1.1.2", 24)];
    let routes = vec![default_route("10.1.1.1")];
    let wanted = Config { interfaces: vec![eth0.clone()], routes, ..Config::default() };
    assert_eq!(ground.update(wanted.clone()).await, [""; 0]);
    let found = ground.inside_link("eth0").await.unwrap();
    assert_eq!((found.mac, found.mtu, found.up), (eth0.mac.to_vec(), 9000, true));
    assert_eq!(ground.inside_addresses("eth0").await, ["10.1.1.2/24"]);
    assert_eq!(ground.inside_routes(AddressFamily::Inet).await, ["10.1.1.0/24", "default via 10.1.1.1"]);
    assert!(ground.own_links().await.iter().all(|name| name != "nic0"), "it is the containers' now");

    ground.give_peer(0, "10.1.1.1", 24).await;
    let here = UdpSocket::bind("10.1.1.1:0").unwrap();
    here.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    let target = here.local_addr().unwrap();
    ground.inside(move || UdpSocket::bind("10.1.1.2:0").unwrap().send_to(&[7; 8000], target).unwrap()).await;
    let mut packet = [0; 9000];
    let (length, from) = here.recv_from(&mut packet).unwrap();
    assert_eq!((length, from.ip().to_string()), (8000, "10.1.1.2".into()));
    assert_eq!(ground.update(wanted).await, [""; 0], "the same again is nothing new");
}

#[tokio::test]
async fn an_update_takes_away_what_it_no_longer_names_and_leaves_the_containers_own() {
    let ground = Ground::new(1).await;
    let mut eth0 = interface(0, "eth0");
    eth0.addresses = vec![address("10.1.1.2", 24), address("10.1.2.2", 24)];
    eth0.neighbours = vec![neighbour("10.1.1.9")];
    let routes = vec![default_route("10.1.1.1"), link_route("10.9.0.0", 16)];
    let wanted = Config { interfaces: vec![eth0.clone()], routes, ..Config::default() };
    assert_eq!(ground.update(wanted.clone()).await, [""; 0]);
    assert_eq!(ground.inside_neighbours().await, ["10.1.1.9"]);
    ground.add_inside("eth0", &address("172.16.0.1", 30)).await;

    eth0.addresses.remove(1);
    eth0.neighbours.clear();
    let wanted = Config { interfaces: vec![eth0], routes: vec![default_route("10.1.1.254")], ..wanted };
    assert_eq!(ground.update(wanted).await, [""; 0]);
    assert_eq!(ground.inside_addresses("eth0").await, ["10.1.1.2/24", "172.16.0.1/30"]);
    assert_eq!(
        ground.inside_routes(AddressFamily::Inet).await,
        ["10.1.1.0/24", "172.16.0.0/30", "default via 10.1.1.254"]
    );
    assert_eq!(ground.inside_neighbours().await, [""; 0]);
}

#[tokio::test]
async fn an_interface_that_goes_leaves_its_nic_for_another() {
    let ground = Ground::new(1).await;
    let before = ground.own_links().await;
    let mut eth0 = interface(0, "eth0");
    eth0.addresses = vec![address("10.1.1.2", 24), address("fd00::2", 64)];
    let wanted =
        Config { interfaces: vec![eth0], routes: vec![default_route("10.1.1.1")], ..Config::default() };
    assert_eq!(ground.update(wanted).await, [""; 0]);
    assert_eq!(ground.update(Config::default()).await, [""; 0]);
    assert_eq!(ground.inside_link("eth0").await, None);
    assert_eq!(ground.inside_routes(AddressFamily::Inet).await, [""; 0]);
    assert_eq!(ground.own_links().await.len(), before.len());

    let mut other = interface(0, "net1");
    other.addresses = vec![address("10.2.1.2", 24)];
    assert_eq!(ground.update(config(vec![other])).await, [""; 0]);
    assert_eq!(ground.inside_addresses("net1").await, ["10.2.1.2/24"]);
}

#[tokio::test]
async fn ipv6_addresses_can_be_used_at_once() {
    let ground = Ground::new(1).await;
    let mut eth0 = interface(0, "eth0");
    eth0.addresses = vec![address("fd00::2", 64), address("fe80::5", 64)];
    eth0.sysctls = vec![("ipv6/accept_ra".into(), "0".into())];
    let wanted =
        Config { interfaces: vec![eth0], routes: vec![default_route("fe80::1")], ..Config::default() };
    assert_eq!(ground.update(wanted).await, [""; 0]);
    // Neither a second link-local address nor one that waits for duplicates.
    assert_eq!(ground.inside_addresses("eth0").await, ["fd00::2/64", "fe80::5/64"]);
    ground.inside(|| UdpSocket::bind("[fd00::2]:0").map(drop)).await.unwrap();
    let routes = ground.inside_routes(AddressFamily::Inet6).await;
    assert!(routes.contains(&"default via fe80::1".to_owned()), "{routes:?}");
    let accept_ra =
        ground.inside(|| std::fs::read_to_string("/proc/sys/net/ipv6/conf/eth0/accept_ra")).await.unwrap();
    assert_eq!(accept_ra, "0\n");
}

#[tokio::test]
async fn a_gateway_behind_no_prefix_is_reached_by_its_own_route() {
    let ground = Ground::new(1).await;
    let mut eth0 = interface(0, "eth0");
    eth0.addresses = vec![address("10.1.1.2", 32)];
    // As the ptp plugin has it, the dependent one first; and one that no route leads to.
    let mut onlink = default_route("169.254.1.1");
    onlink.metric = 500;
    onlink.next_hops[0].onlink = true;
    let routes = vec![default_route("10.9.9.1"), onlink, link_route("10.9.9.1", 32)];
    let wanted = Config { interfaces: vec![eth0], routes, ..Config::default() };
    assert_eq!(ground.update(wanted).await, [""; 0]);
    assert_eq!(
        ground.inside_routes(AddressFamily::Inet).await,
        ["10.9.9.1/32", "default via 10.9.9.1", "default via 169.254.1.1 metric 500"]
    );
}

#[tokio::test]
async fn interfaces_exchange_their_names() {
    let ground = Ground::new(2).await;
    let named = |first: &str, second: &str| {
        let (mut one, mut two) = (interface(0, first), interface(1, second));
        one.addresses = vec![address("10.1.1.2", 24)];
        two.addresses = vec![address("10.2.1.2", 24)];
        config(vec![one, two])
    };
    assert_eq!(ground.update(named("eth0", "eth1")).await, [""; 0]);
    assert_eq!(ground.inside_addresses("eth0").await, ["10.1.1.2/24"]);
    assert_eq!(ground.update(named("eth1", "eth0")).await, [""; 0]);
    assert_eq!(ground.inside_addresses("eth0").await, ["10.2.1.2/24"]);
    assert_eq!(ground.inside_addresses("eth1").await, ["10.1.1.2/24"]);
}

#[tokio::test]
async fn several_next_hops_tables_and_rules_follow() {
    let ground = Ground::new(2).await;
    let (mut eth0, mut eth1) = (interface(0, "eth0"), interface(1, "eth1"));
    eth0.addresses = vec![address("10.1.1.2", 24)];
    eth1.addresses = vec![address("10.2.1.2", 24)];
    let mut both = default_route("10.1.1.1");
    let second = Some("10.2.1.1".parse().unwrap());
    both.next_hops.push(NextHop { slot: Some(1), gateway: second, onlink: false, hops: 3 });
    let mut table = default_route("10.2.1.1");
    (table.table, table.next_hops[0].slot) = (1000, Some(1));
    let mut blackhole = link_route("192.0.2.0", 24);
    (blackhole.kind, blackhole.scope, blackhole.next_hops) = (6, 0, Vec::new());
    let rule = Rule { priority: 100, table: 1000, mark: Some(7), ..support::rule() };
    let wanted = Config {
        interfaces: vec![eth0, eth1],
        routes: vec![both, table, blackhole],
        rules: vec![rule],
        ..Config::default()
    };
    assert_eq!(ground.update(wanted.clone()).await, [""; 0]);
    let routes = ground.inside_routes(AddressFamily::Inet).await;
    for route in ["192.0.2.0/24", "default via 10.1.1.1 via 10.2.1.1", "default via 10.2.1.1 table 1000"] {
        assert!(routes.contains(&route.to_owned()), "{route}: {routes:?}");
    }
    assert_eq!(ground.inside_rules().await, [100]);
    let wanted = Config { routes: Vec::new(), rules: Vec::new(), ..wanted };
    assert_eq!(ground.update(wanted).await, [""; 0]);
    assert_eq!(ground.inside_routes(AddressFamily::Inet).await, ["10.1.1.0/24", "10.2.1.0/24"]);
    assert_eq!(ground.inside_rules().await, [0; 0]);
}

#[tokio::test]
async fn what_is_refused_is_told_and_tried_again() {
    let ground = Ground::new(1).await;
    let mut eth0 = interface(0, "eth0");
    eth0.addresses = vec![address("10.1.1.2", 24)];
    let wanted = Config {
        interfaces: vec![eth0, interface(3, "eth3")],
        routes: vec![default_route("10.77.0.1"), link_route("10.9.0.0", 16)],
        ..Config::default()
    };
    let problems = ground.update(wanted.clone()).await;
    let [nic, route] = &problems[..] else { panic!("{problems:?}") };
    assert!(nic.contains("interface eth3: the machine shows no NIC for slot 3"), "{nic}");
    assert!(route.contains("route default via 10.77.0.1: ") && route.contains("unreachable"), "{route}");
    assert_eq!(ground.inside_routes(AddressFamily::Inet).await, ["10.1.1.0/24", "10.9.0.0/16"]);
    assert_eq!(ground.update(wanted.clone()).await, problems);
    ground.add_inside("eth0", &address("10.77.0.2", 24)).await;
    let wanted = Config { interfaces: wanted.interfaces[..1].to_vec(), ..wanted };
    assert_eq!(ground.update(wanted).await, [""; 0]);
}

#[tokio::test]
async fn an_mtu_that_the_nic_does_not_have_names_the_interface() {
    let ground = Ground::new(1).await;
    let mut eth0 = interface(0, "eth0");
    eth0.mtu = 67;
    let problems = ground.update(config(vec![eth0])).await;
    assert!(problems[0].contains("interface eth0: set its MTU: "), "{problems:?}");
}
