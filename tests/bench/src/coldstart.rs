//! The cold start of a container, from the first instruction of `ctr run --rm` to its end.
//!
//! Every guest boots: what templates of booted guests spare is told by `template`. The phases come from the shim's own
//! timeline (`timeline` in its configuration), on the ground's CLOCK_MONOTONIC.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use spore_harness::containerd::Runtime;

use crate::lab::{COLD, Lab, Timeline, kernel_boot, span};
use crate::report::Row;
use crate::rounds::{Side, alternate};
use crate::stats::Sample;

/// Aims of the project, see the README of this folder.
const SHIM_KIB: f64 = 8.0 * 1024.0;
const VMM_KIB: f64 = 5.0 * 1024.0;

/// Phases: name, the timeline's key where it begins and where it ends.
const PHASES: &[(&str, &str, &str)] = &[
    ("shim: start until it serves", "shim_start_ns", "serving_ns"),
    ("rootfs prepared, beside the VMM", "create_ns", "rootfs_ready_ns"),
    ("VMM: process spawned", "create_ns", "vmm_spawned_ns"),
    ("VMM: configured, guest entered", "vmm_spawned_ns", "kernel_entry_ns"),
    ("guest: kernel and agent up", "kernel_entry_ns", "guest_ready_ns"),
    ("guest: set up", "guest_ready_ns", "agent_ready_ns"),
    ("container created", "agent_ready_ns", "container_created_ns"),
    ("container started", "container_created_ns", "container_started_ns"),
    ("container ran until exit seen", "container_started_ns", "exit_seen_ns"),
];

/// One run: the whole of it in milliseconds, and the shim's timeline of it.
type Run = (f64, Timeline);

pub(crate) fn run(runtime: Runtime, pairs: usize, results: &Path) -> Result<Vec<Row>> {
    let lab = Lab::start(results)?;
    lab.configure(COLD)?;
    let id = |round| format!("{}-{round}-measured", runtime.name());
    let sides = [
        Side::new(Runtime::Runc.name(), |round| lab.whole_run(Runtime::Runc, &format!("runc-{round}"))),
        Side::new(runtime.name(), |round| lab.whole_run(runtime, &id(round))),
    ];
    let [reference, measured] = alternate("coldstart", pairs, sides)?;
    let mut lines = lab.timelines(results)?;
    let reference = Sample::new(reference);
    let whole = Sample::new(measured.clone());
    let mut rows = vec![
        Row::new("ctr run --rm with runc", "ms", &reference),
        Row::new(&format!("ctr run --rm with {}", runtime.name()), "ms", &whole).against(&reference, None),
    ];
    if runtime == Runtime::Spore {
        let runs: Vec<Run> = measured
            .into_iter()
            .zip(1..)
            .map(|(elapsed, round)| {
                let id = id(round);
                let line =
                    lines.remove(&id).with_context(|| format!("the shim wrote no timeline of {id}"))?;
                Ok((elapsed, line))
            })
            .collect::<Result<_>>()?;
        for (_, line) in &runs {
            ensure!(kernel_boot(line).is_some(), "a timeline without the guest's boot: {line:?}");
        }
        rows.extend(of_timelines(&runs, &reference));
    }
    Ok(rows)
}

fn of_timelines(runs: &[Run], runc: &Sample) -> Vec<Row> {
    let lines: Vec<_> = runs.iter().map(|(_, line)| line).collect();
    let mut rows: Vec<_> =
        PHASES.iter().map(|(name, from, to)| Row::new(name, "ms", &durations(&lines, from, to))).collect();
    let kernel = Sample::new(lines.iter().filter_map(|line| kernel_boot(line)).collect());
    rows.push(Row::new("the guest kernel's own boot", "ms", &kernel));
    let own = runs.iter().filter_map(|(elapsed, line)| Some(elapsed - kernel_boot(line)?));
    rows.push(
        Row::new("all but the guest kernel's own boot", "ms", &Sample::new(own.collect()))
            .against(runc, Some(1.0)),
    );
    for (name, key, target) in [
        ("resident: shim", "shim_rss_kib", Some(SHIM_KIB)),
        ("resident: VMM without guest memory", "vmm_rss_kib", Some(VMM_KIB)),
        ("resident: guest memory", "guest_rss_kib", None),
    ] {
        let sample = Sample::new(lines.iter().filter_map(|line| line.get(key)?.as_f64()).collect());
        let row = Row::new(name, "KiB", &sample);
        rows.push(match target {
            Some(target) => row.at_most(target),
            None => row,
        });
    }
    rows
}

fn durations(lines: &[&Timeline], from: &str, to: &str) -> Sample {
    Sample::new(lines.iter().filter_map(|line| span(line, from, to)).collect())
}
