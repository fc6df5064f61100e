//! One case for each behaviour that users of a runtime rely on. Each runs with runc first, in the
//! same machine and under the same containerd, and then with Spore: a case that runc fails is
//! a wrong case. Arguments are libtest's; the environment chooses the rest:
//!
//! * `SPORE_E2E_SERIES`: series of containerd, default 1.7 and the newest;
//! * `SPORE_CONFORMANCE_TURNS`: each case under one of the series only, by turns;
//! * `SPORE_SHARD`: `1/2` runs one half, another machine with `2/2` the other.
//!
//! The table of results goes to `conformance.md` among the results.

mod bundle;
mod cases;
mod fifo;
mod guest;
mod lan;
mod probe;
mod table;

use std::process::ExitCode;
use std::sync::Arc;
use std::time::Instant;

use anyhow::Result;
use libtest_mimic::{Arguments, Failed, Trial};
use spore_harness::bed::{Bed, Subject};
use spore_harness::containerd::{Runtime, series};
use spore_harness::network::traffic;
use spore_harness::shard;

use cases::network::moments;
use cases::{Case, Difference};
use table::{Table, Verdict};

/// Cases at a time: what waits for one leaves the CPU to the other.
const THREADS: usize = 2;
const SERIES: [&str; 2] = ["1.7", "2."];

fn main() -> ExitCode {
    let words: Vec<_> = std::env::args().skip(1).collect();
    // What runs elsewhere as a copy of this program.
    let (verb, rest) = words.split_first().map_or(("", &[][..]), |(verb, rest)| (verb.as_str(), rest));
    let other = match verb {
        probe::VERB => Some(probe::main(rest)),
        traffic::VERB => Some(traffic::main(rest)),
        moments::HOOK => Some(moments::hook_main(rest)),
        _ => None,
    };
    if let Some(outcome) = other {
        return match outcome {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("{verb}: {error:#}");
                ExitCode::FAILURE
            }
        };
    }
    let mut arguments = Arguments::from_args();
    arguments.test_threads.get_or_insert(THREADS);
    match plan() {
        Ok((bed, table, trials)) => {
            let conclusion = libtest_mimic::run(&arguments, trials);
            // What cases share ends before the instances, and these before the verdict.
            guest::end_all();
            bed.close();
            if let Err(error) = table.write() {
                eprintln!("spore-conformance: error: writing the table: {error:#}");
                return ExitCode::FAILURE;
            }
            conclusion.exit_code()
        }
        Err(error) => {
            eprintln!("spore-conformance: error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn plan() -> Result<(Arc<Bed>, Arc<Table>, Vec<Trial>)> {
    let bed = Arc::new(Bed::prepare()?);
    let table = Arc::new(Table::default());
    let chosen = match std::env::var("SPORE_E2E_SERIES") {
        Ok(list) => list.split(',').map(|series| series.trim().to_owned()).collect(),
        Err(_) => series()?
            .into_iter()
            .filter(|series| SERIES.iter().any(|wanted| series.starts_with(wanted)))
            .collect::<Vec<_>>(),
    };
    let turns = std::env::var_os("SPORE_CONFORMANCE_TURNS").is_some();
    let mut trials = Vec::new();
    for (turn, series) in chosen.iter().enumerate() {
        let subjects =
            [Runtime::Runc, Runtime::Spore].map(|runtime| Subject::new(Arc::clone(&bed), series, runtime));
        for (number, case) in cases::all(series).into_iter().enumerate() {
            if turns && !case.one_series && number % chosen.len() != turn {
                continue;
            }
            trials.push((case.weight, trial(case, subjects.clone(), Arc::clone(&table))));
        }
    }
    if let Some((number, of)) = shard::ours()? {
        trials = shard::dealt(trials, number, of);
    }
    Ok((bed, table, trials.into_iter().map(|(_, trial)| trial).collect()))
}

fn trial(case: Case, [runc, spore]: [Subject; 2], table: Arc<Table>) -> Trial {
    let name = format!("{}/{}", runc.series, case.name);
    Trial::test(name.clone(), move || {
        let series = runc.series.as_str();
        let perform = |subject: &Subject| {
            let begin = Instant::now();
            let result = subject.perform(case.alone, case.run);
            let verdict = match (&result, case.differs) {
                (Ok(()), _) => Verdict::Same,
                (Err(error), Some(reason)) if error.is::<Difference>() => Verdict::Differs(reason),
                (Err(_), _) => Verdict::Failed,
            };
            let seconds = begin.elapsed().as_secs_f32();
            match &result {
                Ok(()) => eprintln!("  {name} with {}: {seconds:.1} s", subject.runtime.name()),
                Err(error) => {
                    eprintln!(
                        "  {name} with {}: failed after {seconds:.1} s: {error:#}",
                        subject.runtime.name()
                    );
                }
            }
            table.note(case.name, series, subject.runtime, verdict);
            (verdict, result)
        };
        let (verdict, result) = perform(&runc);
        if verdict == Verdict::Failed {
            let error = result.err().map(|error| format!("{error:#}")).unwrap_or_default();
            return Err(Failed::from(format!("the case is wrong, runc fails it: {error}")));
        }
        match perform(&spore) {
            (Verdict::Failed, Err(error)) => Err(Failed::from(format!("{error:#}"))),
            (Verdict::Same, _) if case.differs.is_some() => {
                Err(Failed::from("the difference that is listed for it is none any more"))
            }
            _ => Ok(()),
        }
    })
}
