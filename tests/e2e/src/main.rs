//! End-to-end cases: `ctr` against real containerds, containers in real microVMs.
//!
//! Runs on the ground (`spore-testbed run spore-e2e`, or `make test SUITE=e2e`). Every case
//! is a function of a [`spore_harness::bed::Subject`], that is, a series of containerd and a runtime, so that
//! it can be run with runc too, to show that the case itself is right. Arguments are
//! libtest's (a filter, `--exact`, `--list`, `--test-threads`); the environment chooses the rest:
//!
//! * `SPORE_E2E_RUNTIMES`: `spore` (default), `runc`, or both with a comma;
//! * `SPORE_E2E_SERIES`: series of containerd, default all that the ground has;
//! * `SPORE_SHARD`: `1/2` runs one half, another machine with `2/2` the other;
//! * `SPORE_E2E_SOAK`: how often the long cases of `make soak` run a container, 100 say.

mod cases;
mod host;
mod waiting;

use std::process::ExitCode;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Result, ensure};
use libtest_mimic::{Arguments, Failed, Trial};
use spore_harness::containerd::{Runtime, series};
use spore_harness::shard;

use cases::Case;
use spore_harness::bed::{Bed, Subject};

/// Cases at a time: what waits for one leaves the CPU to the other.
const THREADS: usize = 2;
/// Of a series older than this only the smoke cases run.
const FULL_FROM: &str = "1.7";

fn main() -> ExitCode {
    let mut arguments = Arguments::from_args();
    arguments.test_threads.get_or_insert(THREADS);
    match plan() {
        Ok((bed, trials)) => {
            let conclusion = libtest_mimic::run(&arguments, trials);
            // The instances end before the verdict does, so that a ground can stop at once.
            bed.close();
            conclusion.exit_code()
        }
        Err(error) => {
            eprintln!("spore-e2e: error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn plan() -> Result<(Arc<Bed>, Vec<Trial>)> {
    let bed = Arc::new(Bed::prepare()?);
    let runtimes = list("SPORE_E2E_RUNTIMES", "spore")
        .iter()
        .map(|name| name.parse())
        .collect::<Result<Vec<Runtime>>>()?;
    let all_series = match std::env::var_os("SPORE_E2E_SERIES") {
        Some(_) => list("SPORE_E2E_SERIES", ""),
        None => all_series()?,
    };
    let mut trials = Vec::new();
    for series in &all_series {
        for &runtime in &runtimes {
            let subject = Subject::new(Arc::clone(&bed), series, runtime);
            let cases = cases::all().into_iter().filter(|case| case.applies(&subject));
            let cases = cases.filter(|case| case.smoke || series.as_str() >= FULL_FROM);
            let cases = cases.filter(|case| case.long || cases::soak().is_none());
            trials.extend(cases.map(|case| (case.containers, trial(case, subject.clone()))));
        }
    }
    if let Some((number, of)) = shard::ours()? {
        trials = shard::dealt(trials, number, of);
    }
    Ok((bed, trials.into_iter().map(|(_, trial)| trial).collect()))
}

/// Every series of the ground, among them those that Spore promises to work with.
fn all_series() -> Result<Vec<String>> {
    let found = series()?;
    for (promised, newer) in [("1.6", false), ("1.7", false), ("2.1", true)] {
        let there = found.iter().any(|series| series == promised || newer && series.as_str() > promised);
        ensure!(there, "the ground has containerd {found:?}, but not {promised}: see host/rootfs.rs");
    }
    Ok(found)
}

fn trial(case: Case, subject: Subject) -> Trial {
    let name = format!("{}/{}/{}", subject.series, subject.runtime.name(), case.name);
    Trial::test(name.clone(), move || {
        let begin = Instant::now();
        let result = subject.perform(case.alone, case.run);
        // The runner tells reasons only at the very end, which a deadline may cut off.
        let seconds = begin.elapsed().as_secs_f32();
        match &result {
            Ok(()) => eprintln!("  {name}: {seconds:.1} s"),
            Err(error) => eprintln!("  {name}: failed after {seconds:.1} s: {error:#}"),
        }
        result.map_err(|error| Failed::from(format!("{error:#}")))
    })
}

fn list(variable: &str, default: &str) -> Vec<String> {
    let value = std::env::var(variable).unwrap_or_else(|_| default.to_owned());
    value.split(',').map(|part| part.trim().to_owned()).filter(|part| !part.is_empty()).collect()
}
