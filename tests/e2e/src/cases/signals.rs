//! Signals reach the container's process; its end by one is 128 + n.

use anyhow::{Result, ensure};

use super::{Case, expect_equal};
use spore_harness::bed::Subject;

pub(crate) const CASES: &[Case] = &[
    Case::new("signals::kill_is_137", kill_is_137).smoke(),
    Case::new("signals::trapped", trapped),
    Case::new("signals::children_inside", children_inside),
];

fn kill_is_137(subject: &Subject) -> Result<()> {
    let status = signalled(subject, "SIGKILL", "echo ready; while :; do sleep 1000; done")?;
    expect_equal("status after SIGKILL", &status, &137)
}

/// A process that handles a signal decides itself.
fn trapped(subject: &Subject) -> Result<()> {
    for (signal, status) in [("TERM", 42), ("USR1", 43)] {
        let script = format!("trap 'exit {status}' {signal}; echo ready; while :; do sleep 0.1; done");
        let found = signalled(subject, &format!("SIG{signal}"), &script)?;
        expect_equal(&format!("status after a trapped SIG{signal}"), &found, &status)?;
    }
    Ok(())
}

/// Starts the script, waits for its "ready", sends the signal; the status that `ctr run` gives.
fn signalled(subject: &Subject, signal: &str, script: &str) -> Result<i32> {
    let id = subject.id("signal");
    let runtime = subject.runtime.id();
    let image = spore_harness::image::BUSYBOX;
    let mut running =
        subject.ctr(&["run", "--rm", "--runtime", runtime, image, &id, "sh", "-c", script])?.spawn()?;
    running.says("ready")?;
    subject.must(&["tasks", "kill", "--signal", signal, &id])?;
    Ok(running.wait()?.code())
}

/// Signals between processes of the container, and what the shell makes of them.
fn children_inside(subject: &Subject) -> Result<()> {
    let script = "for s in HUP INT TERM SEGV KILL; do sh -c \"kill -$s \\$\\$\"; echo $?; done";
    let output = subject.shell("inside", script)?;
    ensure!(output.success(), "{output}");
    let found: Vec<_> = output.text().lines().map(str::to_owned).collect();
    expect_equal("statuses", &found, &["129", "130", "143", "139", "137"].map(str::to_owned).to_vec())
}
