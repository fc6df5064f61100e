//! What is joined, what is refused, and what is left afterwards.

use std::os::fd::AsRawFd;

use nix::errno::Errno;
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::packet_route::link::LinkAttribute;
use rtnetlink::packet_route::tc::{TcAttribute, TcHandle, TcMessage};
use rtnetlink::{LinkBridge, LinkMacVlan, LinkUnspec};

use super::packet::{Nic, tun};
use super::space::{Space, desk, look, refusal};
use crate::network::desk::Desk;
use crate::network::netlink::{Netlink, Refusal};
use crate::network::redirect::{self, Kinds};
use crate::network::{probe, reclaim, tap};

pub(super) async fn macvlan(space: &Space, name: &str, under: &str) {
    let under = space.index(under).await;
    let mode = rtnetlink::packet_route::link::MacVlanMode::Bridge;
    space.request(RouteNetlinkMessage::NewLink(LinkMacVlan::new(name, under, mode).build())).await;
    space.set(LinkUnspec::new_with_name(name).up().build()).await;
}

pub(super) async fn bridge(space: &Space, name: &str, port: &str) {
    space.request(RouteNetlinkMessage::NewLink(LinkBridge::new(name).build())).await;
    let index = space.index(name).await;
    space.set(LinkUnspec::new_with_name(port).controller(index).build()).await;
    space.set(LinkUnspec::new_with_name(name).up().build()).await;
}

pub(super) async fn send_away(from: &Space, name: &str, to: &Space) {
    let mut message = LinkUnspec::new_with_index(from.index(name).await).build();
    message.attributes.push(LinkAttribute::NetNsFd(to.file.as_raw_fd()));
    from.set(message).await;
    to.set(LinkUnspec::new_with_name(name).up().build()).await;
}

/// A namespace with these interfaces, whose other ends are outside.
async fn with(names: &[&str]) -> (Space, Space) {
    let (space, outside) = (Space::new(), Space::new());
    for name in names {
        space.veth(name, &outside, name, 1500).await;
    }
    space.enter();
    (space, outside)
}

#[tokio::test]
async fn what_is_left_is_nothing() {
    let (space, _outside) = with(&["eth0", "eth1"]).await;
    let before = space.counts().await;
    let mut desk = desk();
    let looked = look(&mut desk).await;
    let slots: Vec<_> = looked.joined.iter().map(|new| (new.slot, new.name.as_str())).collect();
    assert_eq!(slots, [(0, "eth0"), (1, "eth1")]);
    assert_eq!(looked.mirror.unwrap().interfaces.len(), 2);
    let joined = space.counts().await;
    assert_eq!((joined.0, joined.1), (before.0 + 2, before.1 + 4));
    assert!(look(&mut desk).await.joined.is_empty(), "a second look finds nothing new");
    // The taps go though somebody still has their descriptors.
    desk.leave_all().await.unwrap();
    assert_eq!(space.counts().await, before);
    let mut nic = Nic::new(looked.joined.into_iter().next().unwrap().tap);
    assert!(nic.is_dead());
    assert_eq!(look(&mut desk).await.joined.len(), 2, "and can be joined again");
}

#[tokio::test]
async fn an_interface_that_disappears_takes_its_tap_with_it_and_frees_its_slot() {
    let (space, outside) = with(&["eth0", "eth1"]).await;
    let mut desk = desk();
    let looked = look(&mut desk).await;
    let before = space.counts().await;
    outside.delete("eth0").await;
    let after = look(&mut desk).await;
    assert_eq!(after.left, [0]);
    let mirror = after.mirror.unwrap();
    assert_eq!(
        mirror.interfaces.iter().map(|one| (one.slot, one.name.as_str())).collect::<Vec<_>>(),
        [(1, "eth1")]
    );
    assert_eq!(space.counts().await.0, before.0 - 2);
    space.veth("net9", &outside, "net9", 1500).await;
    let again = look(&mut desk).await;
    assert_eq!((again.joined[0].slot, again.joined[0].name.as_str()), (0, "net9"));
    drop(looked);
}

