//! The cold start of a container, from the first instruction of `ctr run --rm` to its end.
//!
//! Runs alternate between the two runtimes, so that what slows the machine slows both. The
//! phases come from the shim's own timeline (`timeline` in its configuration), on the
//! ground's CLOCK_MONOTONIC.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use serde_json::{Map, Value};
use spore_harness::containerd::{Containerd, Runtime, series};
use spore_harness::image::{self, BUSYBOX};

use crate::report::Row;
use crate::stats::Sample;

const HOME: &str = "/srv/bench";
const CONFIG: &str = "/etc/spore/config.toml";
const TIMELINE: &str = "/srv/bench/timeline.jsonl";
/// Series of containerd to measure with: the one of Debian stable.
const SERIES: &str = "1.7";

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

pub(crate) fn run(runtime: Runtime, pairs: usize, results: &Path) -> Result<Vec<Row>> {
    let directory = PathBuf::from(HOME);
    fs::create_dir_all(&directory).with_context(|| format!("making {HOME} (is this the ground?)"))?;
    record_timelines()?;
    let all = series()?;
    let chosen =
        all.iter().find(|found| *found == SERIES).or(all.last()).context("the ground has no containerd")?;
    eprintln!("coldstart: starting containerd {chosen}");
    let log = results.join("logs/containerd.log");
    let containerd = Containerd::start(chosen, &directory.join("containerd"), &log)?;
    let archive = directory.join("image.tar");
    image::write_images(Path::new("/bin/busybox"), &archive)?;
    containerd.import(&archive, "overlayfs", &[])?;

    let (mut reference, mut measured) = (Vec::new(), Vec::new());
    for pair in 0..=pairs {
        let runc = once(&containerd, Runtime::Runc, &format!("runc-{pair}"))?;
        let id = format!("{}-{pair}-measured", runtime.name());
        let ours = once(&containerd, runtime, &id)?;
        eprintln!(
            "coldstart: pair {pair} of {pairs}: runc {runc:.0} ms, {} {ours:.0} ms{}",
            runtime.name(),
            if pair == 0 { " (warm-up, not counted)" } else { "" },
        );
        if pair > 0 {
            reference.push(runc);
            measured.push((id, ours));
        }
    }
    drop(containerd);
    let reference = Sample::new(reference);
    let whole = Sample::new(measured.iter().map(|(_, elapsed)| *elapsed).collect());
    let mut rows = vec![
        Row::new("ctr run --rm with runc", "ms", &reference),
        Row::new(&format!("ctr run --rm with {}", runtime.name()), "ms", &whole).against(&reference, None),
    ];
    if runtime == Runtime::Spore {
        let runs = with_timelines(measured, timelines(results)?)?;
        rows.extend(of_timelines(&runs, &reference));
    }
    Ok(rows)
}

/// Time of one run in milliseconds.
fn once(containerd: &Containerd, runtime: Runtime, id: &str) -> Result<f64> {
    let output = containerd.ctr(&["run", "--rm", "--runtime", runtime.id(), BUSYBOX, id, "true"]).run()?;
    ensure!(output.success() && output.stdout.is_empty() && output.stderr.is_empty(), "{id}: {output}");
    Ok(output.elapsed.as_secs_f64() * 1000.0)
}

fn record_timelines() -> Result<()> {
    let config = fs::read_to_string(CONFIG).with_context(|| format!("reading {CONFIG}"))?;
    fs::write(CONFIG, format!("timeline = \"{TIMELINE}\"\n{config}"))
        .with_context(|| format!("writing {CONFIG}"))
}

fn timelines(results: &Path) -> Result<Vec<Map<String, Value>>> {
    let Ok(text) = fs::read_to_string(TIMELINE) else { return Ok(Vec::new()) };
    fs::write(results.join("timeline.jsonl"), &text)?;
    text.lines()
        .map(|line| serde_json::from_str(line).with_context(|| format!("reading a timeline: {line}")))
        .collect()
}

/// One run: the whole of it in milliseconds, and the shim's timeline of it.
type Run = (f64, Map<String, Value>);

/// Every run with its timeline, which names the container.
fn with_timelines(runs: Vec<(String, f64)>, mut lines: Vec<Map<String, Value>>) -> Result<Vec<Run>> {
    runs.into_iter()
        .map(|(id, elapsed)| {
            let at = lines.iter().position(|line| line.get("id").and_then(Value::as_str) == Some(&id));
            let at = at.with_context(|| format!("the shim wrote no timeline of {id} to {TIMELINE}"))?;
            Ok((elapsed, lines.swap_remove(at)))
        })
        .collect()
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

/// From the kernel's first instruction to the agent's: what is not Spore's to shorten here.
fn kernel_boot(line: &Map<String, Value>) -> Option<f64> {
    Some(span(line, "kernel_entry_ns", "guest_ready_ns")? - line.get("agent_boot_ns")?.as_f64()? / 1e6)
}

fn durations(lines: &[&Map<String, Value>], from: &str, to: &str) -> Sample {
    Sample::new(lines.iter().filter_map(|line| span(line, from, to)).collect())
}

/// Milliseconds between two marks of a timeline.
fn span(line: &Map<String, Value>, from: &str, to: &str) -> Option<f64> {
    Some((line.get(to)?.as_f64()? - line.get(from)?.as_f64()?) / 1e6)
}
