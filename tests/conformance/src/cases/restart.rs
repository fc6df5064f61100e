//! containerd killed by force and started again finds its tasks.

use std::fs;
use std::time::Duration;

use anyhow::{Result, ensure};
use spore_harness::bed::Subject;
use spore_harness::containerd::Containerd;
use spore_harness::image::BUSYBOX;
use spore_harness::wait;

use super::{Case, equal};
use crate::guest::Guest;

pub(crate) const CASES: &[Case] = &[
    Case::new("restart: containerd killed finds its tasks again", finds_tasks).starts(1).alone(),
    Case::new("restart: output goes on while containerd is away and after", output_goes_on).starts(1).alone(),
];

const DEADLINE: Duration = Duration::from_secs(60);

fn finds_tasks(subject: &Subject) -> Result<()> {
    let guest = Guest::start(subject, &[])?;
    let before = guest.shell("cat /proc/sys/kernel/random/boot_id; readlink /proc/1/ns/pid")?;
    subject.with(Containerd::restart)?;
    equal("state", &guest.status()?, "RUNNING")?;
    equal(
        "what runs",
        &guest.shell("cat /proc/sys/kernel/random/boot_id; readlink /proc/1/ns/pid")?,
        &before,
    )?;
    guest.must("kill", &["--signal", "KILL"], &[])?;
    guest.until("STOPPED")?;
    let deleted = guest.task("delete", &[], &[])?.run()?;
    ensure!(deleted.success() && deleted.errors().contains("137"), "{deleted}");
    Ok(())
}

fn output_goes_on(subject: &Subject) -> Result<()> {
    let id = subject.id("ticking");
    let log = format!("/srv/bed/{id}.log");
    let uri = format!("file://{log}");
    let runtime = subject.runtime.id();
    let script = "n=0; while :; do n=$((n + 1)); echo $n; sleep 0.2; done";
    subject.must(&[
        "run",
        "--detach",
        "--runtime",
        runtime,
        "--log-uri",
        &uri,
        BUSYBOX,
        &id,
        "sh",
        "-c",
        script,
    ])?;
    let guest = Guest::adopt(subject, &id);
    let lines = || fs::read_to_string(&log).map(|text| text.lines().count()).unwrap_or(0);
    wait::until("the container writes", DEADLINE, || (lines() > 2).then_some(()))?;
    subject.with(Containerd::restart)?;
    let before = lines();
    wait::until("it still writes", DEADLINE, || (lines() > before + 5).then_some(()))?;
    guest.must("kill", &["--signal", "KILL"], &[])?;
    guest.until("STOPPED")?;
    let text = fs::read_to_string(&log)?;
    fs::remove_file(&log)?;
    for (number, line) in text.lines().enumerate() {
        equal("line", line, &(number + 1).to_string())?;
    }
    Ok(())
}
