//! What Docker's name server asks other servers, which it does from within the sandbox's namespace:
//! the answers would be redirected into the guest with everything else. While there is such a
//! server ([`super::names`]), three filters go before an interface's redirect:
//!
//! * ARP answers go to the guest and to the host's stack, which has to find its gateway (RFC 826).
//!   Questions go to the guest alone, so that the host still answers none.
//! * UDP and TCP from port 53 to one of the ports that the namespace's own sockets get, [`FIRST`] and
//!   beyond, go to the host's stack. The guest's own sockets get lower ones (Linux: up to 60999).
//!
//! Over IPv4 only.

use std::io;

use rtnetlink::packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::packet_route::tc::{
    TcFilterU32Option, TcHandle, TcMirrorActionType, TcU32Key, TcU32Selector, TcU32SelectorFlags,
};

use super::netlink::{Netlink, Refusal};
use super::redirect::{self, Failure, INGRESS_DISCIPLINE};

/// The first of the ports, up to 65535. Dockerd asks no more than 1024 questions at a time.
const FIRST: u16 = 0xfc00;
const RANGE: &str = "64512\t65535";
/// `/proc/sys/net` is the namespace's of the thread that looks.
const SETTING: &str = "/proc/sys/net/ipv4/ip_local_port_range";
/// Before the redirect.
const ARP_PRIORITY: u16 = 1;
const ANSWER_PRIORITY: u16 = 2;
const _: () = assert!(ARP_PRIORITY < redirect::PRIORITY && ANSWER_PRIORITY < redirect::PRIORITY);
/// Marks these filters.
const CLASS: TcHandle = TcHandle { major: 0xffff, minor: 53 };

const ETHERTYPE_IPV4: u16 = 0x0800;
const ETHERTYPE_ARP: u16 = 0x0806;
const TCP: u32 = 6;
const UDP: u32 = 17;
const DOMAIN: u32 = 53;

/// Whether a filter's option is the mark.
pub(super) fn is_mark(option: &TcFilterU32Option) -> bool {
    matches!(option, TcFilterU32Option::ClassId(class) if *class == CLASS)
}

/// Bytes of a packet, four from `offset` on, as they are on the wire.
fn key(offset: i32, value: u32, mask: u32) -> TcU32Key {
    let mut key = TcU32Key::default();
    (key.off, key.val, key.mask) = (offset, value.to_be(), mask.to_be());
    key
}

fn selector(keys: Vec<TcU32Key>) -> TcFilterU32Option {
    let mut selector = TcU32Selector::default();
    selector.flags = TcU32SelectorFlags::Terminal;
    selector.nkeys = u8::try_from(keys.len()).unwrap_or_default();
    selector.keys = keys;
    TcFilterU32Option::Selector(selector)
}

/// An answer to the namespace's own question: no options, no fragment, the ports.
fn answers(protocol: u32) -> Vec<TcU32Key> {
    vec![
        key(0, 0x4500_0000, 0xff00_0000),
        key(4, 0, 0x0000_3fff),
        key(8, protocol << 16, 0x00ff_0000),
        key(20, DOMAIN << 16 | u32::from(FIRST), 0xffff_0000 | u32::from(FIRST)),
    ]
}

/// Lets answers through to the host's stack, at the ingress of `link` before its redirect to `tap`.
pub(super) async fn let_through(netlink: &Netlink, link: u32, tap: u32) -> Result<(), Failure> {
    let mark = || TcFilterU32Option::ClassId(CLASS);
    let mirror = redirect::mirred(tap, TcMirrorActionType::EgressMirror);
    let arp_answer = vec![key(4, 2, 0x0000_ffff)];
    let filters = [
        (ARP_PRIORITY, ETHERTYPE_ARP, vec![mark(), selector(arp_answer), mirror]),
        (ANSWER_PRIORITY, ETHERTYPE_IPV4, vec![mark(), selector(answers(UDP))]),
        (ANSWER_PRIORITY, ETHERTYPE_IPV4, vec![mark(), selector(answers(TCP))]),
    ];
    for (priority, ethertype, options) in filters {
        let filter = redirect::u32_filter(link, priority, ethertype, options);
        let request = RouteNetlinkMessage::NewTrafficFilter(filter);
        let made = netlink.request(request, NLM_F_CREATE | NLM_F_EXCL).await;
        if let Err(refusal) = made {
            let _ = keep_back(netlink, link).await;
            return Err(("let answers to the name server's own questions through", refusal));
        }
    }
    Ok(())
}

/// Takes the filters away; those that are not there are none the less gone.
pub(super) async fn keep_back(netlink: &Netlink, link: u32) -> Result<(), Refusal> {
    for (priority, ethertype) in [(ARP_PRIORITY, ETHERTYPE_ARP), (ANSWER_PRIORITY, ETHERTYPE_IPV4)] {
        let mut filter = redirect::message(link);
        filter.header.parent = INGRESS_DISCIPLINE;
        filter.header.info = TcHandle { major: priority, minor: ethertype.to_be() }.into();
        redirect::gone(netlink.request(RouteNetlinkMessage::DelTrafficFilter(filter), 0).await)?;
    }
    Ok(())
}

/// The ports that the namespace's sockets get, as they are set while this lives.
#[derive(Debug)]
pub(super) struct Ports {
    before: String,
}

impl Ports {
    /// For a thread in the namespace, as long as it is there.
    pub(super) fn reserve() -> io::Result<Self> {
        let before = std::fs::read_to_string(SETTING)?;
        std::fs::write(SETTING, RANGE)?;
        Ok(Self { before })
    }
}

impl Drop for Ports {
    fn drop(&mut self) {
        // The namespace is somebody else's, who may have set others meanwhile; or it is going.
        if std::fs::read_to_string(SETTING).is_ok_and(|found| found.trim() == RANGE) {
            let _ = std::fs::write(SETTING, self.before.trim());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ports_are_those_that_the_filters_let_through() {
        let range: Vec<u16> = RANGE.split('\t').map(|port| port.parse().unwrap()).collect();
        assert_eq!(range, [FIRST, u16::MAX]);
        assert_eq!(FIRST.trailing_zeros() + FIRST.leading_ones(), u16::BITS, "a mask of its own");
    }
}
