//! What the guest's network shall be: the joined interfaces of the namespace and what belongs to
//! them. Numbers are the kernel's own, as in `network.proto` of the agent's API.

use std::collections::BTreeMap;
use std::net::IpAddr;

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Mirror {
    pub(crate) interfaces: Vec<Interface>,
    pub(crate) routes: Vec<Route>,
    pub(crate) rules: Vec<Rule>,
    /// The namespace has a name server at 127.0.0.11.
    pub(crate) name_server: bool,
}

impl Mirror {
    /// Leaves an interface out that has no tap.
    pub(crate) fn forget(&mut self, slot: u8) {
        self.interfaces.retain(|interface| interface.slot != slot);
        let through = |hop: &NextHop| hop.slot == Some(slot);
        self.routes.retain(|route| !route.next_hops.iter().any(through));
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Interface {
    pub(crate) slot: u8,
    pub(crate) name: String,
    pub(crate) mac: Vec<u8>,
    pub(crate) mtu: u32,
    pub(crate) up: bool,
    pub(crate) no_arp: bool,
    pub(crate) addresses: Vec<Address>,
    pub(crate) neighbours: Vec<Neighbour>,
    pub(crate) sysctls: BTreeMap<String, String>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Address {
    pub(crate) address: IpAddr,
    pub(crate) prefix: u8,
    pub(crate) scope: u8,
    pub(crate) flags: u32,
    pub(crate) peer: Option<IpAddr>,
    pub(crate) broadcast: Option<IpAddr>,
    pub(crate) label: String,
    pub(crate) metric: u32,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Neighbour {
    pub(crate) address: IpAddr,
    /// Empty for a proxy entry.
    pub(crate) mac: Vec<u8>,
    pub(crate) proxy: bool,
    pub(crate) router: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Route {
    pub(crate) ipv6: bool,
    /// None: all addresses.
    pub(crate) destination: Option<IpAddr>,
    pub(crate) destination_prefix: u8,
    pub(crate) source: Option<IpAddr>,
    pub(crate) source_prefix: u8,
    pub(crate) tos: u8,
    pub(crate) table: u32,
    pub(crate) protocol: u8,
    pub(crate) scope: u8,
    pub(crate) kind: u8,
    pub(crate) metric: u32,
    pub(crate) preferred_source: Option<IpAddr>,
    pub(crate) next_hops: Vec<NextHop>,
    /// By RTAX number.
    pub(crate) metrics: BTreeMap<u32, u32>,
    pub(crate) preference: u8,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct NextHop {
    /// None: the loopback interface.
    pub(crate) slot: Option<u8>,
    pub(crate) gateway: Option<IpAddr>,
    pub(crate) onlink: bool,
    pub(crate) hops: u8,
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Rule {
    pub(crate) ipv6: bool,
    pub(crate) priority: u32,
    pub(crate) action: u8,
    pub(crate) table: u32,
    pub(crate) source: Option<IpAddr>,
    pub(crate) source_prefix: u8,
    pub(crate) destination: Option<IpAddr>,
    pub(crate) destination_prefix: u8,
    pub(crate) tos: u8,
    pub(crate) invert: bool,
    pub(crate) mark: Option<u32>,
    pub(crate) mask: Option<u32>,
    pub(crate) input: String,
    pub(crate) output: String,
    pub(crate) suppress_prefix_length: Option<u32>,
    pub(crate) ip_protocol: Option<u8>,
    pub(crate) source_ports: Option<(u16, u16)>,
    pub(crate) destination_ports: Option<(u16, u16)>,
    pub(crate) uids: Option<(u32, u32)>,
    pub(crate) goto_priority: Option<u32>,
    pub(crate) protocol: u8,
}

/// Counters of an interface, as the namespace has them: what the guest received and sent.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Counters {
    pub(crate) name: String,
    pub(crate) rx_bytes: u64,
    pub(crate) rx_packets: u64,
    pub(crate) rx_errors: u64,
    pub(crate) rx_dropped: u64,
    pub(crate) tx_bytes: u64,
    pub(crate) tx_packets: u64,
    pub(crate) tx_errors: u64,
    pub(crate) tx_dropped: u64,
}
