//! What the host does with a container's traffic: ports that it publishes, rules that it keeps, captures
//! and counters.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde_json::json;
use spore_harness::api;
use spore_harness::bed::Subject;
use spore_harness::call::Call;
use spore_harness::network::space::{self, Space};
use spore_harness::network::traffic::stream;
use spore_harness::wait;

use crate::cases::{Case, equal};
use crate::lan::{CONTENT, DEADLINE, Lan, WEB, fetch, fetched, in_lan, said};

pub(crate) const CASES: &[Case] = &[
    Case::new("network: published ports, from outside, the host, and the container itself", ports).starts(1),
    Case::new("network: nftables on the host's side drops what it is told to", rules).starts(1),
    Case::new("network: tcpdump in the namespace sees both directions", capture).starts(1),
    Case::new("network: counters of the interface move, on the host and in Stats", counters).starts(1),
];

const NUMBER: u8 = 70;
const MIB: u64 = 1 << 20;

/// Another host, 192.0.2.2, on a cable to the containers' one, which is 192.0.2.1.
fn outside(lan: &Lan) -> Result<Space> {
    let outside = Space::new(&lan.subject.id("outside"))?;
    outside.wire(("eth0", "192.0.2.2/24"), &lan.host, ("uplink", "192.0.2.1/24"))?;
    outside.ip("route add 10.0.0.0/8 via 192.0.2.1")?;
    Ok(outside)
}

fn ports(subject: &Subject) -> Result<()> {
    in_lan(subject, |lan| {
        let outside = outside(lan)?;
        let mut network = lan.bridge(NUMBER);
        network.plugins.push(json!({ "type": "portmap", "capabilities": { "portMappings": true } }));
        let mapping = json!([{ "hostPort": 8080, "containerPort": 80, "protocol": "tcp" }]);
        let place = lan.place()?;
        lan.attach(&network, &place, "eth0", json!({ "portMappings": mapping }))?;
        let guest = lan.guest_with(&place, &[], &["sh", "-c", WEB])?;
        equal("from outside", &fetched(&outside.path(), "http://192.0.2.1:8080/")?, CONTENT)?;
        equal("from the host", &fetched(&lan.host.path(), "http://127.0.0.1:8080/")?, CONTENT)?;
        let itself = guest.shell("wget -q -T 20 -O - http://192.0.2.1:8080/")?;
        equal("from the container itself", &itself, CONTENT)
    })
}

/// As an engine for NetworkPolicy would say: nobody may reach the container's port 81, and it may reach
/// port 81 of nobody.
const RULES: &str = "table inet refuses { chain forward { type filter hook forward priority 0; policy accept; \
                     ip daddr 10.70.0.2 tcp dport 81 drop; ip saddr 10.70.0.2 tcp dport 81 drop; }; }";

fn rules(subject: &Subject) -> Result<()> {
    in_lan(subject, |lan| {
        let outside = outside(lan)?;
        let (place, _) = lan.place_in(&lan.bridge(NUMBER))?;
        let guest = lan.guest_with(&place, &[], &["sh", "-c", WEB])?;
        let _webs = [lan.web_in(&outside, 80)?, lan.web_in(&outside, 81)?];
        let nft = |line: &str| {
            let mut command = lan.host.command("nft");
            command.arg(line);
            said(command)
        };
        let outward = |port: u16| {
            guest.exec(&["wget", "-q", "-T", "3", "-O", "-", &format!("http://192.0.2.2:{port}/")])
        };
        let inward = |port: u16| format!("http://10.{NUMBER}.0.2:{port}/");
        for port in [80, 81] {
            equal("before", &fetched(&outside.path(), &inward(port))?, CONTENT)?;
        }
        nft(RULES)?;
        equal("another port, to the container", &fetched(&outside.path(), &inward(80))?, CONTENT)?;
        equal("another port, from the container", &outward(80)?.text(), CONTENT)?;
        let output = fetch(&outside.path(), &inward(81))?;
        ensure!(!output.success(), "what is to be dropped reaches the container: {output}");
        let output = outward(81)?;
        ensure!(!output.success(), "what is to be dropped leaves the container: {output}");
        nft("delete table inet refuses")?;
        equal("from the container, without the rules", &outward(81)?.text(), CONTENT)
    })
}

