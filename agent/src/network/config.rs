//! What the network shall be, in values that cannot be out of range. Made by [`super::decode`]
//! alone. Numbers are the kernel's own.

use std::net::IpAddr;

use rtnetlink::packet_route::AddressFamily;

/// Everything that one Update wants.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Config {
    pub interfaces: Vec<Interface>,
    pub routes: Vec<Route>,
    pub rules: Vec<Rule>,
    /// The containers have a name server.
    pub name_server: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Interface {
    pub slot: u8,
    pub name: String,
    pub mac: [u8; 6],
    pub mtu: u32,
    pub up: bool,
    pub no_arp: bool,
    pub addresses: Vec<Address>,
    pub neighbours: Vec<Neighbour>,
    /// By name, `ipv4/rp_filter`, in order.
    pub sysctls: Vec<(String, String)>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Address {
    pub address: IpAddr,
    pub prefix: u8,
    pub scope: u8,
    pub flags: u32,
    pub peer: Option<IpAddr>,
    pub broadcast: Option<std::net::Ipv4Addr>,
    pub label: String,
    pub metric: u32,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Neighbour {
    pub address: IpAddr,
    pub mac: Option<[u8; 6]>,
    pub proxy: bool,
    pub router: bool,
}

/// An address with the length of its prefix.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Prefix {
    pub address: Option<IpAddr>,
    pub length: u8,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Route {
    pub family: AddressFamily,
    pub destination: Prefix,
    pub source: Prefix,
    pub tos: u8,
    pub table: u32,
    pub protocol: u8,
    pub scope: u8,
    pub kind: u8,
    pub metric: u32,
    pub preferred_source: Option<IpAddr>,
    pub next_hops: Vec<NextHop>,
    /// By RTAX number, in order.
    pub metrics: Vec<(u16, u32)>,
    pub preference: u8,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NextHop {
    /// None: the loopback interface.
    pub slot: Option<u8>,
    pub gateway: Option<IpAddr>,
    pub onlink: bool,
    pub hops: u8,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rule {
    pub family: AddressFamily,
    pub priority: u32,
    pub action: u8,
    pub table: u32,
    pub source: Prefix,
    pub destination: Prefix,
    pub tos: u8,
    pub invert: bool,
    pub mark: Option<u32>,
    pub mask: Option<u32>,
    pub input: String,
    pub output: String,
    pub suppress_prefix_length: Option<u32>,
    pub ip_protocol: Option<u8>,
    pub source_ports: Option<(u16, u16)>,
    pub destination_ports: Option<(u16, u16)>,
    pub uids: Option<(u32, u32)>,
    pub goto_priority: Option<u32>,
    pub protocol: u8,
}

impl std::fmt::Display for Address {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.address, self.prefix)
    }
}

impl std::fmt::Display for Route {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.destination.address {
            Some(address) => write!(f, "{address}/{}", self.destination.length)?,
            None if self.family == AddressFamily::Inet6 => f.write_str("IPv6 default")?,
            None => f.write_str("default")?,
        }
        for gateway in self.next_hops.iter().filter_map(|hop| hop.gateway) {
            write!(f, " via {gateway}")?;
        }
        if self.table != 254 {
            write!(f, " in table {}", self.table)?;
        }
        Ok(())
    }
}
