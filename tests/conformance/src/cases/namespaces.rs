//! Namespaces: new ones, the machine's own, and those of others.

use std::process::Command;

use anyhow::{Result, ensure};
use serde_json::{Value, json};
use spore_harness::bed::Subject;
use spore_harness::call::Call;

use super::config::{is_refused, said};
use super::{Case, Difference, equal};
use crate::bundle::Bundle;

pub(crate) const CASES: &[Case] = &[
    Case::new("namespaces: new ones of every kind", new).starts(1),
    Case::new("namespaces: those that are left out are the machine's", machines).starts(1),
    Case::new("namespaces: hostname and domain name", names).starts(1),
    Case::new("namespaces: a user namespace, with its mappings", user).starts(1),
    Case::new("namespaces: one that there is, by its path", by_path).starts(1).differs(
        "a namespace of the host's kernel is out of reach of a container that has a kernel of its own",
    ),
    Case::new("namespaces: a path of another kind of namespace is refused", wrong_path).starts(1),
];

/// Says which of its namespaces are those of the machine's first process.
const SAME: &str = "for n in cgroup ipc mnt net pid uts; do \
                    test \"$(readlink /proc/self/ns/$n)\" = \"$(readlink /proc/1/ns/$n)\" && echo $n; done; true";

fn only(spec: &mut Value, kinds: &[&str]) {
    let namespaces: Vec<_> = kinds.iter().map(|kind| json!({ "type": kind })).collect();
    spec["linux"]["namespaces"] = json!(namespaces);
}

fn new(subject: &Subject) -> Result<()> {
    // Pid 1 is its own; the others' numbers are compared with those of a second container's.
    let links = "test $$ = 1 || echo not the first; for n in cgroup ipc mnt net pid uts; do readlink /proc/self/ns/$n; done";
    let all = |spec: &mut Value| only(spec, &["pid", "ipc", "uts", "mount", "network", "cgroup"]);
    let text = said(subject, links, all)?;
    ensure!(text.lines().count() == 6, "{text:?}");
    let machine = Call::new(shell("for n in cgroup ipc mnt net pid uts; do readlink /proc/self/ns/$n; done"));
    let machine = machine.run()?.text();
    let (ours, machines): (Vec<_>, Vec<_>) = (text.lines().collect(), machine.lines().collect());
    // Numbers of two kernels say nothing of each other.
    if !subject.is_spore() {
        ensure!(ours.iter().all(|link| !machines.contains(link)), "{ours:?} and {machines:?}");
    }
    Ok(())
}

fn shell(script: &str) -> Command {
    let mut command = Command::new("sh");
    command.args(["-c", script]);
    command
}

fn machines(subject: &Subject) -> Result<()> {
    let script = format!("test $$ != 1 && echo another; {SAME}");
    let said = said(subject, &script, |spec| {
        only(spec, &["mount", "network"]);
        spec.as_object_mut().into_iter().for_each(|spec| drop(spec.remove("hostname")));
        // To look at a process that has more capabilities.
        for kind in ["bounding", "permitted", "effective"] {
            let set = spec["process"]["capabilities"][kind].as_array_mut();
            set.into_iter().for_each(|set| set.push(json!("CAP_SYS_PTRACE")));
        }
    })?;
    equal("the machine's", &said, "another\ncgroup\nipc\npid\nuts\n")
}

fn names(subject: &Subject) -> Result<()> {
    let said = said(subject, "hostname; cat /proc/sys/kernel/domainname", |spec| {
        spec["hostname"] = json!("web-1");
        // runc knows the field domainname from 1.2 on.
        spec["linux"]["sysctl"] = json!({ "kernel.domainname": "spore.test" });
    })?;
    equal("names", &said, "web-1\nspore.test\n")
}

fn user(subject: &Subject) -> Result<()> {
    let bundle = Bundle::new(subject)?;
    let mut chown = Command::new("chown");
    chown.args(["-R", "1000:2000"]).arg(bundle.path("rootfs"));
    let chowned = Call::new(chown).run()?;
    ensure!(chowned.success(), "{chowned}");
    let script = "id -u; id -g; cat /proc/self/uid_map /proc/self/gid_map; stat -c '%u %g' /bin/busybox; touch /made && echo made";
    let output = bundle.call(subject, script, |spec| {
        only(spec, &["pid", "ipc", "uts", "mount", "network", "user"]);
        spec["linux"]["uidMappings"] = json!([{ "containerID": 0, "hostID": 1000, "size": 500 }]);
        spec["linux"]["gidMappings"] = json!([{ "containerID": 0, "hostID": 2000, "size": 600 }]);
    })?;
    let output = output.run()?;
    ensure!(output.success(), "{output}");
    let words: Vec<_> = output.text().split_whitespace().map(str::to_owned).collect();
    equal("ids, maps, owners", &words.join(" "), "0 0 0 1000 500 0 2000 600 0 0 made")
}

fn joining(spec: &mut Value, path: &str) {
    only(spec, &["pid", "uts", "mount", "network"]);
    let ipc = json!({ "type": "ipc", "path": path });
    spec["linux"]["namespaces"].as_array_mut().into_iter().for_each(|all| all.push(ipc.clone()));
}

fn by_path(subject: &Subject) -> Result<()> {
    if subject.is_spore() {
        is_refused(subject, &["joining the ipc namespace of another container"], |spec| {
            joining(spec, "/proc/1/ns/ipc");
        })?;
        return Err(Difference.into());
    }
    let machine = Call::new(shell("readlink /proc/self/ns/ipc")).run()?.text();
    let ours = said(subject, "readlink /proc/self/ns/ipc", |spec| joining(spec, "/proc/1/ns/ipc"))?;
    equal("the namespace", &ours, &machine)
}

fn wrong_path(subject: &Subject) -> Result<()> {
    // runc says only that its child has ended.
    let part = if subject.is_spore() { "namespace" } else { "OCI runtime create failed" };
    is_refused(subject, &[part], |spec| joining(spec, "/proc/1/ns/uts"))
}
