//! Pids, and what is not a terminal.

use anyhow::{Context, Result, ensure};
use spore_harness::bed::Subject;

use super::Case;
use crate::guest::shared;

pub(crate) const CASES: &[Case] = &[
    Case::new("pids: the task's own is listed", own_pid),
    Case::new("pids: further processes are listed", further),
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
