//! Pids, and what is asked of a task that cannot be.

use anyhow::{Context, Result, ensure};
use spore_harness::api::{self, Streams};
use spore_harness::bed::Subject;
use spore_harness::image::BUSYBOX;

use super::{Case, equal, refused};
use crate::fifo::Fifo;
use crate::guest::{Guest, shared};

pub(crate) const CASES: &[Case] = &[
    Case::new("pids: the task's own is listed", own_pid),
    Case::new("pids: further processes are listed", further),
    Case::new("tasks: a second Start is refused", second_start),
    Case::new("tasks: an id in use is refused", same_id),
    Case::new("tasks: a signal that is none is refused", bad_signal),
    Case::new("tasks: a running one is not deleted without force", running_delete),
    Case::new("tasks: one that is created has not run, and can be killed", created).starts(1),
    Case::new("tasks: signals by name and by number", signals).starts(1),
    Case::new("tasks: kill --all reaches every process", kill_all).starts(1),
    Case::new("tasks: a signal to a stopped one is refused", stopped_kill).starts(1),
    Case::new("tasks: a size for what has no terminal", no_terminal),
];

fn own_pid(subject: &Subject) -> Result<()> {
    shared(subject, |guest| {
        let list = subject.must(&["tasks", "ls"])?;
        let line = list.lines().find(|line| line.starts_with(&guest.id)).context("in the list of tasks")?;
        let pid = line.split_whitespace().nth(1).context("a pid")?;
        let pids = guest.must("ps", &[], &[])?;
        ensure!(
            pids.lines().skip(1).any(|line| line.split_whitespace().next() == Some(pid)),
            "{pid} in {pids}"
        );
        Ok(())
    })
}

fn further(subject: &Subject) -> Result<()> {
    shared(subject, |guest| {
        let mut running = guest.exec_with(&[], &["sh", "-c", "echo ready; cat"])?.spawn_with_open_stdin()?;
        running.says("ready")?;
        let pids = guest.must("ps", &[], &[])?;
        // The container's init, the sleep below it, and the exec's cat.
        ensure!(pids.lines().skip(1).count() >= 3, "{pids}");
        ensure!(pids.contains("exec-"), "the exec is told: {pids}");
        running.close_stdin();
        running.wait()?;
        Ok(())
    })
}

fn second_start(subject: &Subject) -> Result<()> {
    shared(subject, |guest| {
        refused(&guest.task("start", &["--detach"], &[])?.run()?, &["already exists"])?;
        guest.shell("true").map(drop)
    })
}

fn same_id(subject: &Subject) -> Result<()> {
    shared(subject, |guest| {
        let run = ["run", "--rm", "--runtime", subject.runtime.id(), BUSYBOX, &guest.id, "true"];
        refused(&subject.ctr(&run)?.run()?, &["already exists"])?;
        guest.shell("true").map(drop)
    })
}

fn bad_signal(subject: &Subject) -> Result<()> {
    shared(subject, |guest| {
        refused(&guest.task("kill", &["--signal", "99"], &[])?.run()?, &[])?;
        refused(&guest.task("kill", &["--signal", "SIGNONE"], &[])?.run()?, &["SIGNONE"])?;
        guest.shell("true").map(drop)
    })
}

fn running_delete(subject: &Subject) -> Result<()> {
    shared(subject, |guest| {
        refused(&guest.task("delete", &[], &[])?.run()?, &["stopped"])?;
        guest.shell("true").map(drop)
    })
}

/// What a container writes whose task is created and no more, and the container.
pub(super) fn prepared(subject: &Subject) -> Result<(Fifo, Guest)> {
    let (id, out) = (subject.id("created"), Fifo::new(subject)?);
    let runtime = subject.runtime.id();
    subject.must(&["containers", "create", "--runtime", runtime, BUSYBOX, &id, "echo", "it ran"])?;
    let guest = Guest::adopt(subject, &id);
    api::create(subject, &id, Streams { stdout: out.path(), stderr: out.path(), ..Default::default() })?;
    Ok((out, guest))
}

fn created(subject: &Subject) -> Result<()> {
    let (out, guest) = prepared(subject)?;
    equal("state", &guest.status()?, "CREATED")?;
    guest.must("kill", &["--signal", "KILL"], &[])?;
    guest.until("STOPPED")?;
    equal("output", &out.text(), "")?;
    guest.must("delete", &[], &[]).map(drop)
}

/// Notes in `/got` which signals came; ends with TERM.
const NOTING: &str = "for s in HUP INT QUIT USR1 USR2 WINCH CONT; do trap \"echo $s >>/got\" $s; done; \
                      trap 'exit 0' TERM; echo ready >/got; while :; do sleep 1000000 & wait $!; done";

fn signals(subject: &Subject) -> Result<()> {
    let guest = Guest::start_with(subject, &[], &["sh", "-c", NOTING])?;
    guest.shell("until test -s /got; do sleep 0.1; done")?;
    for (signal, noted) in [
        ("SIGHUP", "HUP"),
        ("2", "INT"),
        ("QUIT", "QUIT"),
        ("SIGUSR1", "USR1"),
        ("12", "USR2"),
        ("28", "WINCH"),
    ] {
        guest.must("kill", &["--signal", signal], &[])?;
        guest.shell(&format!("until grep -q ^{noted}$ /got; do sleep 0.1; done"))?;
    }
    guest.must("kill", &["--signal", "TERM"], &[])?;
    guest.until("STOPPED")
}

fn kill_all(subject: &Subject) -> Result<()> {
    let script = "trap 'echo init >/init' USR1; \
                  (trap 'echo child >/child' USR1; echo >/armed; while :; do sleep 1000000 & wait $!; done) & \
                  while :; do sleep 1000000 & wait $!; done";
    let guest = Guest::start_with(subject, &[], &["sh", "-c", script])?;
    guest.shell("until test -e /armed; do sleep 0.1; done")?;
    guest.must("kill", &["--all", "--signal", "USR1"], &[])?;
    let both = "until test -s /init && test -s /child; do sleep 0.1; done; cat /init /child";
    equal("both", &guest.shell(both)?, "init\nchild\n")
}

fn stopped_kill(subject: &Subject) -> Result<()> {
    let guest = Guest::start_with(subject, &[], &["true"])?;
    guest.until("STOPPED")?;
    refused(&guest.task("kill", &["--signal", "KILL"], &[])?.run()?, &["not found"])?;
    equal("state", &guest.status()?, "STOPPED")
}

fn no_terminal(subject: &Subject) -> Result<()> {
    // There is nothing to do, and nothing wrong.
    shared(subject, |guest| {
        api::resize(subject, &guest.id)??;
        guest.shell("true").map(drop)
    })
}