fn capture(subject: &Subject) -> Result<()> {
    in_lan(subject, |lan| {
        let (place, _) = lan.place_in(&lan.bridge(NUMBER))?;
        let guest = lan.guest(&place)?;
        let mut command = place.space.command("tcpdump");
        command.args(["-n", "-l", "-i", "eth0", "-c", "4", "icmp"]);
        let mut capture = Call::new(command).spawn()?;
        // The first may be too early.
        wait::until("tcpdump has four packets", DEADLINE, || {
            guest.shell(&format!("ping -c 1 10.{NUMBER}.0.1")).ok()?;
            capture.ended().ok()?.then_some(())
        })?;
        let output = capture.wait()?;
        let (request, reply) =
            (format!("10.{NUMBER}.0.2 > 10.{NUMBER}.0.1: ICMP echo request"), "ICMP echo reply");
        ensure!(output.text().contains(&request) && output.text().contains(reply), "{output}");
        Ok(())
    })
}

/// Received and sent bytes of the namespace's `eth0`, as `docker stats`, kubelet and others read them.
fn counted(namespace: &Path) -> Result<[u64; 2]> {
    let mut command = space::command(namespace, "cat");
    command.arg("/proc/self/net/dev");
    let text = said(command)?;
    let line = text.lines().find_map(|line| line.trim_start().strip_prefix("eth0:"));
    let numbers: Vec<u64> =
        line.into_iter().flat_map(str::split_whitespace).map_while(|word| word.parse().ok()).collect();
    match numbers[..] {
        [received, _, _, _, _, _, _, _, sent, ..] => Ok([received, sent]),
        _ => anyhow::bail!("no counters of eth0 in {text}"),
    }
}

/// The same of the task's metrics, if they have it.
fn told(subject: &Subject, id: &str) -> Result<Option<[u64; 2]>> {
    let metrics = api::metrics(subject, id)?;
    // Metrics.network; of it NetworkStat's name, rx_bytes and tx_bytes.
    for network in fields(&metrics)?.into_iter().filter(|(number, _)| *number == 9) {
        let fields = fields(network.1.bytes())?;
        let field = |wanted: u64| fields.iter().find(|(number, _)| *number == wanted).map(|(_, value)| value);
        if field(1).is_some_and(|name| name.bytes() == b"eth0") {
            return Ok(Some([2, 6].map(|number| field(number).map_or(0, Value::number))));
        }
    }
    Ok(None)
}

/// A value of a message of protobuf's.
enum Value<'a> {
    Number(u64),
    Bytes(&'a [u8]),
}

impl Value<'_> {
    fn number(&self) -> u64 {
        if let Self::Number(number) = self { *number } else { 0 }
    }

    fn bytes(&self) -> &[u8] {
        if let Self::Bytes(bytes) = self { bytes } else { &[] }
    }
}

/// The fields of a message of protobuf's, with their numbers.
fn fields(mut rest: &[u8]) -> Result<Vec<(u64, Value<'_>)>> {
    let mut found = Vec::new();
    while !rest.is_empty() {
        let key = varint(&mut rest)?;
        let length = match key & 7 {
            0 => {
                found.push((key >> 3, Value::Number(varint(&mut rest)?)));
                continue;
            }
            1 => 8,
            2 => usize::try_from(varint(&mut rest)?)?,
            5 => 4,
            other => anyhow::bail!("wire type {other}"),
        };
        let (bytes, after) = rest.split_at_checked(length).context("a field is cut")?;
        found.push((key >> 3, Value::Bytes(bytes)));
        rest = after;
    }
    Ok(found)
}

fn varint(rest: &mut &[u8]) -> Result<u64> {
    let mut value = 0;
    for shift in (0..64).step_by(7) {
        let (byte, after) = rest.split_first().context("a number is cut")?;
        *rest = after;
        value |= u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Ok(value);
        }
    }
    anyhow::bail!("a number of more than 64 bits")
}

fn counters(subject: &Subject) -> Result<()> {
    in_lan(subject, |lan| {
        let (place, addresses) = lan.place_in(&lan.bridge(NUMBER))?;
        let (guest, peer) = lan.serving(&place, &addresses)?;
        let namespace = place.space.path();
        let before = counted(&namespace)?;
        lan.host.within(|| stream::push(peer.address, 2 * MIB))?;
        lan.host.within(|| stream::pull(peer.address, MIB))?;
        let after = counted(&namespace)?;
        let moved = |side: usize| after[side] - before[side];
        ensure!(moved(0) >= 2 * MIB && moved(1) >= MIB, "before {before:?}, after {after:?}");
        let told = told(subject, &guest.id)?;
        // runc's shim tells none.
        if subject.is_spore() {
            let is_all = told.is_some_and(|[received, sent]| received >= 2 * MIB && sent >= MIB);
            ensure!(is_all, "Stats tell {told:?}");
        }
        Ok(())
    })
}
