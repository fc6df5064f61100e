//! Snapshots, restores and what restored machines take of the host's memory: the VMM with bare-metal guests, on this machine's own
//! `/dev/kvm`. Each figure has its reference beside it, measured in the same rounds: what the kernel alone takes for the steps,
//! and the plain implementation that copies all of a machine's memory.

mod clone;
mod density;
mod kernel;
mod pause;
mod restore;

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use spore_native::{DEADLINE, Setup, Vm};

use crate::report::Row;
use crate::stats::Sample;

/// Rounds of what copies all of a machine's memory.
const COPIES: usize = 3;

pub(crate) fn run(rounds: usize) -> Result<Vec<Row>> {
    let mut rows = pause::rows(rounds)?;
    rows.extend(restore::rows(rounds)?);
    rows.extend(clone::rows(rounds)?);
    rows.iter_mut().for_each(|row| "native".clone_into(&mut row.ground));
    Ok(rows)
}

pub(crate) fn density() -> Result<Vec<Row>> {
    let mut rows = density::rows()?;
    rows.iter_mut().for_each(|row| "native".clone_into(&mut row.ground));
    Ok(rows)
}

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

fn ms_of_ns(ns: u64) -> f64 {
    ms(Duration::from_nanos(ns))
}

fn row(name: &str, values: &[f64]) -> Row {
    Row::new(name, "ms", &Sample::new(values.to_vec()))
}

/// A guest at its prompt, which has written so much of its memory beside what it needs itself.
fn guest(memory_mib: u64, written_mib: u64, huge_pages: bool) -> Result<Vm> {
    let mut vm = Setup { huge_pages, ..Setup::new("shell").memory_mib(memory_mib) }.boot();
    ensure!(vm.run("hello").contains("ok hello"), "the guest does not answer");
    if written_mib > 0 {
        ensure!(vm.run(&format!("store,0,{written_mib},7")).contains("ok store"), "the guest does not write");
    }
    Ok(vm)
}

/// Waits for the first that a guest says.
fn first_word(vm: &Vm) -> Result<Instant> {
    let said = vm
        .console
        .as_ref()
        .and_then(|console| console.wait(DEADLINE, |text| (!text.is_empty()).then(Instant::now)));
    said.ok_or_else(|| anyhow::anyhow!("the guest says nothing"))
}
