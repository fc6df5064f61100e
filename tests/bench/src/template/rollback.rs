//! `spore rollback` beside a restore of the same snapshot, which `spore clone --snapshot` is.

use std::cell::RefCell;

use anyhow::{Context, Result};
use spore_harness::containerd::Runtime;

use crate::lab::{Lab, told_ms};
use crate::report::Row;
use crate::rounds::{Side, alternate};
use crate::stats::Sample;

/// A rollback takes at most so many times a restore.
const AIM: f64 = 2.0;
const SOURCE: &str = "rolled-back";

/// What the commands tell, beside their whole times.
#[derive(Default)]
struct Told {
    restore: Vec<f64>,
    rollback: Vec<f64>,
    gap: Vec<f64>,
}

pub(super) fn run(lab: &Lab, rounds: usize) -> Result<Vec<Row>> {
    lab.detach(Runtime::Spore, SOURCE, &[])?;
    let (created, _) = lab.spore_json(&["snapshot", "create", SOURCE])?;
    let snapshot = created["id"].as_str().with_context(|| format!("no id in {created}"))?;
    let told = RefCell::new(Told::default());
    let sides = [
        Side::new("restore", |round| {
            let name = format!("restored-{round}");
            let (answer, ms) = lab.spore_json(&["clone", SOURCE, "--snapshot", snapshot, "--name", &name])?;
            let clone = &answer["clones"][0];
            if round > 0 {
                let task = told_ms(clone, "create_ns")? + told_ms(clone, "start_ns")?;
                told.borrow_mut().restore.push(task);
            }
            lab.remove(&name)?;
            Ok(ms)
        }),
        Side::new("rollback", |round| {
            let (answer, ms) = lab.spore_json(&["rollback", SOURCE, snapshot])?;
            if round > 0 {
                let mut told = told.borrow_mut();
                told.rollback.push(told_ms(&answer, "total_ns")?);
                told.gap.push(told_ms(&answer, "gap_ns")?);
            }
            Ok(ms)
        }),
    ];
    let [restores, rollbacks] = alternate("rollback", rounds, sides)?.map(Sample::new);
    lab.spore(&["snapshot", "rm", snapshot])?;
    lab.remove(SOURCE)?;
    let Told { restore, rollback, gap } = told.into_inner();
    let (restore, rollback, gap) = (Sample::new(restore), Sample::new(rollback), Sample::new(gap));
    Ok(vec![
        Row::new("restore, the whole command", "ms", &restores),
        Row::new("rollback, the whole command", "ms", &rollbacks).against(&restores, Some(AIM)),
        Row::new("restore, the task's Create and Start", "ms", &restore),
        Row::new("rollback, as the shim tells it", "ms", &rollback).against(&restore, Some(AIM)),
        Row::new("rollback, the container stands still", "ms", &gap),
    ])
}
