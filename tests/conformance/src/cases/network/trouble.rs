//! Networks that go wrong around a container: plugins that misbehave, a namespace whose name goes, MACs
//! that are there twice.

use std::fs::{self, Permissions};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use serde_json::json;
use spore_harness::bed::Subject;
use spore_harness::network::cni::PLUGINS;
use spore_harness::network::stock::namespaces;
use spore_harness::processes::{find, kill_hard};
use spore_harness::wait;

use crate::cases::{Case, refused};
use crate::lan::{DEADLINE, Lan, in_lan, mirrored};

pub(crate) const CASES: &[Case] = &[
    Case::new("network: CNI that answers with garbage fails the run", garbage).starts(1),
    Case::new("network: CNI that hangs, and its client is killed", hanging).starts(1),
    Case::new("network: a namespace whose name goes while its container runs", vanishing).starts(1),
    Case::new("network: two interfaces with one MAC", same_mac).starts(1),
];

const NUMBER: u8 = 91;

/// A plugin of a case's own, a shell script that is asked to ADD; DEL does nothing. Ends with the value.
struct Plugin(PathBuf);

impl Plugin {
    fn new(lan: &Lan, add: &str) -> Result<Self> {
        let plugin = Self(PathBuf::from(PLUGINS).join(lan.host.name()));
        // The client's input is read: it takes a plugin that does not for one that has failed.
        let script = format!("#!/bin/sh\ncat > /dev/null\ntest \"$CNI_COMMAND\" = ADD || exit 0\n{add}\n");
        fs::write(&plugin.0, script)?;
        fs::set_permissions(&plugin.0, Permissions::from_mode(0o755))?;
        Ok(plugin)
    }
}

impl Drop for Plugin {
    fn drop(&mut self) {
        fs::remove_file(&self.0).ok();
    }
}

fn garbage(subject: &Subject) -> Result<()> {
    in_lan(subject, |lan| {
        let _plugin = Plugin::new(lan, "echo '{\"ips\": [ garbage'")?;
        let mut network = lan.bridge(NUMBER);
        network.plugins.push(json!({ "type": lan.host.name() }));
        let attached = lan.run_cni(&network, &["true"])?;
        refused(&attached.running.wait()?, &["invalid character"])?;
        drop(attached.guest);
        lan.without_containers()
    })
}

fn hanging(subject: &Subject) -> Result<()> {
    in_lan(subject, |lan| {
        // By which its process is found.
        let file = lan.file("web/index.html").display().to_string();
        let _plugin = Plugin::new(lan, &format!("exec tail -f {file} > /dev/null"))?;
        let mut network = lan.bridge(NUMBER);
        network.plugins.push(json!({ "type": lan.host.name() }));
        let attached = lan.run_cni(&network, &["true"])?;
        let pid = wait::until("the plugin hangs", DEADLINE, || find(&["tail", &file]))?;
        // The client goes, and with it nobody is left to start the task.
        drop(attached.running);
        kill_hard(pid)?;
        let status = attached.guest.status()?;
        ensure!(status == "CREATED", "the task is {status}");
        drop(attached.guest);
        lan.without_containers()
    })
}

fn vanishing(subject: &Subject) -> Result<()> {
    in_lan(subject, |lan| {
        let (place, _) = lan.place_in(&lan.bridge(NUMBER))?;
        let guest = lan.guest(&place)?;
        let inode = fs::metadata(place.space.path())?.ino();
        lan.forget(&place);
        let space = std::sync::Arc::into_inner(place).context("somebody else has the place")?;
        // What `ip netns delete` does; the container keeps the namespace itself.
        drop(space);
        guest.shell("ping -c 1 10.91.0.1 && ping -c 1 fd00:91::1")?;
        ensure!(namespaces()?.contains_key(&inode), "the namespace has gone under a running container");
        drop(guest);
        wait::until("the namespace goes with its container", DEADLINE, || {
            (!namespaces().ok()?.contains_key(&inode)).then_some(())
        })?;
        lan.without_containers()
    })
}

fn same_mac(subject: &Subject) -> Result<()> {
    in_lan(subject, |lan| {
        let place = lan.place()?;
        for (name, number) in [("eth0", 92), ("eth1", 93)] {
            let (near, far) = (format!("10.{number}.0.2/24"), format!("10.{number}.0.1/24"));
            place.space.wire((name, &near), &lan.host, (&format!("far{number}"), &far))?;
            place.space.ip(&format!("link set {name} address 02:00:00:00:00:01"))?;
        }
        let guest = lan.guest(&place)?;
        for name in ["eth0", "eth1"] {
            let found = mirrored(&guest, &place.space.path(), name)?;
            ensure!(found.iter().any(|line| line.ends_with("link/ether 02:00:00:00:00:01")), "{found:?}");
        }
        guest.shell("ping -c 1 10.92.0.1 && ping -c 1 10.93.0.1").map(drop)
    })
}
