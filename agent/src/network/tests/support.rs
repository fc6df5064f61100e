//! The namespaces of a test and what is in them.

use std::fs::File;
use std::io;
use std::net::IpAddr;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::Arc;

use nix::sched::{CloneFlags, unshare};
use rtnetlink::packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use rtnetlink::packet_route::address::{AddressAttribute, AddressHeaderFlags, AddressMessage};
use rtnetlink::packet_route::link::{LinkAttribute, LinkFlags, LinkMessage};
use rtnetlink::packet_route::neighbour::{NeighbourAttribute, NeighbourMessage, NeighbourState};
use rtnetlink::packet_route::route::{RouteAddress, RouteAttribute, RouteMessage, RouteProtocol, RouteType};
use rtnetlink::packet_route::rule::{RuleAttribute, RuleMessage};
use rtnetlink::packet_route::{AddressFamily, RouteNetlinkMessage};
use rtnetlink::{LinkUnspec, LinkVeth};

use crate::network::config::{Address, Config, Interface, Neighbour, NextHop, Prefix, Route, Rule};
use crate::network::decode::family_of;
use crate::network::names::Dial;
use crate::network::netlink::Netlink;
use crate::network::service::Network;
use crate::network::{address as addresses, namespace};
use crate::sys;

pub(crate) fn interface(slot: u8, name: &str) -> Interface {
    Interface {
        slot,
        name: name.into(),
        mac: [2, 0x42, 10, 1, 1, slot],
        mtu: 1500,
        up: true,
        no_arp: false,
        addresses: Vec::new(),
        neighbours: Vec::new(),
        sysctls: Vec::new(),
    }
}

pub(crate) fn address(address: &str, prefix: u8) -> Address {
    let address: IpAddr = address.parse().unwrap();
    let link_local = matches!(address, IpAddr::V6(address) if address.is_unicast_link_local());
    Address {
        address,
        prefix,
        scope: if link_local { 253 } else { 0 },
        flags: 0x80,
        peer: None,
        broadcast: None,
        label: String::new(),
        metric: 0,
    }
}

pub(crate) fn neighbour(address: &str) -> Neighbour {
    let address = address.parse().unwrap();
    Neighbour { address, mac: Some([2, 0, 0, 0, 0, 9]), proxy: false, router: false }
}

fn route(family: AddressFamily) -> Route {
    Route {
        family,
        destination: Prefix { address: None, length: 0 },
        source: Prefix { address: None, length: 0 },
        tos: 0,
        table: 254,
        protocol: 3,
        scope: 0,
        kind: 1,
        metric: 0,
        preferred_source: None,
        next_hops: vec![NextHop { slot: Some(0), gateway: None, onlink: false, hops: 0 }],
        metrics: Vec::new(),
        preference: 0,
    }
}

pub(crate) fn default_route(gateway: &str) -> Route {
    let gateway: IpAddr = gateway.parse().unwrap();
    let mut route = route(family_of(gateway));
    route.next_hops[0].gateway = Some(gateway);
    route
}

pub(crate) fn link_route(destination: &str, length: u8) -> Route {
    let address: IpAddr = destination.parse().unwrap();
    let destination = Prefix { address: Some(address), length };
    Route { destination, scope: 253, ..route(family_of(address)) }
}

pub(crate) fn rule() -> Rule {
    let all = Prefix { address: None, length: 0 };
    Rule {
        family: AddressFamily::Inet,
        priority: 0,
        action: 1,
        table: 254,
        source: all,
        destination: all,
        tos: 0,
        invert: false,
        mark: None,
        mask: None,
        input: String::new(),
        output: String::new(),
        suppress_prefix_length: None,
        ip_protocol: None,
        source_ports: None,
        destination_ports: None,
        uids: None,
        goto_priority: None,
        protocol: 0,
    }
}

/// What a link is like.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Seen {
    pub(crate) mac: Vec<u8>,
    pub(crate) mtu: u32,
    pub(crate) up: bool,
}

/// The calling thread's namespace stands for the agent's, a second one is the containers'.
pub(crate) struct Ground {
    own: Netlink,
    inside: Netlink,
    namespace: File,
    network: Network,
}

/// An alias stays with a link wherever it goes.
fn by_alias(link: &LinkMessage) -> Option<u8> {
    link.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::IfAlias(alias) => alias.strip_prefix("nic")?.parse().ok(),
        _ => None,
    })
}

fn name(link: &LinkMessage) -> Option<String> {
    link.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::IfName(name) => Some(name.clone()),
        _ => None,
    })
}

