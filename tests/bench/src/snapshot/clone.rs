//! From a running machine to others that go on from where it is, by a zygote: nothing is written.

use std::sync::Mutex;
use std::time::Instant;

use anyhow::{Result, anyhow};
use spore_native::{Restore, Vm};

use super::kernel::Memory;
use super::restore::{COUNT, IN_FLIGHT, MANY, REFERENCES, at_once, restored, speaker};
use super::{COPIES, first_word, ms, ms_of_ns, row};
use crate::report::Row;
use crate::stats::Sample;

const MEMORY_MIB: u64 = 2048;
/// What the guest has written, MiB.
const WRITTEN: [u64; 3] = [0, 64, 1024];
/// Of which the aims are.
const USUAL_MIB: u64 = 64;
/// From the source's to the clone's first word.
const TARGET_MS: f64 = 15.0;
/// Of a fork and a bare VM.
const TARGET_RATIO: f64 = 1.3;

pub(super) fn rows(rounds: usize) -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    for written in WRITTEN {
        let mut source = speaker(MEMORY_MIB, written)?;
        let (mut whole, mut pause, mut zygotes, mut forks, mut calls) =
            (vec![], vec![], vec![], vec![], vec![]);
        for round in 0..=rounds {
            let begun = Instant::now();
            let mut zygote = source.zygote("z", &[])?;
            let there = Instant::now();
            let mut vm = zygote.fork();
            let forked = Instant::now();
            let called = restored(&mut vm, Restore::inherited())?;
            let runs = first_word(&vm)?;
            if round > 0 {
                whole.push(ms(runs - begun));
                pause.push(ms_of_ns(zygote.times.pause_ns));
                zygotes.push(ms(there - begun));
                forks.push(ms(forked - there));
                calls.push(ms(called - forked));
            }
            zygote.end(&mut source)?;
        }
        let what = format!("clone, {MEMORY_MIB} MiB, {written} MiB written");
        let all = row(&format!("{what}: one, from the call to its guest's first word"), &whole);
        rows.push(if written == USUAL_MIB { all.at_most(TARGET_MS) } else { all });
        rows.push(row(&format!("{what}: the source's pause"), &pause));
        rows.push(row(&format!("{what}: of it, the call for a zygote"), &zygotes));
        rows.push(row(&format!("{what}: of it, forking the VMM"), &forks));
        rows.push(row(&format!("{what}: of it, building the machine"), &calls));
    }
    rows.push(many(rounds)?);
    Ok(rows)
}

/// Many of one zygote, several at a time, the zygote included.
fn many(rounds: usize) -> Result<Row> {
    let mut source = speaker(MEMORY_MIB, USUAL_MIB)?;
    let alone = Memory::new(MEMORY_MIB, USUAL_MIB, false)?;
    let (mut each, mut kernel) = (Vec::new(), Vec::new());
    for round in 0..=rounds.min(COPIES) {
        let reference = ms(alone.fork_and_build(REFERENCES)?);
        let begun = Instant::now();
        let zygote = Mutex::new(source.zygote("z", &[])?);
        let vms = at_once(|| -> Result<Vm> {
            let mut vm = zygote.lock().map_err(|_| anyhow!("a worker panicked"))?.fork();
            restored(&mut vm, Restore::inherited())?;
            Ok(vm)
        })?;
        if round > 0 {
            each.push(ms(begun.elapsed()) / COUNT);
            kernel.push(reference);
        }
        drop(vms);
        zygote.into_inner().map_err(|_| anyhow!("a worker panicked"))?.end(&mut source)?;
    }
    let name = format!(
        "clone, {MANY} of one zygote with {IN_FLIGHT} in flight: each, beside a fork and a bare KVM VM"
    );
    Ok(row(&name, &each).against(&Sample::new(kernel), Some(TARGET_RATIO)))
}
