//! Files: a volume of the host's, and the container's own writable layer, beside runc in alternation.
//! One program in the container does the work and tells its own times; the cost of starting it is
//! not among them.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use spore_harness::containerd::Runtime;

use crate::lab::Lab;
use crate::report::Row;
use crate::stats::Sample;

const MIB: f64 = 32.0;
const FILES: f64 = 200.0;
const VOLUME: &str = "/srv/bench/volume";

/// What is timed: name, unit, script (with `DIR` for the directory), and the figure that seconds make.
type Figure = (&'static str, &'static str, &'static str, fn(f64) -> f64);

const PER_FILE_MS: fn(f64) -> f64 = |seconds| seconds * 1000.0 / FILES;
const PER_MIB_MS: fn(f64) -> f64 = |seconds| seconds * 1000.0 / MIB;

const FIGURES: [Figure; 5] = [
    (
        "write and fsync",
        "ms/MiB",
        "dd if=/dev/zero of=DIR/big bs=1M count=32 conv=fsync 2>/dev/null",
        PER_MIB_MS,
    ),
    (
        "read what the guest has not cached",
        "ms/MiB",
        "dd if=DIR/big of=/dev/null bs=1M iflag=direct 2>/dev/null",
        PER_MIB_MS,
    ),
    ("create a file", "ms", "i=0; while [ $i -lt 200 ]; do : > DIR/f$i; i=$((i+1)); done", PER_FILE_MS),
    ("list and stat a file", "ms", "ls -l DIR >/dev/null", PER_FILE_MS),
    ("remove a file", "ms", "rm DIR/f*", PER_FILE_MS),
];

pub(crate) fn run(runtime: Runtime, rounds: usize, results: &Path) -> Result<Vec<Row>> {
    let lab = Lab::start(results)?;
    let runtimes = [Runtime::Runc, runtime];
    let containers = [format!("{}-0", Runtime::Runc.name()), format!("{}-1", runtime.name())];
    for (runtime, id) in runtimes.iter().zip(&containers) {
        let volume = PathBuf::from(VOLUME).join(id);
        fs::create_dir_all(&volume)?;
        let mount = format!("type=bind,src={},dst=/volume,options=rbind:rw", volume.display());
        lab.detach(*runtime, id, &["--mount", &mount])?;
        lab.exec(id, "own", &["mkdir", "/own"])?;
    }
    let mut rows = Vec::new();
    for (place, directory) in [("volume", "/volume"), ("writable layer", "/own")] {
        let mut samples: Vec<[Vec<f64>; 2]> = FIGURES.iter().map(|_| Default::default()).collect();
        for round in 0..=rounds {
            for (side, id) in containers.iter().enumerate() {
                for (figure, (name, _, script, of)) in FIGURES.iter().enumerate() {
                    let script = script.replace("DIR", directory);
                    let exec_id = format!("{}-{figure}-{round}", directory.trim_start_matches('/'));
                    let seconds =
                        timed(&lab, id, &exec_id, &script).with_context(|| format!("{name} in {id}"))?;
                    if round > 0 {
                        samples[figure][side].push(of(seconds));
                    }
                }
            }
        }
        for ((name, unit, ..), samples) in FIGURES.iter().zip(samples) {
            let [reference, measured] = samples.map(Sample::new);
            rows.push(Row::new(&format!("{place}: {name}, runc"), unit, &reference));
            let row = Row::new(&format!("{place}: {name}, {}", runtime.name()), unit, &measured);
            rows.push(row.against(&reference, None));
        }
    }
    for id in &containers {
        lab.remove(id)?;
    }
    fs::remove_dir_all(VOLUME)?;
    lab.timelines(results)?;
    Ok(rows)
}

/// Seconds that a script took in the container, by its shell.
fn timed(lab: &Lab, id: &str, exec_id: &str, script: &str) -> Result<f64> {
    let timed =
        format!("read a b < /proc/uptime; {script}; s=$?; read c d < /proc/uptime; echo $a $c; exit $s");
    let output = lab.exec(id, exec_id, &["sh", "-c", &timed])?;
    ensure!(output.success(), "{output}");
    let text = output.text();
    let times: Vec<f64> = text.split_whitespace().filter_map(|word| word.parse().ok()).collect();
    let [begin, end] = times[..] else { anyhow::bail!("two times expected: {output}") };
    // Of a clock of hundredths; nothing that is timed here is over in one.
    Ok((end - begin).max(0.01))
}
