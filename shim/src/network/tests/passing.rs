//! Frames: what one side's guest sends arrives at the other side unchanged.

use std::io::ErrorKind;
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::time::Duration;

use super::packet::{BROADCAST, DEADLINE, Nic, arp_answer, frame};
use super::space::{Space, desk, look};
use crate::network::desk::Desk;

const GUEST: [u8; 6] = [2, 0, 0, 0, 0, 0xaa];
const OTHER: [u8; 6] = [2, 0, 0, 0, 0, 0xbb];

/// Joins the only interface of a namespace; the thread is there afterwards.
async fn join(space: &Space) -> (Desk, Nic) {
    space.enter();
    let mut desk = desk();
    let new = look(&mut desk).await.joined.pop().unwrap();
    (desk, Nic::new(new.tap))
}

#[tokio::test]
async fn frames_of_every_kind_pass_both_ways_unchanged() {
    let (here, there) = (Space::new(), Space::new());
    here.veth("eth0", &there, "eth0", 9000).await;
    let (_desk, mut near) = join(&here).await;
    let (_desk, mut far) = join(&there).await;
    let filled = |length: usize| (0..=255u8).cycle().take(length).collect::<Vec<_>>();
    let ipv4 = |protocol: u8| {
        let mut packet = filled(40);
        (packet[0], packet[9]) = (0x45, protocol);
        packet
    };
    let mut ipv6 = filled(60);
    (ipv6[0], ipv6[6]) = (0x60, 17);
    let tagged = [&[0x61, 0x23, 0x08, 0x00][..], &ipv4(17)[..]].concat();
    let twice_tagged = [&[0, 5, 0x81, 0, 0, 6, 0x86, 0xdd][..], &ipv6[..]].concat();
    for (name, sent) in [
        ("UDP over IPv4", frame(OTHER, GUEST, 0x0800, &ipv4(17))),
        ("TCP to an address of nobody's", frame([2, 9, 9, 9, 9, 9], GUEST, 0x0800, &ipv4(6))),
        ("IPv6", frame(OTHER, GUEST, 0x86dd, &ipv6)),
        ("ARP", frame(BROADCAST, GUEST, 0x0806, &filled(28))),
        ("VLAN", frame(OTHER, GUEST, 0x8100, &tagged)),
        ("VLAN in VLAN", frame(OTHER, GUEST, 0x88a8, &twice_tagged)),
        ("multicast of IPv4", frame([1, 0, 0x5e, 0, 0, 0xfb], GUEST, 0x0800, &ipv4(17))),
        ("multicast of IPv6", frame([0x33, 0x33, 0, 0, 0, 0xfb], GUEST, 0x86dd, &ipv6)),
        ("no kind that the host knows", frame(OTHER, GUEST, 0x1234, &filled(100))),
        ("nothing behind the header", frame(OTHER, GUEST, 0x1235, &[])),
        ("one byte", frame(OTHER, GUEST, 0x1236, &[7])),
        ("9000 bytes", frame(OTHER, GUEST, 0x0800, &[&ipv4(17)[..], &filled(8960)[..]].concat())),
    ] {
        near.send(&sent);
        assert_eq!(far.receive(|found| found[6..14] == sent[6..14]), sent, "{name}");
        far.send(&sent);
        assert_eq!(near.receive(|found| found[6..14] == sent[6..14]), sent, "{name}, back");
    }
}