#[tokio::test]
async fn an_mtu_is_the_taps_too_when_it_changes() {
    let (space, _outside) = with(&["eth0"]).await;
    let mut desk = desk();
    let _first = look(&mut desk).await;
    assert_eq!(space.link("spore0").await.unwrap().mtu, 1500);
    space.set(LinkUnspec::new_with_name("eth0").mtu(9000).build()).await;
    assert_eq!(look(&mut desk).await.mirror.unwrap().interfaces[0].mtu, 9000);
    assert_eq!(space.link("spore0").await.unwrap().mtu, 9000);
}

#[tokio::test]
async fn what_carries_no_ethernet_is_refused_and_the_rest_is_joined() {
    let (space, _outside) = with(&["eth0"]).await;
    let _tun = tun("tun0");
    assert_eq!(desk().look().await.unwrap().refused.len(), 0, "it is not in use");
    space.set(LinkUnspec::new_with_name("tun0").up().build()).await;
    let mut desk = desk();
    desk.leave_all().await.unwrap();
    let (message, looked) = refusal(&mut desk).await;
    assert!(
        message.contains("interface tun0: tun, which does not carry Ethernet, cannot be joined"),
        "{message}"
    );
    assert_eq!(looked.joined[0].name, "eth0");
}

#[tokio::test]
async fn there_are_only_so_many_slots() {
    let (_space, _outside) = with(&["a0", "a1", "a2", "a3", "a4"]).await;
    let (message, looked) = refusal(&mut desk()).await;
    assert!(message.contains("interface a4: there are 4 in the virtual machine already"), "{message}");
    assert_eq!(looked.joined.len(), 4);
}

#[tokio::test]
async fn a_second_sandbox_on_the_same_interface_is_refused() {
    let (space, _outside) = with(&["eth0"]).await;
    let mut first = desk();
    let joined = look(&mut first).await;
    let before = space.counts().await;
    let mut second = desk();
    let (message, looked) = refusal(&mut second).await;
    assert!(message.contains("interface eth0: another virtual machine is joined to it"), "{message}");
    assert!(message.contains("--network container:"), "{message}");
    assert!(looked.joined.is_empty() && looked.mirror.unwrap().interfaces.is_empty());
    second.leave_all().await.unwrap();
    assert_eq!(space.counts().await, before, "the first one's is as it was");
    drop(joined);
}

#[tokio::test]
async fn what_a_killed_shim_has_left_is_replaced() {
    let (space, _outside) = with(&["eth0"]).await;
    let before = space.counts().await;
    drop(look(&mut desk()).await);
    assert_eq!(space.counts().await.1, before.1 + 1, "the redirect to a tap that is gone");
    let mut next = desk();
    let _joined = look(&mut next).await;
    next.leave_all().await.unwrap();
    assert_eq!(space.counts().await, before);
}

#[tokio::test]
async fn delete_removes_what_a_killed_shim_has_left_and_nothing_else() {
    let (space, _outside) = with(&["eth0", "eth1"]).await;
    let before = space.counts().await;
    drop(look(&mut desk()).await);
    discipline(&space, "lo").await;
    let path = format!("/proc/self/fd/{}", space.file.as_raw_fd());
    reclaim(path.as_ref()).unwrap();
    let (links, disciplines, filters) = space.counts().await;
    assert_eq!((links, disciplines, filters), (before.0, before.1 + 1, before.2));
    let mut alive = desk();
    let joined = look(&mut alive).await;
    let before = space.counts().await;
    reclaim(path.as_ref()).unwrap();
    assert_eq!(space.counts().await, before, "a living sandbox keeps its redirects");
    drop(joined);
    reclaim("/var/run/netns/no-such".as_ref()).unwrap();
}

/// An ingress discipline of somebody else's.
async fn discipline(space: &Space, name: &str) {
    let mut message = TcMessage::with_index(space.index(name).await.cast_signed());
    message.header.parent = TcHandle::INGRESS;
    message.header.handle = TcHandle { major: 0xffff, minor: 0 };
    message.attributes.push(TcAttribute::Kind("ingress".into()));
    space.request(RouteNetlinkMessage::NewQueueDiscipline(message)).await;
}

