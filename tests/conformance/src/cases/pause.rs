//! Pause and Resume: the container's cgroup.

use std::time::Duration;

use anyhow::{Result, ensure};
use spore_harness::bed::Subject;
use spore_harness::wait;

use super::changes::{content, diff};
use super::{Case, equal, refused};
use crate::guest::Guest;

pub(crate) const CASES: &[Case] = &[
    Case::new("pause: processes stand still and go on", stand_still).starts(1),
    Case::new("pause: again, or in a paused container, is refused", refusals).starts(1),
    Case::new("pause: a paused task is killed, or deleted by force, and its writes are kept", ended)
        .starts(2),
];

const DEADLINE: Duration = Duration::from_secs(60);
/// Writes a line every fifth of a second.
const TICKING: &str = "while :; do echo tick; sleep 0.2; done";

fn stand_still(subject: &Subject) -> Result<()> {
    let id = subject.id("ticking");
    let args = [
        "run",
        "--rm",
        "--runtime",
        subject.runtime.id(),
        spore_harness::image::BUSYBOX,
        &id,
        "sh",
        "-c",
        TICKING,
    ];
    let mut running = subject.ctr(&args)?.spawn()?;
    running.says("tick\ntick\n")?;
    subject.must(&["tasks", "pause", &id])?;
    let list = subject.must(&["tasks", "ls"])?;
    ensure!(list.lines().any(|line| line.contains(&id) && line.contains("PAUSED")), "{list}");
    // The counters still answer, and the CPU's stands still.
    let usage = || subject.must(&["tasks", "metrics", "--format", "json", &id]).map(|text| cpu_usage(&text));
    let (before, seen) = (usage()?, running.stdout().len());
    wait::until("ten ticks' time has passed", DEADLINE, {
        let begin = std::time::Instant::now();
        move || (begin.elapsed() > Duration::from_secs(2)).then_some(())
    })?;
    ensure!(usage()? == before && before.is_some(), "CPU time goes on: {before:?}, now {:?}", usage()?);
    ensure!(running.stdout().len() == seen, "output goes on");
    subject.must(&["tasks", "resume", &id])?;
    wait::until("output goes on", DEADLINE, || (running.stdout().len() > seen).then_some(()))?;
    subject.must(&["tasks", "kill", "--signal", "KILL", &id])?;
    ensure!(running.wait()?.code() == 137, "status after the kill");
    Ok(())
}

fn cpu_usage(metrics: &str) -> Option<u64> {
    let metrics: serde_json::Value = serde_json::from_str(metrics).ok()?;
    let usage = &metrics["cpu"]["usage_usec"];
    usage.as_u64().or_else(|| usage.as_str()?.parse().ok())
}

fn refusals(subject: &Subject) -> Result<()> {
    let guest = Guest::start(subject, &[])?;
    refused(&guest.task("resume", &[], &[])?.run()?, &["cannot resume a running"])?;
    guest.must("pause", &[], &[])?;
    refused(&guest.task("pause", &[], &[])?.run()?, &["cannot pause a paused"])?;
    refused(&guest.exec(&["true"])?, &["cannot exec in a paused state"])?;
    refused(&guest.task("delete", &[], &[])?.run()?, &["delete"])?;
    guest.must("resume", &[], &[])?;
    equal("a process after all that", &guest.shell("echo alive")?, "alive\n")
}

fn ended(subject: &Subject) -> Result<()> {
    let guest = Guest::start(subject, &[])?;
    guest.shell("echo killed >/first")?;
    guest.must("pause", &[], &[])?;
    guest.must("kill", &["--signal", "KILL"], &[])?;
    guest.until("STOPPED")?;
    let deleted = guest.task("delete", &[], &[])?.run()?;
    ensure!(deleted.success() && deleted.errors().contains("137"), "{deleted}");
    equal("what the first wrote", &content(&diff(subject, &guest)?, "first")?, "killed\n")?;

    guest.must("start", &["--detach"], &[])?;
    guest.shell("echo forced >/second")?;
    guest.must("pause", &[], &[])?;
    guest.must("delete", &["--force"], &[])?;
    let tasks = subject.must(&["tasks", "ls"])?;
    ensure!(!tasks.contains(&guest.id), "{tasks}");
    let archive = diff(subject, &guest)?;
    equal("what the second wrote", &content(&archive, "second")?, "forced\n")?;
    equal("and the first", &content(&archive, "first")?, "killed\n")
}
