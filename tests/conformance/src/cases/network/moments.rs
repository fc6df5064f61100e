//! When interfaces come: before the container, between its Create and its Start, by a hook, and while it
//! runs; and when there are none, or the host's.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use spore_harness::api;
use spore_harness::bed::Subject;
use spore_harness::image::BUSYBOX;
use spore_harness::network::cni::{Attachment, Network};
use spore_harness::network::space;
use spore_harness::wait;

use crate::bundle::Bundle;
use crate::cases::{Case, Difference, equal, refused};
use crate::guest::Guest;
use crate::lan::{CONTENT, DEADLINE, Lan, READY, fetched, in_lan, mirrored, said};

pub(crate) const CASES: &[Case] = &[
    Case::new("network: a createRuntime hook runs CNI, as nerdctl's does", hook).starts(1),
    Case::new("network: an interface that comes between Create and Start", between).starts(1),
    Case::new("network: interfaces that come, change and go while it runs", running).starts(1),
    Case::new("network: without a path, a namespace of its own with loopback", own).starts(1),
    Case::new("network: the host's own", hosts)
        .starts(1)
        .differs("a virtual machine has a network stack of its own; publish ports instead"),
];

/// The first argument that makes this program a hook.
pub(crate) const HOOK: &str = "cni-hook";

/// `cni-hook ADD|DEL HOST LIST`: what nerdctl's hooks do, in the namespace of the pid that the state on
/// standard input tells. HOST is the namespace that plays the host, LIST the file with the network.
pub(crate) fn hook_main(arguments: &[String]) -> Result<()> {
    let [command, host, list] = arguments else { anyhow::bail!("usage: {HOOK} ADD|DEL HOST LIST") };
    let state: Value = serde_json::from_reader(std::io::stdin())?;
    let list: Value = serde_json::from_slice(&fs::read(list)?)?;
    let network = Network {
        name: list["name"].as_str().unwrap_or_default().to_owned(),
        plugins: list["plugins"].as_array().cloned().unwrap_or_default(),
    };
    let attachment = |namespace: String| Attachment {
        host: host.into(),
        container: state["id"].as_str().unwrap_or_default().to_owned(),
        namespace: namespace.into(),
        interface: "eth0".into(),
        arguments: Value::Null,
    };
    if command == "ADD" {
        let pid = state["pid"].as_u64().with_context(|| format!("no pid in {state}"))?;
        network.add(&attachment(format!("/proc/{pid}/ns/net"))).map(drop)
    } else {
        // The namespace has gone with the container.
        network.del(&attachment(String::new()), &Value::Null)
    }
}

fn hook(subject: &Subject) -> Result<()> {
    in_lan(subject, |lan| {
        let mut network = lan.bridge(80);
        network.plugins.push(json!({ "type": "loopback" }));
        let list = lan.file("network.json");
        fs::write(&list, network.list().to_string())?;
        let hook = |command: &str| {
            let path = std::env::current_exe()?;
            let args = json!(["spore-conformance", HOOK, command, lan.host.path(), list]);
            anyhow::Ok(json!([{ "path": path, "args": args, "env": ["PATH=/usr/sbin:/usr/bin:/sbin:/bin"] }]))
        };
        let hooks = json!({ "createRuntime": hook("ADD")?, "poststop": hook("DEL")? });
        let _web = lan.web()?;
        fetched(&lan.host.path(), "http://127.0.0.1/")?;
        let bundle = Bundle::new(subject)?;
        let script = "wget -q -T 20 -O - http://10.80.0.1/";
        let output = bundle.call(subject, script, |spec| spec["hooks"] = hooks)?.run()?;
        ensure!(output.success(), "{output}");
        equal("what the container got", &output.text(), CONTENT)?;
        lan.without_containers()?;
        // The poststop hook gives the address back; the other files are the allocator's own.
        wait::until("the address is given back", DEADLINE, || {
            let given = fs::read_dir(lan.file("addresses").join(&network.name)).ok()?.flatten();
            let mut names = given.map(|entry| entry.file_name().to_string_lossy().into_owned());
            (!names.any(|name| name.starts_with("10.80."))).then_some(())
        })
    })
}

