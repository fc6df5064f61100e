//! Hooks of the OCI runtime specification, by a bundle's own configuration.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Result, ensure};
use serde_json::{Value, json};
use spore_harness::bed::Subject;
use spore_harness::processes::{kill_hard, process};
use spore_harness::wait;

use super::{Case, equal, refused};
use crate::bundle::Bundle;

pub(crate) const CASES: &[Case] = &[
    Case::new("hooks: each at its moment, with the state", each_at_its_moment).starts(1),
    Case::new("hooks: createRuntime that fails fails the container", failing).starts(1),
    Case::new("hooks: createRuntime that hangs is ended at its timeout", hanging).starts(1),
    Case::new("hooks: poststop, also when the shim is killed", killed).starts(1),
];

const DEADLINE: Duration = Duration::from_secs(60);
/// Appends the hook's name, and the status and pid that it is told.
const NOTE: &str =
    "#!/bin/sh\nsed -n 's/.*\"status\": *\"\\([a-z]*\\)\".*/\\1/p' >$1.tmp; echo \"$2 $(cat $1.tmp)\" >>$1\n";

/// A bundle with a hook that notes its name and what it is told.
struct Noting {
    bundle: Bundle,
}

impl Noting {
    fn new(subject: &Subject) -> Result<Self> {
        let bundle = Bundle::new(subject)?;
        let hook = bundle.path("note");
        fs::write(&hook, NOTE)?;
        fs::set_permissions(&hook, fs::Permissions::from_mode(0o755))?;
        Ok(Self { bundle })
    }

    fn notes(&self) -> PathBuf {
        self.bundle.path("notes")
    }

    fn hook(&self, name: &str) -> Value {
        let program = self.bundle.path("note");
        json!([{ "path": program, "args": ["note", self.notes(), name], "env": ["PATH=/usr/bin:/bin"] }])
    }
}

fn each_at_its_moment(subject: &Subject) -> Result<()> {
    let noting = Noting::new(subject)?;
    let mut hooks = json!({});
    for name in ["prestart", "createRuntime", "poststart", "poststop"] {
        hooks[name] = noting.hook(name);
    }
    hooks["startContainer"] = json!([{ "path": "/bin/touch", "args": ["touch", "/from-start-container"] }]);
    let script = "/bin/ls /from-start-container";
    let output = noting.bundle.call(subject, script, |spec| spec["hooks"] = hooks)?.run()?;
    ensure!(output.success(), "{output}");
    equal("in the container", &output.text(), "/from-start-container\n")?;
    let notes = wait::until("poststop has run", DEADLINE, || {
        fs::read_to_string(noting.notes()).ok().filter(|notes| notes.contains("poststop"))
    })?;
    let names: Vec<_> = notes.lines().filter_map(|line| line.split_whitespace().next()).collect();
    equal("order", &names.join(" "), "prestart createRuntime poststart poststop")?;
    ensure!(notes.contains("poststop stopped"), "{notes:?}");
    Ok(())
}

fn failing(subject: &Subject) -> Result<()> {
    let bundle = Bundle::new(subject)?;
    let hooks = json!({ "createRuntime": [
        { "path": "/bin/sh", "args": ["sh", "-c", "echo no network for you >&2; exit 4"] }
    ] });
    let output = bundle.call(subject, "true", |spec| spec["hooks"] = hooks)?.run()?;
    refused(&output, &["OCI runtime create failed", "no network for you"])
}

/// One that runs longer than it may.
fn hanging(subject: &Subject) -> Result<()> {
    let bundle = Bundle::new(subject)?;
    let hooks =
        json!({ "createRuntime": [{ "path": "/bin/sleep", "args": ["sleep", "1000"], "timeout": 1 }] });
    let output = bundle.call(subject, "true", |spec| spec["hooks"] = hooks)?.run()?;
    refused(&output, &["OCI runtime create failed", "hook"])
}

fn killed(subject: &Subject) -> Result<()> {
    let noting = Noting::new(subject)?;
    let hooks = json!({ "poststop": noting.hook("poststop") });
    let script = "echo ready; while :; do /bin/sleep 1000; done";
    let mut running = noting.bundle.call(subject, script, |spec| spec["hooks"] = hooks)?.spawn()?;
    running.says("ready")?;
    let shim = if subject.is_spore() { "containerd-shim-spore-v2" } else { "containerd-shim-runc-v2" };
    kill_hard(process(&[shim, &noting.bundle.id])?)?;
    running.wait()?;
    let notes = wait::until("poststop has run", DEADLINE, || {
        fs::read_to_string(noting.notes()).ok().filter(|notes| notes.contains("poststop"))
    })?;
    equal("notes", &notes, "poststop stopped\n")?;
    // The client has lost its task and leaves the container to whoever knows better.
    subject.ctr(&["containers", "delete", &noting.bundle.id])?.run()?;
    Ok(())
}
