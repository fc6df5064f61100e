//! Further processes in a running container: how long one takes, and how fast its output comes,
//! beside runc in alternation.

use std::io::{Read, Write};
use std::path::Path;
use std::time::Instant;

use anyhow::{Result, ensure};
use spore_harness::call::Output;
use spore_harness::containerd::Runtime;

use crate::lab::Lab;
use crate::report::Row;
use crate::stats::Sample;

/// Of the stream that is timed.
const STREAM_MIB: f64 = 64.0;
/// Lines for each round.
const ECHOES: usize = 10;
/// What users would notice: an exec that takes longer than runc's.
const AIM: f64 = 1.0;

/// What is timed: name, unit, command, and the figure that milliseconds make.
type Figure = (&'static str, &'static str, &'static [&'static str], fn(f64) -> f64);

const FIGURES: [Figure; 3] = [
    ("ctr tasks exec true", "ms", &["true"], |ms| ms),
    ("ctr tasks exec of a shell and a child", "ms", &["sh", "-c", "ls / >/dev/null; exit 0"], |ms| ms),
    ("64 MiB of standard output", "MiB/s", &["head", "-c", "67108864", "/dev/zero"], |ms| {
        STREAM_MIB * 1000.0 / ms
    }),
];

/// A line goes to `cat` and comes back, in processes that run already.
fn echo(lab: &Lab, containers: &[String; 2], runtime: Runtime, rounds: usize) -> Result<Vec<Row>> {
    let mut processes = Vec::new();
    for id in containers {
        processes.push(lab.exec_piped(id, "echo", &["cat"])?);
    }
    let mut samples = [Vec::new(), Vec::new()];
    // The first line of each waits for its process.
    for round in 0..=rounds * ECHOES {
        for (process, sample) in processes.iter_mut().zip(&mut samples) {
            let begin = Instant::now();
            process.stdin.write_all(b"x\n")?;
            process.stdout.read_exact(&mut [0; 2])?;
            if round > 0 {
                sample.push(begin.elapsed().as_secs_f64() * 1000.0);
            }
        }
    }
    let [reference, measured] = samples.map(Sample::new);
    let name = "a line to cat and back";
    Ok(vec![
        Row::new(&format!("{name}, runc"), "ms", &reference),
        Row::new(&format!("{name}, {}", runtime.name()), "ms", &measured).against(&reference, None),
    ])
}

pub(crate) fn run(runtime: Runtime, rounds: usize, results: &Path) -> Result<Vec<Row>> {
    let lab = Lab::start(results)?;
    let runtimes = [Runtime::Runc, runtime];
    let containers = [format!("{}-0", Runtime::Runc.name()), format!("{}-1", runtime.name())];
    for (runtime, id) in runtimes.iter().zip(&containers) {
        lab.detach(*runtime, id, &[])?;
    }
    let mut rows = Vec::new();
    for (figure, (name, unit, command, of)) in FIGURES.iter().enumerate() {
        let mut samples = [Vec::new(), Vec::new()];
        for round in 0..=rounds {
            for (id, sample) in containers.iter().zip(&mut samples) {
                let output: Output = lab.exec(id, &format!("e{figure}-{round}"), command)?;
                ensure!(output.success(), "{name} in {id}: {output}");
                if round > 0 {
                    sample.push(of(output.ms()));
                }
            }
        }
        let [reference, measured] = samples.map(Sample::new);
        eprintln!(
            "exec: {name}: runc {:.0} {unit}, {} {:.0} {unit}",
            reference.median(),
            runtime.name(),
            measured.median()
        );
        rows.push(Row::new(&format!("{name}, runc"), unit, &reference));
        // Less is better only of times.
        let aim = (*unit == "ms").then_some(AIM);
        rows.push(Row::new(&format!("{name}, {}", runtime.name()), unit, &measured).against(&reference, aim));
    }
    rows.extend(echo(&lab, &containers, runtime, rounds)?);
    for id in &containers {
        lab.remove(id)?;
    }
    lab.timelines(results)?;
    Ok(rows)
}
