//! Two servers in namespaces with a cable between them.

#![allow(clippy::unwrap_used)]

use std::net::SocketAddr;
use std::path::PathBuf;

use super::datagram::Blast;
use super::{PORT, Peer, Server, datagram, stream};
use crate::network::space::Space;

struct Two {
    _servers: [Server; 2],
    here: Space,
    _there: Space,
}

const HERE: &str = "192.0.2.1:7007";
const THERE: &str = "192.0.2.2:7007";
const THERE_6: &str = "[fd00::2]:7007";

fn address(text: &str) -> SocketAddr {
    let address: SocketAddr = text.parse().unwrap();
    assert_eq!(address.port(), PORT);
    address
}

impl Two {
    fn new(name: &str) -> Self {
        let here = Space::new(&format!("spore-{name}-1")).unwrap();
        let there = Space::new(&format!("spore-{name}-2")).unwrap();
        here.wire(("eth0", "192.0.2.1/24"), &there, ("eth0", "192.0.2.2/24")).unwrap();
        for (space, address) in [(&here, "fd00::1/64"), (&there, "fd00::2/64")] {
            space.ip("link set lo up").unwrap();
            space.ip(&format!("addr add {address} dev eth0 nodad")).unwrap();
            // Multicast goes where the default route goes.
            space.ip("route add default dev eth0").unwrap();
        }
        let servers = [&here, &there].map(|space| Server::start(&space.path()).unwrap());
        Self { _servers: servers, here, _there: there }
    }

    fn peer(&self) -> Peer {
        Peer { from: self.here.path(), address: address(THERE) }
    }
}

#[test]
fn streams_arrive_as_they_were_sent() {
    let two = Two::new("stream");
    two.here.within(|| stream::push(address(THERE), 5_000_001)).unwrap();
    two.here.within(|| stream::pull(address(THERE_6), 5_000_001)).unwrap();
    assert_eq!(two.peer().times(&format!("push {HERE} 3000000")).unwrap().len(), 1);
    assert_eq!(two.peer().times(&format!("pull {HERE} 3000000")).unwrap().len(), 1);
    assert_eq!(two.peer().times(&format!("trips {HERE} 64 10")).unwrap().len(), 10);
}

#[test]
fn a_held_stream_blocks_its_sender_and_then_arrives() {
    let two = Two::new("held");
    two.here.within(|| stream::push_held(address(THERE), 32 << 20)).unwrap();
}

#[test]
fn datagrams_come_back_at_every_size() {
    let two = Two::new("datagram");
    two.here.within(|| datagram::there_and_back(address(THERE), &[0, 1, 1472, 1473, 9000, 65507])).unwrap();
    two.peer().ask(&format!("datagrams {HERE} 5,50,500")).unwrap();
    two.here.within(|| datagram::whole(address(THERE_6), 1452)).unwrap();
    let error = two.here.within(|| datagram::whole(address(THERE_6), 1453)).unwrap_err();
    assert!(format!("{error:#}").contains("Message too long"), "{error:#}");
}

#[test]
fn datagrams_are_counted_where_they_arrive() {
    let two = Two::new("blast");
    let blast = two.here.within(|| datagram::blast(address(THERE), 64, 1000)).unwrap();
    assert!((1..=1000).contains(&blast.received), "{blast:?}");
    let blast: Blast = two.peer().ask(&format!("blast {HERE} 64 1000")).unwrap().parse().unwrap();
    assert!((1..=1000).contains(&blast.received), "{blast:?}");
    let flood = two.peer().begin("flood 192.0.2.1:9").unwrap();
    let sent: u64 = flood.finish().unwrap().parse().unwrap();
    assert!(sent < u64::MAX, "{sent}");
}

#[test]
fn a_group_hears_what_is_sent_to_it() {
    let two = Two::new("group");
    for group in ["239.1.2.3", "ff15::123"] {
        let mut joined = two.peer().begin(&format!("join {group} 5000")).unwrap();
        assert_eq!(joined.line().unwrap(), "joined");
        let here = Peer { from: two.here.path(), address: address("127.0.0.1:7007") };
        here.ask(&format!("send {group} 5000 hello")).unwrap();
        assert_eq!(joined.finish().unwrap(), "hello");
    }
}

#[test]
fn what_fails_there_is_told_here() {
    let two = Two::new("error");
    let error = two.peer().ask("push 192.0.2.1:1 10").unwrap_err();
    assert!(format!("{error:#}").contains("connecting to 192.0.2.1:1"), "{error:#}");
    assert!(two.peer().ask("nonsense").is_err());
    let nowhere = Peer { from: PathBuf::from("/run/netns/no-such"), address: address(HERE) };
    assert!(nowhere.ask("sink").is_err());
}
