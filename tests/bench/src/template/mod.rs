//! What templates and snapshots spare: containers from boot templates and from container templates beside runc, rollback
//! beside restore, and for how long a container stands still, as it sees it itself.

mod boot;
mod gap;
mod place;
mod rollback;
mod start;
mod tick;

use std::path::Path;

use anyhow::Result;

pub(crate) use self::tick::{VERB as TICK, main as tick};
use crate::lab::Lab;
use crate::report::Row;

pub(crate) fn run(rounds: usize, results: &Path) -> Result<Vec<Row>> {
    let lab = Lab::start(results)?;
    let mut rows = boot::run(&lab, rounds)?;
    rows.extend(start::run(&lab, rounds)?);
    rows.extend(rollback::run(&lab, rounds)?);
    rows.extend(gap::run(&lab)?);
    lab.timelines(results)?;
    Ok(rows)
}
