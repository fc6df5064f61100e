//! Exit statuses reach `ctr` as they are.

use anyhow::{Result, ensure};

use super::{Case, expect_equal};
use spore_harness::bed::Subject;

pub(crate) const CASES: &[Case] = &[
    Case::new("status::zero_and_one", zero_and_one).smoke().starts(2),
    Case::new("status::all_in_one_guest", all_in_one_guest),
];

/// Those with a meaning to shells, runtimes and Docker, and the largest. Each takes a
/// container: `leftovers::sequential` goes through them.
pub(super) const TELLING: &[i32] = &[0, 1, 2, 125, 126, 127, 128, 130, 137, 143, 255];

fn zero_and_one(subject: &Subject) -> Result<()> {
    exits_with(subject, 0)?;
    exits_with(subject, 1)
}

fn exits_with(subject: &Subject, status: i32) -> Result<()> {
    let output = subject.shell("status", &format!("exit {status}"))?;
    ensure!(output.code() == status, "\"exit {status}\" gave: {output}");
    Ok(())
}

fn all_in_one_guest(subject: &Subject) -> Result<()> {
    let script = "for i in $(seq 0 255); do sh -c \"exit $i\"; echo $?; done";
    let output = subject.shell("all", script)?;
    ensure!(output.success(), "{output}");
    let found: Vec<_> = output.text().lines().map(str::to_owned).collect();
    expect_equal("statuses", &found, &(0..=255).map(|status| status.to_string()).collect())
}
