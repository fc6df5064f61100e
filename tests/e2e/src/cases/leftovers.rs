//! Runs leave nothing behind: no process, mount, file, socket, loop device, cgroup.

use anyhow::{Result, ensure};

use super::status::TELLING;
use super::{Case, soak};
use spore_harness::bed::Subject;

pub(crate) const CASES: &[Case] = &[
    Case::new("leftovers::sequential", sequential).alone().long().starts(1 + SEQUENTIAL),
    Case::new("leftovers::concurrent", concurrent).alone().long().starts(1 + WIDTH),
    Case::new("leftovers::refused", refused).alone().newest_unless_soak(),
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

/// A refused start leaves as little.
fn refused(subject: &Subject) -> Result<()> {
    subject.warm_up()?;
    let before = subject.inventory()?;
    let output = subject.run("refused", &["no-such-command"])?.run()?;
    ensure!(!output.success(), "{output}");
    subject.nothing_beyond(&before)
}
