//! What CNI's plugins give a container is what it has: `ctr run --cni`, and namespaces that CRI would have
//! made.

use std::fs;

use anyhow::{Result, ensure};
use serde_json::{Value, json};
use spore_harness::bed::Subject;
use spore_harness::network::cni::Network;
use spore_harness::network::names::NameServer;

use crate::cases::{Case, equal};
use crate::lan::{CONTENT, READY, WEB, fetched, in_lan, mirrored, said};

pub(crate) const CASES: &[Case] = &[
    Case::new("network: ctr run --cni, the container reaches a web server and is one", web).starts(1),
    Case::new("network: ctr run --cni, addresses, routes, MAC and MTU are those that CNI made", same)
        .starts(1),
    Case::new("network: names by a resolv.conf that is mounted", names).starts(1),
    Case::new("network: ptp, whose gateway stands alone", ptp).starts(1),
    Case::new("network: macvlan", macvlan).starts(1),
    Case::new("network: two interfaces", two).starts(1),
];

/// All that a line of `expected` says is in a line of `found`.
fn has(found: &[String], expected: &[&str]) -> Result<()> {
    for part in expected {
        ensure!(found.iter().any(|line| line.contains(part)), "{part:?} is not in {found:#?}");
    }
    Ok(())
}

/// A bridge as `ctr` finds it in a file, with the plugins that usually follow it.
fn chain(mut network: Network) -> Network {
    network.plugins[0]["mtu"] = json!(1450);
    network.plugins.extend([
        json!({ "type": "portmap", "capabilities": { "portMappings": true } }),
        json!({ "type": "loopback" }),
    ]);
    network
}

fn web(subject: &Subject) -> Result<()> {
    in_lan(subject, |lan| {
        let attached = lan.run_cni(&chain(lan.bridge(50)), &["sh", "-c", WEB])?;
        equal("from the host", &fetched(&lan.host.path(), "http://10.50.0.2/")?, CONTENT)?;
        let _web = lan.web()?;
        fetched(&lan.host.path(), "http://127.0.0.1/")?;
        for url in ["http://10.50.0.1/", "http://[fd00:50::1]/"] {
            equal(url, &attached.guest.shell(&format!("wget -q -T 20 -O - {url}"))?, CONTENT)?;
        }
        attached.end()?;
        lan.without_containers()
    })
}

fn same(subject: &Subject) -> Result<()> {
    in_lan(subject, |lan| {
        let mut attached = lan.run_cni(&chain(lan.bridge(51)), &["sh", "-c", READY])?;
        attached.running.says("ready")?;
        let found = mirrored(&attached.guest, &attached.guest.network()?, "eth0")?;
        has(
            &found,
            &[
                "mtu 1450 link/ether",
                "inet 10.51.0.2/24",
                "inet6 fd00:51::2/64",
                "default via 10.51.0.1 dev eth0",
                "default via fd00:51::1 dev eth0",
            ],
        )?;
        attached.guest.shell("ping -c 1 127.0.0.1 && ping -c 1 ::1")?;
        attached.end()?;
        lan.without_containers()
    })
}

fn names(subject: &Subject) -> Result<()> {
    in_lan(subject, |lan| {
        let (place, _) = lan.place_in(&lan.bridge(52))?;
        let server = std::net::Ipv4Addr::new(10, 52, 0, 1);
        let _names = NameServer::start(&lan.host.path(), server, "web.test")?;
        let file = lan.file("resolv.conf");
        fs::write(&file, NameServer::resolv_conf(server.into()))?;
        let mount = format!("type=bind,src={},dst=/etc/resolv.conf,options=rbind:ro", file.display());
        let guest = lan.guest_with(&place, &["--mount", &mount], &["sh", "-c", READY])?;
        let told = guest.shell("ping -c 1 web.test")?;
        ensure!(told.contains("PING web.test (10.52.0.1)"), "{told}");
        let output = guest.exec(&["ping", "-c", "1", "other.test"])?;
        ensure!(!output.success() && output.errors().contains("bad address"), "{output}");
        Ok(())
    })
}

fn ptp(subject: &Subject) -> Result<()> {
    in_lan(subject, |lan| {
        let plugin = json!({ "type": "ptp", "ipam": lan.addresses(53, &["0.0.0.0/0", "::/0"]) });
        let (place, addresses) = lan.place_in(&Network { name: "ptp".into(), plugins: vec![plugin] })?;
        let guest = lan.guest(&place)?;
        let found = mirrored(&guest, &place.space.path(), "eth0")?;
        // The whole subnet is behind the gateway, which has a route of its own.
        has(&found, &["10.53.0.0/24 via 10.53.0.1 dev eth0", "10.53.0.1 dev eth0 scope link"])?;
        guest.shell("ping -c 1 10.53.0.1 && ping -c 1 fd00:53::1")?;
        let mut ping = lan.host.command("busybox");
        ping.args(["ping", "-c", "1", &addresses.v4.to_string()]);
        said(ping).map(drop)
    })
}

fn macvlan(subject: &Subject) -> Result<()> {
    in_lan(subject, |lan| {
        // A cable whose other end stands for the network outside.
        lan.host.ip("link add uplink type veth peer name outside")?;
        lan.host.ip("addr add 10.54.0.1/24 dev outside")?;
        lan.host.ip("link set outside up")?;
        lan.host.ip("link set uplink up")?;
        let plugin = json!({ "type": "macvlan", "master": "uplink", "mode": "bridge",
            "ipam": lan.addresses(54, &["0.0.0.0/0"]) });
        let (place, addresses) = lan.place_in(&Network { name: "macvlan".into(), plugins: vec![plugin] })?;
        let guest = lan.guest_with(&place, &[], &["sh", "-c", WEB])?;
        has(&mirrored(&guest, &place.space.path(), "eth0")?, &["inet 10.54.0.2/24"])?;
        guest.shell("ping -c 1 10.54.0.1")?;
        equal("from outside", &fetched(&lan.host.path(), &format!("http://{}/", addresses.v4))?, CONTENT)
    })
}

fn two(subject: &Subject) -> Result<()> {
    in_lan(subject, |lan| {
        let (place, _) = lan.place_in(&lan.bridge(55))?;
        let mut second = lan.bridge(56);
        second.plugins[0]["ipam"] = lan.addresses(56, &["10.57.0.0/16"]);
        lan.attach(&second, &place, "net1", Value::Null)?;
        let guest = lan.guest(&place)?;
        let path = place.space.path();
        has(&mirrored(&guest, &path, "eth0")?, &["inet 10.55.0.2/24", "default via 10.55.0.1 dev eth0"])?;
        let found = mirrored(&guest, &path, "net1")?;
        has(&found, &["inet 10.56.0.2/24", "10.57.0.0/16 via 10.56.0.1 dev net1"])?;
        guest.shell("ping -c 1 10.55.0.1 && ping -c 1 10.56.0.1 && ping -c 1 fd00:56::1").map(drop)
    })
}
