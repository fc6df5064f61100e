//! What shim and agent share about the network beside `proto/spore/agent/v1/network.proto`: how a
//! NIC is known, the limits of an Update, and how questions reach the host's name server.
//!
//! A *question* is a connection of the agent's to [`crate::NAMES_PORT`]. Its first byte is
//! [`OVER_UDP`], then follows the datagram behind its length (u16, big-endian, as in RFC 1035, 4.2.2),
//! and one datagram comes back likewise; or it is [`OVER_TCP`], and what follows is the stream itself.
//! The shim closes a connection that it cannot, or will not, serve.

use std::net::Ipv4Addr;

/// NICs of a guest.
pub const MAX_SLOTS: u8 = 4;
/// Longest name of an interface in bytes.
pub const MAX_NAME: usize = 15;
/// Most addresses, neighbours and settings of an interface, routes, next hops of a route, rules.
pub const MAX_ADDRESSES: usize = 256;
pub const MAX_NEIGHBOURS: usize = 1024;
pub const MAX_SYSCTLS: usize = 64;
pub const MAX_ROUTES: usize = 4096;
pub const MAX_NEXT_HOPS: usize = 64;
pub const MAX_RULES: usize = 1024;
/// Settings of an interface that follow the host's, below `net/<family>/conf/<name>/`.
pub const SYSCTLS: [&str; 20] = [
    "ipv4/accept_local",
    "ipv4/accept_redirects",
    "ipv4/accept_source_route",
    "ipv4/arp_announce",
    "ipv4/arp_filter",
    "ipv4/arp_ignore",
    "ipv4/arp_notify",
    "ipv4/forwarding",
    "ipv4/proxy_arp",
    "ipv4/rp_filter",
    "ipv4/send_redirects",
    "ipv6/accept_dad",
    "ipv6/accept_ra",
    "ipv6/accept_ra_defrtr",
    "ipv6/accept_ra_pinfo",
    "ipv6/accept_redirects",
    "ipv6/autoconf",
    "ipv6/disable_ipv6",
    "ipv6/forwarding",
    "ipv6/use_tempaddr",
];

/// Docker's name server of user-defined networks. On the host dockerd listens there, in the guest the agent.
pub const NAME_SERVER: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 11);
/// The port of DNS.
pub const DOMAIN: u16 = 53;
/// First byte of a question.
pub const OVER_UDP: u8 = 0;
pub const OVER_TCP: u8 = 1;
/// Most questions of a guest at a time.
pub const MOST_QUESTIONS: usize = 64;

/// The permanent address of the NIC in a slot: locally administered, "spor", the slot. The guest
/// sees another one, the host interface's; this tells which device it is.
pub const fn permanent_mac(slot: u8) -> [u8; 6] {
    [0x02, b's', b'p', b'o', b'r', slot]
}

/// The slot whose NIC has this permanent address.
pub fn slot_of(mac: &[u8]) -> Option<u8> {
    (0..MAX_SLOTS).find(|slot| permanent_mac(*slot) == mac)
}

/// Whether the kernel takes it for an interface's name (`dev_valid_name`). Such a name is also one
/// component of a path.
pub fn is_name(name: &str) -> bool {
    !name.is_empty()
        && name.len() <= MAX_NAME
        && name != "."
        && name != ".."
        && !name.contains(|c: char| c == '/' || c == ':' || c == '%' || c == '\0' || c.is_ascii_whitespace())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_nic_is_known_by_its_slot() {
        assert_eq!(permanent_mac(3), [0x02, 0x73, 0x70, 0x6f, 0x72, 0x03]);
        assert_eq!(slot_of(&permanent_mac(2)), Some(2));
        assert_eq!(slot_of(&permanent_mac(MAX_SLOTS)), None);
        assert_eq!(slot_of(&[]), None);
    }

    #[test]
    fn names_are_the_kernels_and_lead_nowhere_else() {
        for good in ["eth0", "net1.100", "веth", "a@b"] {
            assert!(is_name(good), "{good}");
        }
        for bad in ["", ".", "..", "a/b", "a b", "a:1", "eth%d", "0123456789abcdef", "a\nb"] {
            assert!(!is_name(bad), "{bad}");
        }
    }
}
