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

use super::{Case, Difference, equal, refused};
use crate::bundle::Bundle;

pub(crate) const CASES: &[Case] = &[
    Case::new("hooks: each at its moment, with the state", each_at_its_moment).starts(1),
    Case::new("hooks: createRuntime that fails fails the container", failing).starts(1),
    Case::new("hooks: createRuntime that hangs is ended at its timeout", hanging).starts(1),
    Case::new("hooks: createContainer", create_container)
        .starts(1)
        .differs("it names a program of the host in namespaces of another kernel"),
    Case::new("hooks: startContainer that fails fails the container", failing_start).starts(1),
    Case::new("hooks: startContainer that hangs is ended at its timeout", hanging_start).starts(1),
    Case::new("hooks: poststop, also when the shim is killed", killed).starts(1),
    Case::new("hooks: poststart that fails", failing_poststart)
        .starts(1)
        .differs("the specification asks for a warning, and that all goes on; runc ends the container"),
    Case::new("hooks: poststop that fails", failing_poststop).starts(1),
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

fn create_container(subject: &Subject) -> Result<()> {
    let bundle = Bundle::new(subject)?;
    let notes = bundle.path("notes");
    let script = format!("echo x >{}", notes.display());
    let hooks = json!({ "createContainer": [{ "path": "/bin/sh", "args": ["sh", "-c", script] }] });
    let output = bundle.call(subject, "echo it ran", |spec| spec["hooks"] = hooks)?.run()?;
    if subject.is_spore() {
        refused(&output, &["createContainer"])?;
        ensure!(output.text().is_empty() && !notes.exists(), "{output}");
        return Err(Difference.into());
    }
    ensure!(output.success() && output.text() == "it ran\n", "{output}");
    equal("what the hook wrote", &fs::read_to_string(notes)?, "x\n")
}

/// It has the container end, and before its program runs. No words reach the client: Start has been answered.
fn start_fails(subject: &Subject, hook: Value) -> Result<()> {
    let bundle = Bundle::new(subject)?;
    let hooks = json!({ "startContainer": [hook] });
    let output = bundle.call(subject, "echo it ran", |spec| spec["hooks"] = hooks)?.run()?;
    ensure!(!output.success() && !output.text().contains("it ran"), "{output}");
    Ok(())
}

fn failing_start(subject: &Subject) -> Result<()> {
    start_fails(subject, json!({ "path": "/bin/false", "args": ["false"] }))
}

fn hanging_start(subject: &Subject) -> Result<()> {
    start_fails(subject, json!({ "path": "/bin/sleep", "args": ["sleep", "1000"], "timeout": 1 }))
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

/// A hook that fails, and one behind it that notes its name.
fn failing_first(noting: &Noting, name: &str) -> Value {
    let mut hooks = noting.hook(name);
    let fails = json!({ "path": "/bin/sh", "args": ["sh", "-c", "echo not today >&2; exit 4"] });
    hooks.as_array_mut().into_iter().for_each(|hooks| hooks.insert(0, fails.clone()));
    hooks
}

fn failing_poststart(subject: &Subject) -> Result<()> {
    let noting = Noting::new(subject)?;
    let hooks = json!({ "poststart": failing_first(&noting, "poststart") });
    let output = noting.bundle.call(subject, "echo it runs", |spec| spec["hooks"] = hooks)?.run()?;
    if subject.is_spore() {
        ensure!(output.success() && output.text() == "it runs\n", "{output}");
        equal("the other hook", &fs::read_to_string(noting.notes())?, "poststart running\n")?;
        return Err(Difference.into());
    }
    refused(&output, &["not today"])
}

fn failing_poststop(subject: &Subject) -> Result<()> {
    let noting = Noting::new(subject)?;
    let hooks = json!({ "poststop": failing_first(&noting, "poststop") });
    let output = noting.bundle.call(subject, "echo it runs; exit 3", |spec| spec["hooks"] = hooks)?.run()?;
    equal("output", &output.text(), "it runs\n")?;
    // It is gone all the same.
    let lists = [subject.must(&["tasks", "ls"])?, subject.must(&["containers", "ls"])?];
    ensure!(lists.iter().all(|list| !list.contains(&noting.bundle.id)), "{lists:?}");
    Ok(())
}
