//! Pids, and what is asked of a task that cannot be.

use anyhow::{Context, Result, ensure};
use spore_harness::bed::Subject;
use spore_harness::image::BUSYBOX;

use super::{Case, refused};
use crate::guest::shared;

pub(crate) const CASES: &[Case] = &[
    Case::new("pids: the task's own is listed", own_pid),
    Case::new("pids: further processes are listed", further),
    Case::new("tasks: a second Start is refused", second_start),
    Case::new("tasks: an id in use is refused", same_id),
    Case::new("tasks: a signal that is none is refused", bad_signal),
    Case::new("tasks: a running one is not deleted without force", running_delete),
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