#[tokio::test]
async fn somebody_elses_filters_are_left_alone() {
    let (space, _outside) = with(&["eth0"]).await;
    discipline(&space, "eth0").await;
    let before = space.counts().await;
    let (message, _) = refusal(&mut desk()).await;
    assert!(
        message.contains("it has an ingress queueing discipline already; remove it (tc qdisc del dev eth0"),
        "{message}"
    );
    assert_eq!(space.counts().await, before);
}

#[tokio::test]
async fn a_kernel_without_the_tc_parts_is_told_and_nothing_is_left() {
    let (space, _outside) = with(&["eth0"]).await;
    let before = space.counts().await;
    for (kinds, module) in [
        (Kinds { discipline: "nosuchqdisc", ..Kinds::default() }, "sch_ingress"),
        (Kinds { filter: "nosuchfilter", ..Kinds::default() }, "cls_u32"),
        (Kinds { action: "nosuchaction", ..Kinds::default() }, "act_mirred"),
    ] {
        let mut desk = Desk::new(Netlink::open().unwrap(), false).with_kinds(kinds);
        let (message, looked) = refusal(&mut desk).await;
        assert!(message.contains("interface eth0: join it to the virtual machine: add "), "{message}");
        let mend = format!("modprobe {module}");
        assert!(message.ends_with(&mend), "{message}");
        assert!(looked.joined.is_empty());
        assert_eq!(space.counts().await, before, "{kinds:?}");
        assert_eq!(probe::redirects_by(kinds).unwrap_err().mend, mend, "what the doctor says");
    }
}

#[tokio::test]
async fn a_container_with_a_user_namespace_has_no_interface() {
    let (_space, _outside) = with(&["eth0"]).await;
    let (message, _) = refusal(&mut Desk::new(Netlink::open().unwrap(), true)).await;
    assert!(message.contains("interface eth0: a container with a user namespace"), "{message}");
    let (_space, _outside) = with(&[]).await;
    look(&mut Desk::new(Netlink::open().unwrap(), true)).await;
}

#[tokio::test]
async fn ports_of_a_bridge_are_the_bridges() {
    let (space, _outside) = with(&["port0"]).await;
    bridge(&space, "br0", "port0").await;
    let joined: Vec<_> = look(&mut desk()).await.joined.into_iter().map(|new| new.name).collect();
    assert_eq!(joined, ["br0"]);
}

#[tokio::test]
async fn an_interface_that_nobody_uses_yet_waits() {
    let (space, _outside) = with(&["eth0"]).await;
    space.set(LinkUnspec::new_with_name("eth0").down().build()).await;
    let mut desk = desk();
    assert!(look(&mut desk).await.joined.is_empty());
    space.address("eth0", "10.1.1.2", 24).await;
    let looked = look(&mut desk).await;
    assert_eq!((looked.joined.len(), looked.mirror.unwrap().interfaces[0].up), (1, false));
    space.set(LinkUnspec::new_with_name("eth0").up().build()).await;
    assert!(look(&mut desk).await.mirror.unwrap().interfaces[0].up);
}

#[tokio::test]
async fn a_redirect_to_a_link_that_is_gone_says_so() {
    let (space, _outside) = with(&["eth0"]).await;
    let before = space.counts().await;
    let missing = redirect::make(&space.netlink, space.index("eth0").await, 9999, Kinds::default()).await;
    let (operation, Refusal { errno, .. }) = missing.unwrap_err();
    assert_eq!((operation, errno), ("add a redirecting filter", Errno::ENODEV));
    assert_eq!(space.counts().await, before);
}

#[tokio::test]
async fn the_host_says_nothing_of_its_own_on_a_tap() {
    let (space, _outside) = with(&["eth0"]).await;
    let _joined = look(&mut desk()).await;
    let disabled = space.inside(|| std::fs::read_to_string("/proc/sys/net/ipv6/conf/spore0/disable_ipv6"));
    assert_eq!(disabled.unwrap(), "1\n");
}

#[test]
fn this_host_can_join_interfaces() {
    assert!(probe::taps().unwrap().contains("/dev/net/tun"));
    probe::redirects().unwrap();
    assert!(!std::fs::read_to_string("/proc/net/dev").unwrap().contains(tap::PREFIX));
}
