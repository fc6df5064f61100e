//! Runs leave nothing behind: no process, mount, file, socket, loop device, cgroup.

use anyhow::{Result, ensure};

use super::Case;
use crate::bed::Subject;

pub(crate) const CASES: &[Case] = &[
    Case::new("leftovers::sequential", sequential).alone(),
    Case::new("leftovers::concurrent", concurrent).alone(),
    Case::new("leftovers::refused", refused).alone(),
];

fn soak() -> bool {
    std::env::var_os("SPORE_E2E_SOAK").is_some()
}

fn sequential(subject: &Subject) -> Result<()> {
    let count = if soak() { 500 } else { 20 };
    one(subject)?;
    let before = subject.inventory()?;
    for index in 0..count {
        one(subject).map_err(|error| error.context(format!("run {} of {count}", index + 1)))?;
    }
    subject.nothing_beyond(&before)
}

fn concurrent(subject: &Subject) -> Result<()> {
    let (rounds, width) = if soak() { (20, 16) } else { (1, 8) };
    one(subject)?;
    let before = subject.inventory()?;
    for _ in 0..rounds {
        let calls: Vec<_> = (0..width)
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
    one(subject)?;
    let before = subject.inventory()?;
    let output = subject.run("refused", &["no-such-command"])?.run()?;
    ensure!(!output.success(), "{output}");
    subject.nothing_beyond(&before)
}

fn one(subject: &Subject) -> Result<()> {
    let output = subject.run("one", &["echo", "one"])?.run()?;
    ensure!(output.success() && output.text() == "one\n", "{output}");
    Ok(())
}
