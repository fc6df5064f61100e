//! Memory that a container frees goes back to the host.

use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::unistd::Pid;
use serde_json::json;
use spore_harness::api;
use spore_harness::image::BUSYBOX;
use spore_harness::wait;

use super::Case;

use spore_harness::bed::Subject;
use spore_harness::processes::child_and_parent;

pub(crate) const CASES: &[Case] = &[
    Case::new("memory::freed_goes_back_to_the_host", freed).spore_only().since("2."),
    Case::new("memory::a_lower_limit_takes_from_the_machine", lowered).spore_only().since("2."),
];

/// MiB that the container fills, in a machine of 512.
const FILLED: u64 = 150;
/// MiB beyond what the VMM had before that may stay: page cache, pieces smaller than the guest
/// reports.
const MAY_STAY: u64 = 20;
/// The guest loads its balloon some seconds after it is ready, and reports a part of its free
/// memory every two seconds.
const DEADLINE: Duration = Duration::from_secs(120);

fn freed(subject: &Subject) -> Result<()> {
    let id = subject.id("freed");
    // dd holds a buffer of this size until the one who reads from it goes.
    let script = format!(
        "exec 3<&0; echo ready; read -r next <&3; \
         dd if=/dev/zero bs={FILLED}M count=1 2>/dev/null | {{ head -c 1 >/dev/null; echo full; read -r next <&3; }}; \
         echo freed; read -r next <&3"
    );
    let options =
        ["run", "--rm", "--runtime", subject.runtime.id(), "--annotation", "io.spore.memory_mib=512"];
    let command = [BUSYBOX, &id, "sh", "-c", &script];
    let mut call = subject.ctr(&[&options[..], &command[..]].concat())?.spawn_with_open_stdin()?;
    call.says("ready")?;
    let (vmm, _) = child_and_parent("spore-vmm", &["containerd-shim-spore-v2", &id])?;
    let idle = resident_mib(vmm)?;
    call.feed(b"\n")?;
    call.says("full")?;
    let full = resident_mib(vmm)?;
    // Part of it may be memory that the guest had used before.
    ensure!(full >= idle + FILLED / 2 && full >= FILLED, "{idle} MiB idle, {full} with {FILLED} filled");
    call.feed(b"\n")?;
    call.says("freed")?;
    let begin = Instant::now();
    let what = format!("at most {} MiB of the VMM are resident ({full} were)", idle + MAY_STAY);
    let left = wait::until(&what, DEADLINE, || resident_mib(vmm).ok().filter(|mib| *mib <= idle + MAY_STAY))
        .with_context(|| format!("{:?} MiB now", resident_mib(vmm)))?;
    let seconds = begin.elapsed().as_secs_f32();
    eprintln!("  resident: {idle} MiB idle, {full} full, {left} {seconds:.1} s after it was freed");
    call.feed(b"\n")?;
    let output = call.wait()?;
    ensure!(output.success(), "{output}");
    Ok(())
}

/// An Update to a lower limit inflates the balloon: the guest has less, and the host what it had touched. A higher one gives it back.
fn lowered(subject: &Subject) -> Result<()> {
    const FILE: u64 = 150;
    let id = subject.id("lowered");
    // What the file leaves in the guest's page cache is memory that nobody frees.
    let script = format!(
        "dd if=/dev/zero of=/file bs=1M count={FILE} 2>/dev/null; sync; echo full; while :; do sleep 1000; done"
    );
    let limit = (448 << 20).to_string();
    let options = ["run", "--rm", "--runtime", subject.runtime.id(), "--memory-limit", &limit];
    let mut call =
        subject.ctr(&[&options[..], &[BUSYBOX, &id, "sh", "-c", &script][..]].concat())?.spawn()?;
    call.says("full")?;
    let (vmm, _) = child_and_parent("spore-vmm", &["containerd-shim-spore-v2", &id])?;
    let available = || -> Result<u64> {
        let exec = subject.id("exec");
        let awk = ["awk", "/^MemAvailable:/ { print int($2 / 1024) }", "/proc/meminfo"];
        let text = subject.must(&[&["tasks", "exec", "--exec-id", &exec, &id][..], &awk[..]].concat())?;
        text.trim().parse().with_context(|| text)
    };
    let (full, wide) = (resident_mib(vmm)?, available()?);
    ensure!(full >= FILE, "{full} MiB are resident with a file of {FILE}");
    let update = |mib: u64| api::update(subject, &id, &json!({ "memory": { "limit": mib << 20 } }));
    update(64)??;
    let left = wait::until("the host has what the guest lost", DEADLINE, || {
        resident_mib(vmm).ok().filter(|mib| *mib + FILE / 2 <= full)
    })
    .with_context(|| format!("{:?} MiB now, {full} before", resident_mib(vmm)))?;
    // 64 for the container, 64 for the guest itself, of 512.
    let narrow = wait::until("the guest has less", DEADLINE, || available().ok().filter(|mib| *mib <= 128))
        .with_context(|| format!("{:?} MiB available now, {wide} before", available()))?;
    update(448)??;
    let again =
        wait::until("the guest has it again", DEADLINE, || available().ok().filter(|mib| *mib + 64 >= wide))
            .with_context(|| format!("{:?} MiB available now, {wide} at first", available()))?;
    eprintln!("  resident: {full} MiB, {left} after; available in the guest: {wide}, {narrow}, {again}");
    subject.must(&["tasks", "kill", "--signal", "KILL", &id])?;
    call.wait().map(drop)
}

/// What a VMM holds that is no file's: above all its guest's memory.
fn resident_mib(vmm: Pid) -> Result<u64> {
    let status = fs::read_to_string(format!("/proc/{vmm}/status")).context("reading the VMM's status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:"));
    let kib = line.and_then(|line| line.trim().strip_suffix(" kB")?.parse::<u64>().ok());
    Ok(kib.context("no RssAnon in the VMM's status")? / 1024)
}
