//! Limits: what a container starts with, and what happens at them.

use std::time::Duration;

use anyhow::{Result, bail, ensure};
use serde_json::json;
use spore_harness::api;
use spore_harness::bed::Subject;

use super::{Case, Difference, equal};
use crate::guest::{Guest, shared};

pub(crate) const CASES: &[Case] = &[
    Case::new("metrics: the counters of cgroup v2", metrics),
    Case::new("limits: memory and CPU of the cgroup", cgroup).starts(1),
    Case::new("limits: changed while it runs", changed).starts(1),
    Case::new("limits: more memory than the machine has, while it runs", beyond)
        .starts(1)
        .differs("a virtual machine has the memory that it was started with; a cgroup takes a limit that there is no memory for"),
    Case::new("limits: a task over its memory is killed, and told", out_of_memory).starts(1),
];

fn metrics(subject: &Subject) -> Result<()> {
    shared(subject, |guest| {
        let text = guest.must("metrics", &["--format", "json"], &[])?;
        let told: serde_json::Value = serde_json::from_str(&text)?;
        for (group, field) in [("cpu", "usage_usec"), ("memory", "usage"), ("pids", "current")] {
            let value = &told[group][field];
            let number = value.as_u64().or_else(|| value.as_str()?.parse().ok());
            ensure!(number.is_some_and(|number| number > 0), "{group}.{field} in {text}");
        }
        Ok(())
    })
}

fn cgroup(subject: &Subject) -> Result<()> {
    let options = ["--memory-limit", "67108864", "--cpus", "0.5", "--mount", CGROUP];
    let guest = Guest::start(subject, &options)?;
    let read = "cd /cgroup$(sed s/0::// /proc/self/cgroup); cat memory.max cpu.max";
    equal("memory.max and cpu.max", &guest.shell(read)?, "67108864\n50000 100000\n")
}

const CGROUP: &str = "type=cgroup,src=cgroup,dst=/cgroup,options=ro:nosuid:noexec:nodev";

fn changed(subject: &Subject) -> Result<()> {
    let guest = Guest::start(subject, &["--memory-limit", "67108864", "--cpus", "0.5", "--mount", CGROUP])?;
    let resources = json!({ "memory": { "limit": 100 << 20 }, "pids": { "limit": 77 } });
    api::update(subject, &guest.id, &resources)??;
    let read = "cd /cgroup$(sed s/0::// /proc/self/cgroup); cat memory.max pids.max cpu.max";
    equal("memory, pids, and the CPU as before", &guest.shell(read)?, "104857600\n77\n50000 100000\n")?;
    let weight = "cat /cgroup$(sed s/0::// /proc/self/cgroup)/cpu.weight";
    let before = guest.shell(weight)?;
    let resources = json!({ "cpu": { "quota": 20_000, "period": 100_000, "shares": 512 } });
    api::update(subject, &guest.id, &resources)??;
    equal("the CPU, and the rest as it was", &guest.shell(read)?, "104857600\n77\n20000 100000\n")?;
    // runc and youki convert shares by formulas of different years.
    ensure!(guest.shell(weight)? != before, "cpu.weight is {before:?} still");
    let refused = api::update(subject, &guest.id, &json!({ "cpu": { "cpus": "900-901" } }))?;
    ensure!(refused.is_err(), "a cpuset that no machine has");
    Ok(())
}

fn beyond(subject: &Subject) -> Result<()> {
    let guest = Guest::start(subject, &["--memory-limit", "67108864", "--mount", CGROUP])?;
    let read = || guest.shell("cat /cgroup$(sed s/0::// /proc/self/cgroup)/memory.max");
    let answer = api::update(subject, &guest.id, &json!({ "memory": { "limit": 1_u64 << 40 } }))?;
    if subject.is_spore() {
        let Err(status) = answer else { bail!("it is taken") };
        ensure!(status.message().contains("the container's machine has"), "{status}");
        equal("the limit as it was", &read()?, "67108864\n")?;
        return Err(Difference.into());
    }
    answer?;
    equal("the limit", &read()?, "1099511627776\n")
}

fn out_of_memory(subject: &Subject) -> Result<()> {
    let mut events = subject.ctr(&["events"])?.deadline(Duration::from_secs(60)).spawn()?;
    let id = subject.id("hungry");
    let output = subject
        .ctr(&[
            "run",
            "--rm",
            "--runtime",
            subject.runtime.id(),
            "--memory-limit",
            "33554432",
            spore_harness::image::BUSYBOX,
            &id,
            "sh",
            "-c",
            "dd if=/dev/zero of=/dev/null bs=60M count=1; exit $?",
        ])?
        .run()?;
    ensure!(!output.success(), "{output}");
    events.says("/tasks/oom")?;
    events.kill()?;
    Ok(())
}
