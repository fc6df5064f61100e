//! A further process as its own OCI process object asks for it: what no option of `ctr tasks exec` says.

use anyhow::{Result, ensure};
use serde_json::{Value, json};
use spore_harness::api::{self, Streams};
use spore_harness::bed::Subject;

use super::{Case, equal};
use crate::bundle::Bundle;
use crate::fifo::Fifo;
use crate::guest::shared;

pub(crate) const CASES: &[Case] = &[
    Case::new("process: an exec's own user, groups and directory", identity),
    Case::new("process: an exec's own resource limits", rlimits),
    Case::new("process: an exec's own capabilities, ambient ones too", capabilities),
    Case::new("process: an exec's own no_new_privileges", no_new_privileges),
    Case::new("process: an exec's umask is the usual one, not the container's", umask).starts(1),
    Case::new("process: an exec with an AppArmor profile that no kernel has is refused", profile),
];

/// An OCI process that runs a script.
pub(super) fn shell(script: &str) -> Value {
    json!({
        "args": ["/bin/sh", "-c", script],
        "cwd": "/",
        "env": ["PATH=/usr/bin:/bin"],
        "user": { "uid": 0, "gid": 0 },
    })
}

/// What the process says.
pub(super) fn said(subject: &Subject, container: &str, process: &Value) -> Result<String> {
    let (id, out) = (subject.id("process"), Fifo::new(subject)?);
    let streams = Streams { stdout: out.path(), stderr: out.path(), ..Default::default() };
    api::exec(subject, container, &id, process, streams)??;
    api::start(subject, container, &id)??;
    let status = api::reap(subject, container, &id)?;
    ensure!(status == 0, "status {status} of {process}; it said {:?}", out.text());
    Ok(out.text())
}

fn identity(subject: &Subject) -> Result<()> {
    shared(subject, |guest| {
        let mut process = shell("id -u; id -g; grep ^Groups: /proc/self/status; pwd");
        process["user"] = json!({ "uid": 1000, "gid": 1001, "additionalGids": [10, 20] });
        process["cwd"] = json!("/tmp");
        let text = said(subject, &guest.id, &process)?;
        let words: Vec<_> = text.split_whitespace().collect();
        equal("user, groups, directory", &words.join(" "), "1000 1001 Groups: 10 20 /tmp")
    })
}

fn rlimits(subject: &Subject) -> Result<()> {
    shared(subject, |guest| {
        let mut process = shell("ulimit -Sn; ulimit -Hn; ulimit -Sc");
        process["rlimits"] = json!([
            { "type": "RLIMIT_NOFILE", "soft": 123, "hard": 456 },
            { "type": "RLIMIT_CORE", "soft": 0, "hard": 0 },
        ]);
        equal("limits", &said(subject, &guest.id, &process)?, "123\n456\n0\n")
    })
}

fn capabilities(subject: &Subject) -> Result<()> {
    shared(subject, |guest| {
        let mut process = shell("sed -n '/^Cap/p' /proc/self/status");
        let set = json!(["CAP_NET_BIND_SERVICE", "CAP_KILL"]);
        process["user"] = json!({ "uid": 1000, "gid": 1000 });
        for kind in ["bounding", "permitted", "effective", "inheritable", "ambient"] {
            process["capabilities"][kind] = set.clone();
        }
        let expected: String =
            ["Inh", "Prm", "Eff", "Bnd", "Amb"].map(|set| format!("Cap{set}:\t0000000000000420\n")).concat();
        equal("capabilities", &said(subject, &guest.id, &process)?, &expected)
    })
}

fn no_new_privileges(subject: &Subject) -> Result<()> {
    shared(subject, |guest| {
        for (wanted, found) in [(true, "1\n"), (false, "0\n")] {
            let mut process = shell("sed -n 's/^NoNewPrivs:\\t//p' /proc/self/status");
            process["noNewPrivileges"] = json!(wanted);
            equal("NoNewPrivs", &said(subject, &guest.id, &process)?, found)?;
        }
        Ok(())
    })
}

fn umask(subject: &Subject) -> Result<()> {
    let bundle = Bundle::new(subject)?;
    let call = bundle.call(
        subject,
        "trap 'exit 0' TERM; echo ready; while :; do sleep 1000 & wait $!; done",
        |spec| {
            spec["process"]["user"]["umask"] = json!(0o27);
        },
    )?;
    let mut running = call.spawn()?;
    running.says("ready")?;
    let umask = said(subject, &bundle.id, &shell("umask"));
    subject.must(&["tasks", "kill", &bundle.id])?;
    let output = running.wait()?;
    ensure!(output.success(), "{output}");
    equal("umask", &umask?, "0022\n")
}

fn profile(subject: &Subject) -> Result<()> {
    shared(subject, |guest| {
        let (id, mut process) = (subject.id("process"), shell("true"));
        process["apparmorProfile"] = json!("acme");
        // runc says so at Start, Spore at once.
        let answer = match api::exec(subject, &guest.id, &id, &process, Streams::default())? {
            Ok(()) => api::start(subject, &guest.id, &id)?,
            refused => refused,
        };
        let Err(status) = answer else { anyhow::bail!("it runs") };
        ensure!(status.message().to_lowercase().contains("apparmor"), "{status}");
        guest.shell("true").map(drop)
    })
}
