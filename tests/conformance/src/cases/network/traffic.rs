//! What goes through a container's interface. A program in it serves and asks (`traffic` of the
//! harness); another on the host's side, at the bridge's address.

use anyhow::{Context, Result, ensure};
use serde_json::json;
use spore_harness::bed::Subject;
use spore_harness::network::traffic::{Peer, datagram, stream};

use crate::cases::{Case, equal};
use crate::guest::Guest;
use crate::lan::{Addresses, Lan, in_lan, said};

pub(crate) const CASES: &[Case] = &[
    Case::new("network: UDP, from nothing to the longest datagram", udp).starts(1),
    Case::new("network: ICMP and ICMPv6, both ways", ping).starts(1),
    Case::new("network: multicast between two containers", multicast).starts(2),
    Case::new("network: an MTU of 9000 between two containers", jumbo).starts(2),
    Case::new("network: a receiver that does not read gets every byte later", slow).starts(1),
    Case::new("network: a flood from a container leaves the host and others alive", flood).starts(2),
    Case::new("network: 100 MiB each way, byte for byte", large).starts(1),
];

const NUMBER: u8 = 60;
const MIB: u64 = 1 << 20;
/// More than sender's and receiver's buffers hold together.
const BEYOND_BUFFERS: u64 = 32 * MIB;

/// With a container on a bridge that serves traffic.
fn with_one(
    subject: &Subject,
    act: impl FnOnce(&Lan, &Guest, &Peer, &Addresses) -> Result<()>,
) -> Result<()> {
    in_lan(subject, |lan| {
        let (place, addresses) = lan.place_in(&lan.bridge(NUMBER))?;
        let (guest, peer) = lan.serving(&place, &addresses)?;
        act(lan, &guest, &peer, &addresses)
    })
}

/// Two containers on a bridge of that MTU: how each is asked, and its addresses.
fn with_two(
    subject: &Subject,
    mtu: u32,
    act: impl FnOnce(&Lan, &[(Guest, Peer, Addresses); 2]) -> Result<()>,
) -> Result<()> {
    in_lan(subject, |lan| {
        let mut network = lan.bridge(NUMBER);
        network.plugins[0]["mtu"] = json!(mtu);
        let one = || -> Result<_> {
            let (place, addresses) = lan.place_in(&network)?;
            let (guest, peer) = lan.serving(&place, &addresses)?;
            Ok((guest, peer, addresses))
        };
        act(lan, &[one()?, one()?])
    })
}

fn udp(subject: &Subject) -> Result<()> {
    const SIZES: [usize; 7] = [0, 1, 64, 1472, 1473, 9000, 65_507];
    with_one(subject, |lan, _, peer, addresses| {
        lan.host.within(|| datagram::there_and_back(peer.address, &SIZES)).context("to the container")?;
        lan.host.within(|| datagram::there_and_back(addresses.server_6(), &SIZES)).context("over IPv6")?;
        let sizes = SIZES.map(|size| size.to_string()).join(",");
        peer.ask(&format!("datagrams {} {sizes}", Lan::server(NUMBER)))
            .map(drop)
            .context("from the container")
    })
}

fn ping(subject: &Subject) -> Result<()> {
    with_one(subject, |lan, guest, _, addresses| {
        // Whole, and in pieces.
        let count = |text: &str| text.matches("bytes from").count();
        let script = format!(
            "ping -c 3 -i 0.2 10.{NUMBER}.0.1 && ping -c 3 -i 0.2 -s 4000 10.{NUMBER}.0.1 && ping -c 3 -i 0.2 fd00:{NUMBER}::1"
        );
        let told = guest.shell(&script)?;
        ensure!(count(&told) == 9, "{told}");
        for address in [addresses.v4, addresses.v6] {
            let mut command = lan.host.command("busybox");
            command.args(["ping", "-c", "3", "-i", "0.2", &address.to_string()]);
            let told = said(command)?;
            ensure!(count(&told) == 3, "{told}");
        }
        Ok(())
    })
}

fn multicast(subject: &Subject) -> Result<()> {
    with_two(subject, 1500, |_, [(_, one, _), (_, other, _)]| {
        for group in ["239.1.2.3", "ff15::123"] {
            let mut joined = one.begin(&format!("join {group} 5000"))?;
            equal("the receiver", &joined.line()?, "joined")?;
            other.ask(&format!("send {group} 5000 to-all"))?;
            equal(group, &joined.finish()?, "to-all")?;
        }
        Ok(())
    })
}

fn jumbo(subject: &Subject) -> Result<()> {
    // Less the headers of IPv6 and UDP.
    const WHOLE: usize = 9000 - 40 - 8;
    with_two(subject, 9000, |_, [(guest, one, _), (_, _, far)]| {
        equal("its MTU", guest.shell("cat /sys/class/net/eth0/mtu")?.trim_end(), "9000")?;
        one.ask(&format!("whole {} {WHOLE}", far.server_6()))?;
        let refused = one.ask(&format!("whole {} {}", far.server_6(), WHOLE + 1));
        let error = refused.err().context("a datagram longer than the MTU went whole")?;
        ensure!(format!("{error:#}").contains("Message too long"), "{error:#}");
        one.times(&format!("push {} {}", far.server_6(), 4 * MIB)).map(drop)
    })
}

fn slow(subject: &Subject) -> Result<()> {
    with_one(subject, |lan, _, peer, _| {
        lan.host.within(|| stream::push_held(peer.address, BEYOND_BUFFERS)).context("in the container")?;
        let job = format!("push-held {} {BEYOND_BUFFERS}", Lan::server(NUMBER));
        peer.ask(&job).map(drop).context("on the host")
    })
}

fn flood(subject: &Subject) -> Result<()> {
    with_two(subject, 1500, |lan, [(guest, flooding, _), (_, quiet, _)]| {
        // To a port where nobody is, on the host, which so has an answer to send for each.
        let flood = flooding.begin(&format!("flood 10.{NUMBER}.0.1:9"))?;
        lan.host
            .within(|| stream::push(quiet.address, MIB))
            .context("another container, during the flood")?;
        quiet.times(&format!("trips {} 64 10", Lan::server(NUMBER))).context("the host, during the flood")?;
        guest.shell("true").context("an exec in the container that floods")?;
        let sent: u64 = flood.finish()?.parse()?;
        ensure!(sent > 1000, "{sent} datagrams are no flood");
        lan.host
            .within(|| stream::push(flooding.address, MIB))
            .context("the same container, afterwards")
            .map(drop)
    })
}

fn large(subject: &Subject) -> Result<()> {
    with_one(subject, |lan, _, peer, _| {
        lan.host.within(|| stream::push(peer.address, 100 * MIB)).context("to the container")?;
        lan.host.within(|| stream::pull(peer.address, 100 * MIB)).context("from the container").map(drop)
    })
}
