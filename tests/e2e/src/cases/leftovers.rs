//! Runs leave nothing behind: no process, mount, file, socket, loop device, cgroup.

use anyhow::{Result, ensure};
use serde_json::{Value, json};

use super::bad_config::run as configured;
use super::status::TELLING;
use super::{Case, soak};
use spore_harness::bed::Subject;

pub(crate) const CASES: &[Case] = &[
    Case::new("leftovers::sequential", sequential).alone().long().starts(1 + SEQUENTIAL),
    Case::new("leftovers::concurrent", concurrent).alone().long().starts(1 + WIDTH),
    Case::new("leftovers::refused", refused).alone().newest_unless_soak().starts(2 + REFUSED.len()),
];

const SEQUENTIAL: usize = 20;
/// Containers at once.
const WIDTH: usize = 8;

/// One after the other, each with an output and an exit status of its own.
fn sequential(subject: &Subject) -> Result<()> {
    let count = soak().unwrap_or(SEQUENTIAL);
    subject.warm_up()?;
    let before = subject.inventory()?;
    for (index, status) in TELLING.iter().cycle().take(count).enumerate() {
        let output = subject.shell("one", &format!("echo {index}; exit {status}"))?;
        ensure!(
            output.code() == *status && output.text() == format!("{index}\n") && output.errors().is_empty(),
            "run {index} of {count}, \"exit {status}\": {output}"
        );
    }
    subject.nothing_beyond(&before)
}

fn concurrent(subject: &Subject) -> Result<()> {
    let rounds = soak().map_or(1, |runs| runs.div_ceil(4 * WIDTH));
    subject.warm_up()?;
    let before = subject.inventory()?;
    for _ in 0..rounds {
        let calls: Vec<_> = (0..WIDTH)
            .map(|index| subject.run("many", &["echo", &index.to_string()])?.spawn())
            .collect::<Result<_>>()?;
        for (index, call) in calls.into_iter().enumerate() {
            let output = call.wait()?;
            ensure!(output.success() && output.text() == format!("{index}\n"), "run {index}: {output}");
        }
    }
    subject.nothing_beyond(&before)
}

type Change = fn(&mut Value);

/// Configurations that are refused: by the shim at once, after hooks have run, and in the guest.
const REFUSED: &[(&str, Change)] = &[
    ("a hook that fails", |spec| create_runtime(spec, &json!({ "path": "/bin/false" }))),
    ("a hook that hangs", |spec| {
        create_runtime(spec, &json!({ "path": "/bin/sleep", "args": ["sleep", "1000"], "timeout": 1 }));
    }),
    ("a bind mount of nothing", |spec| {
        let mount =
            json!({ "destination": "/mnt", "type": "bind", "source": "/no/such", "options": ["rbind"] });
        spec["mounts"].as_array_mut().into_iter().for_each(|mounts| mounts.push(mount.clone()));
    }),
    ("CPUs that are not there", |spec| spec["linux"]["resources"]["cpu"] = json!({ "cpus": "900" })),
    ("too little memory", |spec| spec["linux"]["resources"]["memory"]["limit"] = json!(1 << 20)),
    ("a seccomp profile that does not compile", |spec| {
        // A system call has six arguments.
        let args = [json!({ "index": 9, "value": 1, "op": "SCMP_CMP_EQ" })];
        spec["linux"]["seccomp"] = json!({
            "defaultAction": "SCMP_ACT_ALLOW",
            "architectures": ["SCMP_ARCH_X86_64"],
            "syscalls": [{ "names": ["kill"], "action": "SCMP_ACT_ERRNO", "args": args }],
        });
    }),
    ("a namespace of another kind", |spec| {
        let namespaces = spec["linux"]["namespaces"].as_array_mut();
        namespaces.into_iter().for_each(|namespaces| {
            namespaces.retain(|namespace| namespace["type"] != "ipc");
            namespaces.push(json!({ "type": "ipc", "path": "/proc/1/ns/uts" }));
        });
    }),
    ("no process", |spec| spec["process"] = Value::Null),
    ("a process without a command", |spec| spec["process"]["args"] = json!([])),
    ("a working directory that is not absolute", |spec| spec["process"]["cwd"] = json!("tmp")),
];

fn create_runtime(spec: &mut Value, hook: &Value) {
    spec["hooks"] = json!({ "createRuntime": [hook] });
}

/// A refused start leaves as little.
fn refused(subject: &Subject) -> Result<()> {
    subject.warm_up()?;
    // The layer of their root directory is there to stay.
    let output = configured(subject, |_| {})?;
    ensure!(output.success(), "{output}");
    let before = subject.inventory()?;
    let output = subject.run("refused", &["no-such-command"])?.run()?;
    ensure!(!output.success(), "{output}");
    for (what, change) in REFUSED {
        let output = configured(subject, change)?;
        ensure!(!output.success() && output.stdout.is_empty(), "{what}: {output}");
    }
    subject.nothing_beyond(&before)
}