/// An interface with an address in the namespace at a path; the host has the next lower one.
fn give(lan: &Lan, namespace: &Path, pid: &str, name: &str, number: u8) -> Result<()> {
    let far = format!("to{number}");
    lan.host.ip(&format!("link add {far} type veth peer name {name} netns {pid}"))?;
    lan.host.ip(&format!("addr add 10.{number}.0.1/24 dev {far}"))?;
    lan.host.ip(&format!("link set {far} up"))?;
    ip_in(namespace, &format!("addr add 10.{number}.0.2/24 dev {name}"))?;
    ip_in(namespace, &format!("link set {name} up"))
}

fn ip_in(namespace: &Path, line: &str) -> Result<()> {
    let mut command = space::command(namespace, "ip");
    command.args(line.split_whitespace());
    said(command).map(drop)
}

fn between(subject: &Subject) -> Result<()> {
    in_lan(subject, |lan| {
        let id = subject.id("guest");
        subject.must(&[
            "containers",
            "create",
            "--runtime",
            subject.runtime.id(),
            BUSYBOX,
            &id,
            "sh",
            "-c",
            READY,
        ])?;
        let guest = Guest::adopt(subject, &id);
        api::create_and_start(subject, &id, |pid| {
            give(lan, Path::new(&format!("/proc/{pid}/ns/net")), &pid.to_string(), "eth0", 81)
        })?;
        mirrored(&guest, &guest.network()?, "eth0")?;
        guest.shell("ping -c 1 10.81.0.1")?;
        drop(guest);
        lan.without_containers()
    })
}

fn running(subject: &Subject) -> Result<()> {
    in_lan(subject, |lan| {
        let guest = Guest::start(subject, &[])?;
        let namespace = guest.network()?;
        let pid = guest.pid()?;
        let until = |what: &str, script: &str| {
            wait::until(what, DEADLINE, || guest.exec(&["sh", "-c", script]).ok()?.success().then_some(()))
        };
        give(lan, &namespace, &pid, "eth0", 82)?;
        until("the first interface works", "ping -c 1 -W 2 10.82.0.1")?;
        give(lan, &namespace, &pid, "eth1", 83)?;
        until("the second interface works", "ping -c 1 -W 2 10.83.0.1")?;
        for line in [
            "addr add 10.82.0.3/24 dev eth0",
            "link set eth0 mtu 1300",
            "route add 10.99.0.0/16 via 10.82.0.1",
        ] {
            ip_in(&namespace, line)?;
        }
        until(
            "its address, route and MTU change",
            "ip addr show dev eth0 | grep 10.82.0.3 && ip route | grep 10.99.0.0/16 && grep 1300 /sys/class/net/eth0/mtu",
        )?;
        mirrored(&guest, &namespace, "eth0")?;
        lan.host.ip("link delete to83")?;
        until(
            "the second interface goes",
            "test ! -e /sys/class/net/eth1 || ! ip addr show dev eth1 | grep 10.83.0.2",
        )?;
        guest.shell("ping -c 1 10.82.0.1")?;
        drop(guest);
        lan.without_containers()
    })
}

fn own(subject: &Subject) -> Result<()> {
    let guest = Guest::start(subject, &[])?;
    equal("interfaces in use", &guest.shell("ip -o addr | sed 's/ *inet.*//; s/.*: //' | sort -u")?, "lo\n")?;
    guest.shell("ping -c 1 127.0.0.1 && ping -c 1 ::1")?;
    let output = guest.exec(&["ping", "-c", "1", "10.0.0.1"])?;
    ensure!(!output.success() && output.errors().contains("Network is unreachable"), "{output}");
    Ok(())
}

fn hosts(subject: &Subject) -> Result<()> {
    let output =
        subject.run_with("host", &["--net-host"], BUSYBOX, &["readlink", "/proc/self/ns/net"])?.run()?;
    if subject.is_spore() {
        refused(&output, &["host networking", "run the container without --net-host"])?;
        return Err(Difference.into());
    }
    let ours = fs::read_link("/proc/self/ns/net")?;
    ensure!(output.text().trim_end() == ours.to_string_lossy(), "{output}");
    Ok(())
}