fn through(gateway: &RouteAddress) -> String {
    match gateway {
        RouteAddress::Inet(gateway) => format!(" via {gateway}"),
        RouteAddress::Inet6(gateway) => format!(" via {gateway}"),
        other => panic!("{other:?}"),
    }
}

impl Ground {
    /// With so many NICs, `nic0` …, and their peers, `peer0` ….
    pub(crate) async fn new(nics: u8) -> Self {
        let nobody: Dial = Arc::new(|| Box::pin(async { Err(io::ErrorKind::ConnectionRefused.into()) }));
        Self::asking(nics, "/".as_ref(), nobody).await
    }

    /// The same where questions for names of a cgroup's sockets go to `dial`.
    pub(crate) async fn asking(nics: u8, cgroup: &Path, dial: Dial) -> Self {
        // Threads that are started from here are there too.
        unshare(CloneFlags::CLONE_NEWNET).expect("these tests need root");
        sys::loopback_up().unwrap();
        let namespace = std::thread::spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET).unwrap();
            sys::loopback_up().unwrap();
            File::open(namespace::CURRENT).unwrap()
        });
        let namespace = namespace.join().unwrap();
        let own = Netlink::open().unwrap();
        for slot in 0..nics {
            let (nic, peer) = (format!("nic{slot}"), format!("peer{slot}"));
            let pair = RouteNetlinkMessage::NewLink(LinkVeth::new(&nic, &peer).build());
            own.request(pair, NLM_F_CREATE | NLM_F_EXCL).await.unwrap();
            let mut mark = LinkUnspec::new_with_name(&nic).build();
            mark.attributes.push(LinkAttribute::IfAlias(nic.clone()));
            own.request(RouteNetlinkMessage::SetLink(mark), 0).await.unwrap();
        }
        let inside = {
            let here = File::open(namespace::CURRENT).unwrap();
            namespace::enter(&namespace).unwrap();
            let inside = Netlink::open().unwrap();
            namespace::enter(&here).unwrap();
            inside
        };
        let path = format!("/proc/self/fd/{}", namespace.as_raw_fd());
        let network = Network::new(path.as_ref(), by_alias, cgroup, dial);
        Self { own, inside, namespace, network }
    }

    /// For another process, while this lives.
    pub(crate) fn path(&self) -> String {
        format!("/proc/{}/fd/{}", std::process::id(), self.namespace.as_raw_fd())
    }

    pub(crate) async fn update(&self, config: Config) -> Vec<String> {
        self.network.update(config).await.unwrap()
    }

    /// Runs something in the containers' namespace.
    pub(crate) async fn inside<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> T {
        let namespace = self.namespace.try_clone().unwrap();
        std::thread::spawn(move || {
            namespace::enter(&namespace).unwrap();
            work()
        })
        .join()
        .unwrap()
    }

    async fn links(netlink: &Netlink) -> Vec<LinkMessage> {
        let found = netlink.dump(RouteNetlinkMessage::GetLink(LinkMessage::default())).await.unwrap();
        found
            .into_iter()
            .filter_map(|message| match message {
                RouteNetlinkMessage::NewLink(link) => Some(link),
                _ => None,
            })
            .collect()
    }

    pub(crate) async fn own_links(&self) -> Vec<String> {
        Self::links(&self.own).await.iter().filter_map(name).collect()
    }

    async fn index(netlink: &Netlink, wanted: &str) -> u32 {
        let links = Self::links(netlink).await;
        links.iter().find(|link| name(link).as_deref() == Some(wanted)).unwrap().header.index
    }

    pub(crate) async fn inside_link(&self, wanted: &str) -> Option<Seen> {
        let links = Self::links(&self.inside).await;
        let link = links.into_iter().find(|link| name(link).as_deref() == Some(wanted))?;
        let (mut mac, mut mtu) = (Vec::new(), 0);
        for attribute in link.attributes {
            match attribute {
                LinkAttribute::Address(found) => mac = found,
                LinkAttribute::Mtu(found) => mtu = found,
                _ => {}
            }
        }
        Some(Seen { mac, mtu, up: link.header.flags.contains(LinkFlags::Up) })
    }

    /// Sorted; those that cannot be used yet are marked.
    pub(crate) async fn inside_addresses(&self, link: &str) -> Vec<String> {
        let index = Self::index(&self.inside, link).await;
        let request = RouteNetlinkMessage::GetAddress(AddressMessage::default());
        let mut seen = Vec::new();
        for message in self.inside.dump(request).await.unwrap() {
            let RouteNetlinkMessage::NewAddress(found) = message else { continue };
            if found.header.index != index {
                continue;
            }
            let address = found.attributes.iter().find_map(|attribute| match attribute {
                AddressAttribute::Address(address) => Some(address),
                _ => None,
            });
            let tentative = found.header.flags.contains(AddressHeaderFlags::Tentative);
            let mark = if tentative { " tentative" } else { "" };
            seen.push(format!("{}/{}{mark}", address.unwrap(), found.header.prefix_len));
        }
        seen.sort();
        seen
    }

    /// Unicast and nowhere-leading ones outside the kernel's own table, sorted.
    pub(crate) async fn inside_routes(&self, family: AddressFamily) -> Vec<String> {
        let mut request = RouteMessage::default();
        request.header.address_family = family;
        let mut seen = Vec::new();
        for message in self.inside.dump(RouteNetlinkMessage::GetRoute(request)).await.unwrap() {
            let RouteNetlinkMessage::NewRoute(route) = message else { continue };
            let kernels = family == AddressFamily::Inet6 && route.header.protocol == RouteProtocol::Kernel;
            if matches!(route.header.kind, RouteType::Local | RouteType::Broadcast | RouteType::Multicast)
                || kernels
            {
                continue;
            }
            let (mut to, mut via) = ("default".to_owned(), String::new());
            let (mut metric, mut table) = (String::new(), String::new());
            for attribute in &route.attributes {
                match attribute {
                    RouteAttribute::Destination(RouteAddress::Inet(address)) => {
                        to = format!("{address}/{}", route.header.destination_prefix_length);
                    }
                    RouteAttribute::Gateway(gateway) => via.push_str(&through(gateway)),
                    RouteAttribute::MultiPath(hops) => {
                        for hop in hops.iter().flat_map(|hop| &hop.attributes) {
                            if let RouteAttribute::Gateway(gateway) = hop {
                                via.push_str(&through(gateway));
                            }
                        }
                    }
                    RouteAttribute::Priority(number) if family == AddressFamily::Inet => {
                        metric = format!(" metric {number}");
                    }
                    RouteAttribute::Table(number) if *number != 254 => table = format!(" table {number}"),
                    _ => {}
                }
            }
            let text = format!("{to}{via}{metric}{table}");
            seen.push(text);
        }
        seen.sort();
        seen
    }

    pub(crate) async fn inside_neighbours(&self) -> Vec<String> {
        let request = RouteNetlinkMessage::GetNeighbour(NeighbourMessage::default());
        let mut seen = Vec::new();
        for message in self.inside.dump(request).await.unwrap() {
            let RouteNetlinkMessage::NewNeighbour(found) = message else { continue };
            let address = found.attributes.iter().find_map(|attribute| match attribute {
                NeighbourAttribute::Destination(address) => Some(address),
                _ => None,
            });
            if found.header.state == NeighbourState::Permanent
                && let Some(rtnetlink::packet_route::neighbour::NeighbourAddress::Inet(address)) = address
            {
                seen.push(address.to_string());
            }
        }
        seen
    }

    /// Priorities of those that are not the kernel's.
    pub(crate) async fn inside_rules(&self) -> Vec<u32> {
        let mut request = RuleMessage::default();
        request.header.family = AddressFamily::Inet;
        let mut seen = Vec::new();
        for message in self.inside.dump(RouteNetlinkMessage::GetRule(request)).await.unwrap() {
            let RouteNetlinkMessage::NewRule(rule) = message else { continue };
            seen.extend(rule.attributes.iter().find_map(|attribute| match attribute {
                RuleAttribute::Priority(priority) if *priority < 32766 => Some(*priority),
                _ => None,
            }));
        }
        seen
    }

    /// What a container with CAP_NET_ADMIN might do.
    pub(crate) async fn add_inside(&self, link: &str, address: &Address) {
        let index = Self::index(&self.inside, link).await;
        addresses::add(&self.inside, index, address).await.unwrap();
    }

    /// Gives the other end of a NIC an address, and sets it up.
    pub(crate) async fn give_peer(&self, slot: u8, own: &str, prefix: u8) {
        let peer = format!("peer{slot}");
        let index = Self::index(&self.own, &peer).await;
        let up = LinkUnspec::new_with_name(&peer).mtu(9000).up().build();
        self.own.request(RouteNetlinkMessage::SetLink(up), 0).await.unwrap();
        addresses::add(&self.own, index, &address(own, prefix)).await.unwrap();
    }
}