#[tokio::test]
async fn the_hosts_stack_does_not_answer_in_the_guests_place() {
    let (host, outside) = (Space::new(), Space::new());
    host.veth("eth0", &outside, "out0", 1500).await;
    host.address("eth0", "10.1.1.2", 24).await;
    outside.address("out0", "10.1.1.1", 24).await;
    // In the host's own stack somebody would answer.
    let listener = host.inside(|| TcpListener::bind("10.1.1.2:80").unwrap());
    listener.set_nonblocking(true).unwrap();
    let (_desk, mut guest) = join(&host).await;
    let connecting = outside.inside(|| {
        let udp = UdpSocket::bind("10.1.1.1:0").unwrap();
        udp.send_to(b"hello", "10.1.1.2:7").unwrap();
        udp
    });
    // The question is the guest's to answer, and nobody else has.
    let is_question = |found: &[u8]| arp_answer(found, GUEST, [10, 1, 1, 2]).is_some();
    let question = guest.receive(is_question);
    guest.send(&arp_answer(&question, GUEST, [10, 1, 1, 2]).unwrap());
    let datagram = guest.receive(|found| found[12..14] == [8, 0] && found.ends_with(b"hello"));
    assert_eq!(datagram[..6], GUEST, "sent to the one who has answered");
    drop(connecting);

    outside.inside(|| {
        let connect = || {
            let address = "10.1.1.2:80".parse().unwrap();
            TcpStream::connect_timeout(&address, Duration::from_millis(200))
        };
        assert_eq!(connect().unwrap_err().kind(), ErrorKind::TimedOut, "neither accepted nor refused");
    });
    let syn = guest.receive(|found| found[12..14] == [8, 0] && found[23] == 6);
    assert_eq!(syn[14 + 20 + 13], 2, "SYN");
    assert_eq!(listener.accept().unwrap_err().kind(), ErrorKind::WouldBlock);
}

#[tokio::test]
async fn a_slow_guest_gets_what_waits_in_the_tap() {
    let (here, there) = (Space::new(), Space::new());
    here.veth("eth0", &there, "eth0", 1500).await;
    let (_desk, mut near) = join(&here).await;
    let (_desk, mut far) = join(&there).await;
    for number in 0..200u8 {
        near.send(&frame(OTHER, GUEST, 0x1234, &[number; 64]));
    }
    for number in 0..200u8 {
        assert_eq!(far.receive(|found| found[12..14] == [0x12, 0x34])[14], number);
    }
}

#[tokio::test]
async fn a_network_that_takes_no_more_says_so() {
    let (here, there) = (Space::new(), Space::new());
    here.veth("eth0", &there, "eth0", 1500).await;
    let (_desk, mut near) = join(&here).await;
    let (_desk, mut far) = join(&there).await;
    here.slow("eth0").await;
    let sent = (0u16..).find(|number| {
        let numbered = [&number.to_be_bytes()[..], &[0; 62]].concat();
        !near.offer(&frame(OTHER, GUEST, 0x1234, &numbered))
    });
    let sent = sent.unwrap();
    assert!((100..1000).contains(&sent), "{sent} frames, less than the next queue has room for");
    assert!(!near.is_writable(Duration::ZERO));
    here.unslow("eth0").await;
    assert!(near.is_writable(DEADLINE), "what was under way is gone");
    near.send(&frame(OTHER, GUEST, 0x1234, &[0xff; 64]));
    let is_ours = |found: &[u8]| found[12..14] == [0x12, 0x34];
    let arrived = std::iter::from_fn(|| Some(far.receive(is_ours))).take_while(|found| found[14] != 0xff);
    for (number, found) in arrived.enumerate() {
        assert_eq!(
            usize::from(u16::from_be_bytes([found[14], found[15]])),
            number,
            "none was dropped on the way"
        );
    }
}

#[tokio::test]
async fn other_kinds_of_links_carry_frames_too() {
    let (here, there) = (Space::new(), Space::new());
    // A macvlan on one end, a bridge with the pair's other end as its port on the other.
    here.veth("under0", &there, "port0", 1500).await;
    super::joining::macvlan(&here, "eth0", "under0").await;
    super::joining::bridge(&there, "br0", "port0").await;
    let spare = Space::new();
    super::joining::send_away(&here, "eth0", &spare).await;
    let (_desk, mut near) = join(&spare).await;
    let (_desk, mut far) = join(&there).await;
    let (macvlan, bridge) = (spare.mac("eth0").await, there.mac("br0").await);
    let there_and_back =
        [frame(bridge, macvlan, 0x1234, b"to the bridge"), frame(macvlan, bridge, 0x1234, b"and back")];
    near.send(&there_and_back[0]);
    assert_eq!(far.receive(|found| found[12..14] == [0x12, 0x34]), there_and_back[0]);
    far.send(&there_and_back[1]);
    assert_eq!(near.receive(|found| found[12..14] == [0x12, 0x34]), there_and_back[1]);
}
