//! Hooks of the OCI runtime specification, by a bundle's own configuration.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Result, ensure};
use serde_json::{Value, json};
use spore_harness::bed::Subject;
use spore_harness::call::{Call, Output};
use spore_harness::processes::{kill_hard, process};
use spore_harness::wait;

use super::{Case, equal, refused};

pub(crate) const CASES: &[Case] = &[
    Case::new("hooks: each at its moment, with the state", each_at_its_moment).starts(1),
    Case::new("hooks: createRuntime that fails fails the container", failing).starts(1),
    Case::new("hooks: poststop, also when the shim is killed", killed).alone().starts(1),
];

const DEADLINE: Duration = Duration::from_secs(60);
/// Appends the hook's name, and the status and pid that it is told.
const NOTE: &str =
    "#!/bin/sh\nsed -n 's/.*\"status\": *\"\\([a-z]*\\)\".*/\\1/p' >$1.tmp; echo \"$2 $(cat $1.tmp)\" >>$1\n";

struct Bundle {
    directory: PathBuf,
}

impl Bundle {
    fn new(subject: &Subject) -> Result<Self> {
        let directory = PathBuf::from(format!("/srv/bed/{}", subject.id("hooks")));
        fs::create_dir_all(&directory)?;
        let hook = directory.join("note");
        fs::write(&hook, NOTE)?;
        fs::set_permissions(&hook, fs::Permissions::from_mode(0o755))?;
        Ok(Self { directory })
    }

    fn notes(&self) -> PathBuf {
        self.directory.join("notes")
    }

    fn hook(&self, name: &str) -> Value {
        let program = self.directory.join("note");
        json!([{ "path": program, "args": ["note", self.notes(), name], "env": ["PATH=/usr/bin:/bin"] }])
    }

    fn run(&self, subject: &Subject, hooks: &Value, command: &[&str]) -> Result<Output> {
        self.call(subject, &subject.id("hooked"), hooks, command)?.run()
    }

    fn call(&self, subject: &Subject, id: &str, hooks: &Value, command: &[&str]) -> Result<Call> {
        let mut spec: Value = serde_json::from_str(&subject.must(&["oci", "spec"])?)?;
        spec["hooks"] = hooks.clone();
        spec["root"] = json!({ "path": subject.bed.rootfs() });
        spec["process"]["args"] = json!(command);
        let config = self.directory.join("config.json");
        // The default is the namespace's own cgroup, which holds others.
        spec["linux"]["cgroupsPath"] = json!(format!("/hooked/{id}"));
        let text = spec.to_string();
        fs::write(&config, text)?;
        let config = config.display().to_string();
        subject.ctr(&["run", "--rm", "--runtime", subject.runtime.id(), "--config", &config, id])
    }
}

impl Drop for Bundle {
    fn drop(&mut self) {
        fs::remove_dir_all(&self.directory).ok();
    }
}

fn each_at_its_moment(subject: &Subject) -> Result<()> {
    let bundle = Bundle::new(subject)?;
    let mut hooks = json!({});
    for name in ["prestart", "createRuntime", "poststart", "poststop"] {
        hooks[name] = bundle.hook(name);
    }
    hooks["startContainer"] = json!([{ "path": "/bin/touch", "args": ["touch", "/from-start-container"] }]);
    let output = bundle.run(subject, &hooks, &["/bin/sh", "-c", "/bin/ls /from-start-container"])?;
    ensure!(output.success(), "{output}");
    equal("in the container", &output.text(), "/from-start-container\n")?;
    let notes = wait::until("poststop has run", DEADLINE, || {
        fs::read_to_string(bundle.notes()).ok().filter(|notes| notes.contains("poststop"))
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
    let output = bundle.run(subject, &hooks, &["true"])?;
    refused(&output, &["OCI runtime create failed", "no network for you"])
}

fn killed(subject: &Subject) -> Result<()> {
    let bundle = Bundle::new(subject)?;
    let hooks = json!({ "poststop": bundle.hook("poststop") });
    let id = subject.id("hooked");
    let script = "echo ready; while :; do /bin/sleep 1000; done";
    let mut running = bundle.call(subject, &id, &hooks, &["/bin/sh", "-c", script])?.spawn()?;
    running.says("ready")?;
    let shim = if subject.is_spore() { "containerd-shim-spore-v2" } else { "containerd-shim-runc-v2" };
    kill_hard(process(&[shim, &id])?)?;
    running.wait()?;
    let notes = wait::until("poststop has run", DEADLINE, || {
        fs::read_to_string(bundle.notes()).ok().filter(|notes| notes.contains("poststop"))
    })?;
    equal("notes", &notes, "poststop stopped\n")?;
    // The client has lost its task and leaves the container to whoever knows better.
    subject.ctr(&["containers", "delete", &id])?.run()?;
    Ok(())
}
