//! Networks that cannot be: a clear error, and everything as it was.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::json;
use spore_harness::bed::Subject;
use spore_harness::call::Output;
use spore_harness::image::BUSYBOX;
use spore_harness::processes::{kill_hard, process};
use spore_harness::wait;

use crate::cases::{Case, Difference, equal, refused};
use crate::guest::Guest;
use crate::lan::{CONTENT, DEADLINE, Lan, WEB, fetched, in_lan, mirrored};

pub(crate) const CASES: &[Case] = &[
    Case::new("network: CNI that fails fails the run", failing).starts(1),
    Case::new("network: a namespace that does not exist", missing).starts(1),
    Case::new("network: an interface without Ethernet", without_ethernet)
        .starts(1)
        .differs("a NIC carries Ethernet; the host's interface has none"),
    Case::new("network: five interfaces", five)
        .starts(1)
        .differs("a virtual machine has four slots for NICs"),
    Case::new("network: the smallest MTU that IPv4 allows", smallest).starts(1),
    Case::new("network: MTUs that no NIC has", impossible)
        .starts(2)
        .differs("a tap's MTU, and a NIC's, is between 68 and 65521"),
    Case::new("network: two containers in one namespace", shared)
        .starts(2)
        .differs("each virtual machine has a network stack of its own; what comes in can go to one only"),
    Case::new("network: a shim that is killed leaves the interface as it was", killed).starts(1),
];

const NUMBER: u8 = 90;

/// What came of a run that runc does and a virtual machine cannot.
fn differs(subject: &Subject, output: &Output, parts: &[&str]) -> Result<()> {
    if subject.is_spore() {
        return refused(output, parts);
    }
    ensure!(output.success(), "{output}");
    Ok(())
}

/// The end of a case with a difference.
fn done(subject: &Subject) -> Result<()> {
    if subject.is_spore() { Err(Difference.into()) } else { Ok(()) }
}

/// As [`in_lan`] for a case that ends with a difference, of which what is left over must not be hidden.
fn in_lan_differing(subject: &Subject, act: impl FnOnce(&Lan) -> Result<()>) -> Result<()> {
    in_lan(subject, act)?;
    done(subject)
}

fn failing(subject: &Subject) -> Result<()> {
    in_lan(subject, |lan| {
        let mut network = lan.bridge(NUMBER);
        // Two addresses, of which one is the host's, and the other is given.
        network.plugins[0]["ipam"]["ranges"] =
            json!([[{ "subnet": "10.90.0.0/24", "rangeStart": "10.90.0.2", "rangeEnd": "10.90.0.2" }]]);
        let place = lan.place()?;
        network.add(&lan.attachment(&place, "eth0", json!(null)))?;
        let attached = lan.run_cni(&network, &["true"])?;
        let output = attached.running.wait()?;
        refused(&output, &["no IP addresses available in range set: 10.90.0.2-10.90.0.2"])?;
        // `ctr` leaves a task that it has created to whoever calls it.
        let id = attached.guest.id.clone();
        drop(attached.guest);
        let tasks = subject.must(&["tasks", "ls"])?;
        ensure!(!tasks.contains(&id), "{tasks}");
        drop(place);
        Ok(())
    })
}

fn missing(subject: &Subject) -> Result<()> {
    let path = format!("/run/netns/{}", subject.id("missing"));
    let options = ["--with-ns", &format!("network:{path}")];
    let output = subject.run_with("missing", &options, BUSYBOX, &["true"])?.run()?;
    refused(&output, &[&path])?;
    let errors = output.errors().to_lowercase();
    ensure!(errors.contains("no such file or directory"), "{output}");
    Ok(())
}

fn without_ethernet(subject: &Subject) -> Result<()> {
    in_lan_differing(subject, |lan| {
        let place = lan.place()?;
        place.space.ip("tuntap add tun0 mode tun")?;
        place.space.ip("addr add 10.90.0.2/24 dev tun0")?;
        place.space.ip("link set tun0 up")?;
        let output = lan.run(&place, &["true"])?;
        differs(
            subject,
            &output,
            &["interface tun0", "does not carry Ethernet", "use one that carries Ethernet"],
        )
    })
}

fn five(subject: &Subject) -> Result<()> {
    in_lan_differing(subject, |lan| {
        let place = lan.place()?;
        for number in 0..5 {
            place.space.ip(&format!(
                "link add eth{number} type veth peer name far{number} netns {}",
                lan.host.name()
            ))?;
            place.space.ip(&format!("link set eth{number} up"))?;
        }
        let output = lan.run(&place, &["true"])?;
        differs(subject, &output, &["interface eth", "there are 4 in the virtual machine already"])
    })
}

/// A place with `eth0`, 10.90.0.2, on a cable to the host's side.
fn cable(lan: &Lan) -> Result<std::sync::Arc<crate::lan::Place>> {
    let place = lan.place()?;
    place.space.wire(("eth0", "10.90.0.2/24"), &lan.host, ("far", "10.90.0.1/24"))?;
    Ok(place)
}

fn smallest(subject: &Subject) -> Result<()> {
    in_lan(subject, |lan| {
        let place = cable(lan)?;
        place.space.ip("link set eth0 mtu 68")?;
        lan.host.ip("link set far mtu 68")?;
        let guest = lan.guest(&place)?;
        let found = mirrored(&guest, &place.space.path(), "eth0")?;
        ensure!(found.iter().any(|line| line.starts_with("mtu 68 ")), "{found:?}");
        // In two pieces and more.
        guest.shell("ping -c 1 -s 200 10.90.0.1").map(drop)
    })
}

fn impossible(subject: &Subject) -> Result<()> {
    in_lan_differing(subject, |lan| {
        let place = cable(lan)?;
        place.space.ip("link set eth0 mtu 65535")?;
        let large = lan.run(&place, &["true"])?;
        differs(subject, &large, &["interface eth0", "MTU"]).context("more than a tap has")?;
        let place = lan.place()?;
        place.space.ip("link add dummy0 type dummy")?;
        place.space.ip("link set dummy0 mtu 60 up")?;
        let small = lan.run(&place, &["true"])?;
        differs(subject, &small, &["interface dummy0", "MTU"]).context("less than a tap has")
    })
}

fn shared(subject: &Subject) -> Result<()> {
    in_lan_differing(subject, |lan| {
        let (place, _) = lan.place_in(&lan.bridge(NUMBER))?;
        let _first = lan.guest_with(&place, &[], &["sh", "-c", WEB])?;
        fetched(&lan.host.path(), "http://10.90.0.2/")?;
        let output = lan.run(&place, &["ping", "-c", "1", "10.90.0.1"])?;
        differs(
            subject,
            &output,
            &["interface eth0", "another virtual machine is joined to it", "give each its own"],
        )?;
        equal("the first one, afterwards", &fetched(&lan.host.path(), "http://10.90.0.2/")?, CONTENT)
    })
}

fn killed(subject: &Subject) -> Result<()> {
    in_lan(subject, |lan| {
        let place = cable(lan)?;
        let guest: Guest = lan.guest(&place)?;
        guest.shell("ping -c 1 10.90.0.1")?;
        let shim = if subject.is_spore() { "containerd-shim-spore-v2" } else { "containerd-shim-runc-v2" };
        kill_hard(process(&[shim, &guest.id])?)?;
        let gone = || guest.status().ok().is_none_or(|status| status != "RUNNING").then_some(());
        wait::until("containerd knows", DEADLINE.max(Duration::from_secs(60)), gone)
    })
}
