//! Guest kernels compared under Spore itself: Debian's and the slim one of `packaging/kernel`,
//! each as bzImage and as ELF file; how long they boot, what memory they take. Runs alternate.

use std::path::Path;

use anyhow::{Result, ensure};
use spore_harness::containerd::Runtime;
use spore_harness::job::{CHECKOUT, PAYLOAD};

use crate::lab::{COLD, Lab, Timeline, kernel_boot, span};
use crate::report::Row;
use crate::stats::Sample;

/// Name, kernel and initramfs in the payload's checkout; the first is what the others are compared with.
const KERNELS: &[(&str, &str, &str)] = &[
    ("Debian's vmlinuz", "target/guest/vmlinuz", "target/guest/initramfs"),
    ("Debian's vmlinux", "target/guest/vmlinux", "target/guest/initramfs"),
    ("slim bzImage", "target/guest-slim/vmlinuz", "target/guest-slim/initramfs"),
    ("slim vmlinux", "target/guest-slim/vmlinux", "target/guest-slim/initramfs"),
];
/// What is told of each.
const FIGURES: [(&str, &str); 5] = [
    ("kernel's own boot", "ms"),
    ("kernel and agent up", "ms"),
    ("reserved by the kernel", "MiB"),
    ("in use in the guest", "MiB"),
    ("resident on the host", "MiB"),
];
const SCRIPT: &str = "awk '/^Mem(Total|Available):/ { print $2 }' /proc/meminfo";
/// The machine's memory in these runs.
const MEMORY_MIB: f64 = 256.0;

pub(crate) fn run(rounds: usize, results: &Path) -> Result<Vec<Row>> {
    let lab = Lab::start(results)?;
    let there = |path: &&str| Path::new(PAYLOAD).join(CHECKOUT).join(path).exists();
    let kernels: Vec<_> = KERNELS.iter().filter(|(_, kernel, _)| there(kernel)).collect();
    let mut memory = vec![(Vec::new(), Vec::new()); kernels.len()];
    for round in 0..=rounds {
        for (index, (name, kernel, initramfs)) in kernels.iter().enumerate() {
            lab.configure(&format!(
                "{COLD}\nkernel = \"{PAYLOAD}/{CHECKOUT}/{kernel}\"\ninitramfs = \"{PAYLOAD}/{CHECKOUT}/{initramfs}\""
            ))?;
            let output = lab.run(Runtime::Spore, &id(index, round), &["sh", "-c", SCRIPT])?;
            let kib: Vec<f64> = output.text().lines().filter_map(|line| line.parse().ok()).collect();
            ensure!(kib.len() == 2, "{name}: {output}");
            if round > 0 {
                memory[index].0.push(MEMORY_MIB - kib[0] / 1024.0);
                memory[index].1.push((kib[0] - kib[1]) / 1024.0);
            }
            eprintln!("kernels: round {round} of {rounds}: {name}");
        }
    }
    let lines = lab.timelines(results)?;
    let mut rows: Vec<Row> = Vec::new();
    let mut first: Option<[Sample; 5]> = None;
    for (index, ((name, ..), (reserved, used))) in kernels.iter().zip(memory).enumerate() {
        let sample = |of: &dyn Fn(&Timeline) -> Option<f64>| {
            Sample::new((1..=rounds).filter_map(|round| of(lines.get(&id(index, round))?)).collect())
        };
        let samples = [
            sample(&kernel_boot),
            sample(&|line| span(line, "kernel_entry_ns", "agent_ready_ns")),
            Sample::new(reserved),
            Sample::new(used),
            sample(&|line| Some(line.get("guest_rss_kib")?.as_f64()? / 1024.0)),
        ];
        for (at, ((what, unit), sample)) in FIGURES.iter().zip(&samples).enumerate() {
            let row = Row::new(&format!("{name}: {what}"), unit, sample);
            rows.push(match &first {
                Some(first) => row.against(&first[at], None),
                None => row,
            });
        }
        first.get_or_insert(samples);
    }
    Ok(rows)
}

fn id(kernel: usize, round: usize) -> String {
    format!("kernel-{kernel}-{round}")
}
