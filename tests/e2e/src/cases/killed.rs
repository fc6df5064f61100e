//! The VMM or the shim killed by force, at every phase: the client is told, nothing is left.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use spore_harness::call::{Call, Output, Running};
use spore_harness::image::BUSYBOX;
use spore_harness::wait;

use super::{Case, expect_contains, soak};
use spore_harness::bed::Subject;
use spore_harness::processes::{self, child_and_parent, kill_hard, process};

pub(crate) const CASES: &[Case] = &[
    Case::new("killed::vmm_while_it_boots", |subject| while_booting(subject, VMM))
        .spore_only()
        .alone()
        .newest_unless_soak(),
    Case::new("killed::vmm_while_it_runs", vmm_while_it_runs).spore_only().alone().newest_unless_soak(),
    Case::new("killed::shim_while_it_boots", |subject| while_booting(subject, SHIM))
        .spore_only()
        .alone()
        .newest_unless_soak(),
    Case::new("killed::shim_while_it_runs", shim_while_it_runs).alone().newest_unless_soak(),
    Case::new("killed::shim_before_delete", shim_before_delete).alone().newest_unless_soak(),
    Case::new("killed::file_server", file_server).spore_only().alone().newest_unless_soak(),
    Case::new("killed::shim_with_volumes", shim_with_volumes).spore_only().alone().newest_unless_soak(),
    Case::new("killed::shim_while_it_exports", shim_while_it_exports)
        .spore_only()
        .alone()
        .newest_unless_soak()
        .starts(2),
    Case::new("killed::at_any_moment", at_any_moment)
        .spore_only()
        .alone()
        .newest_unless_soak()
        .starts(2 + 2 * MOMENTS),
];

const VMM: &str = "spore-vmm";
const FILE_SERVER: &str = "spore-fs";
const SHIM: &str = "containerd-shim-spore-v2";
const DEADLINE: Duration = Duration::from_secs(60);
/// Moments of a container's life at which it is killed.
const MOMENTS: usize = 3;

fn started(subject: &Subject, id: &str, script: &str) -> Result<Running> {
    subject.ctr(&["run", "--rm", "--runtime", subject.runtime.id(), BUSYBOX, id, "sh", "-c", script])?.spawn()
}

fn while_booting(subject: &Subject, victim: &str) -> Result<()> {
    let before = warm(subject)?;
    let id = subject.id("booting");
    let call = started(subject, &id, "echo must not be seen")?;
    // The VMM appears when the shim has prepared everything.
    let (vmm, shim) = child_and_parent(VMM, &[SHIM, &id])?;
    kill_hard(if victim == VMM { vmm } else { shim })?;
    told(&call.wait()?)?;
    gone(subject, &id, &before)
}

fn vmm_while_it_runs(subject: &Subject) -> Result<()> {
    let before = warm(subject)?;
    let id = subject.id("running");
    let mut call = started(subject, &id, "echo ready; while :; do sleep 1000; done")?;
    call.says("ready")?;
    kill_hard(child_and_parent(VMM, &[SHIM, &id])?.0)?;
    let output = call.wait()?;
    // As a process that was killed.
    ensure!(output.code() == 137, "status of ctr: {output}");
    gone(subject, &id, &before)
}

fn shim_while_it_runs(subject: &Subject) -> Result<()> {
    let before = warm(subject)?;
    let id = subject.id("running");
    let mut call = started(subject, &id, "echo ready; while :; do sleep 1000; done")?;
    call.says("ready")?;
    kill_hard(process(&[shim_of(subject), &id])?)?;
    told(&call.wait()?)?;
    gone(subject, &id, &before)
}

fn shim_before_delete(subject: &Subject) -> Result<()> {
    let before = warm(subject)?;
    let id = subject.id("stopped");
    subject.must(&[
        "run",
        "--detach",
        "--runtime",
        subject.runtime.id(),
        BUSYBOX,
        &id,
        "sh",
        "-c",
        "exit 0",
    ])?;
    wait::until("the task has stopped", DEADLINE, || {
        let tasks = subject.must(&["tasks", "ls"]).ok()?;
        tasks.lines().any(|line| line.contains(&id) && line.contains("STOPPED")).then_some(())
    })?;
    kill_hard(process(&[shim_of(subject), &id])?)?;
    gone(subject, &id, &before)
}

/// A container with the directory `data` of the host, which is made, as its /data.
fn with_volume(subject: &Subject, id: &str, data: &Path, script: &str) -> Result<Running> {
    fs::create_dir_all(data)?;
    fs::write(data.join("file"), "from the host\n")?;
    let mount = format!("type=bind,src={},dst=/data,options=rbind:rw", data.display());
    let args = [
        "run",
        "--rm",
        "--runtime",
        subject.runtime.id(),
        "--mount",
        &mount,
        BUSYBOX,
        id,
        "sh",
        "-c",
        script,
    ];
    subject.ctr(&args)?.spawn()
}

/// The container goes on, and what it asks of its volume fails; nothing waits for ever.
fn file_server(subject: &Subject) -> Result<()> {
    let before = warm(subject)?;
    let id = subject.id("volume");
    let data = subject.bed.rootfs().with_file_name(&id);
    let script =
        "cat /data/file; echo ready; while ls /data >/dev/null 2>&1; do sleep 0.1; done; ls /data; echo over";
    let mut call = with_volume(subject, &id, &data, script)?;
    call.says("from the host\nready")?;
    kill_hard(child_and_parent(FILE_SERVER, &[SHIM, &id])?.0)?;
    let output = call.wait()?;
    fs::remove_dir_all(&data)?;
    ensure!(output.success() && output.text().ends_with("over\n"), "{output}");
    let errors = output.errors();
    ensure!(errors.contains("not connected") || errors.contains("I/O error"), "{output}");
    gone(subject, &id, &before)
}

fn shim_with_volumes(subject: &Subject) -> Result<()> {
    let before = warm(subject)?;
    let id = subject.id("volume");
    let data = subject.bed.rootfs().with_file_name(&id);
    let mut call = with_volume(subject, &id, &data, "cat /data/file; while :; do sleep 1000; done")?;
    call.says("from the host")?;
    kill_hard(process(&[SHIM, &id])?)?;
    told(&call.wait()?)?;
    ensure!(fs::read_to_string(data.join("file"))? == "from the host\n", "the host's file");
    fs::remove_dir_all(&data)?;
    gone(subject, &id, &before)
}

/// In the middle of the export of what a container has written: nothing of it is believed, and the next task finds
/// the writes on the disk.
fn shim_while_it_exports(subject: &Subject) -> Result<()> {
    const WRITES: &str = "test ! -e /last || exec cat /last; dd if=/dev/zero of=/large bs=1M count=96 2>/dev/null; \
         echo whole > /last; sync; echo ready; while :; do sleep 1000000; done";
    let before = warm(subject)?;
    let id = subject.id("exports");
    let args = ["run", "--runtime", subject.runtime.id(), BUSYBOX, &id, "sh", "-c", WRITES];
    let mut call = subject.ctr(&args)?.spawn()?;
    call.says("ready")?;
    let pausing = subject.ctr(&["tasks", "pause", &id])?.spawn()?;
    let (_, shim) = child_and_parent("upper-fill", &[SHIM, &id])?;
    kill_hard(shim)?;
    told(&pausing.wait()?)?;
    told(&call.wait()?)?;
    subject.ctr(&["tasks", "delete", "--force", &id])?.run()?;
    let archive = subject.ctr(&["snapshots", "diff", &id])?.run()?;
    ensure!(archive.success(), "{archive}");
    let mut tar = Command::new("tar");
    tar.args(["--list", "--gzip"]);
    let listed = Call::new(tar).stdin(archive.stdout).run()?;
    ensure!(listed.success(), "{listed}");
    let of_the_export = |name: &str| matches!(name.trim_matches(['.', '/']), "large" | "last");
    ensure!(!listed.text().lines().any(of_the_export), "a part of the export: {listed}");
    remove_fifos(&id)?;
    let second = subject.ctr(&["tasks", "start", &id])?.run()?;
    ensure!(second.success() && second.text() == "whole\n", "{second}");
    gone(subject, &id, &before)
}

/// VMM and shim, each at moments spread evenly over the whole of a run.
fn at_any_moment(subject: &Subject) -> Result<()> {
    let before = warm(subject)?;
    let whole = subject.shell("whole", "true")?.elapsed;
    let moments = soak().map_or(MOMENTS, |runs| runs.div_ceil(4));
    let mut killed = [0, 0];
    for moment in 0..2 * moments {
        let id = subject.id("moment");
        let begin = Instant::now();
        let call = started(subject, &id, "true")?;
        let offset = whole.mul_f64(((moment / 2) as f64 + 0.5) / moments as f64);
        wait::until("the moment", DEADLINE, || (begin.elapsed() >= offset).then_some(()))?;
        let victim = if moment % 2 == 0 {
            processes::find_child(VMM, &[SHIM, &id]).map(|(vmm, _)| vmm)
        } else {
            processes::find(&[SHIM, &id])
        };
        // It may not have come yet, or have gone by itself just now.
        killed[moment % 2] += victim.map_or(0, |victim| usize::from(kill_hard(victim).is_ok()));
        let output = call.wait()?;
        ensure!(output.success() || told(&output).is_ok(), "{output}");
        gone(subject, &id, &before)
            .with_context(|| format!("killed {offset:?} of {whole:?} after the start: {output}"))?;
    }
    let [vmm, shim] = killed;
    ensure!(vmm > 0 && shim > 0, "killed {vmm} VMMs and {shim} shims at {moments} moments");
    Ok(())
}

fn shim_of(subject: &Subject) -> &'static str {
    if subject.is_spore() { SHIM } else { "containerd-shim-runc-v2" }
}

type Before = (spore_harness::leftovers::Inventory, Vec<String>);

fn warm(subject: &Subject) -> Result<Before> {
    subject.warm_up()?;
    subject.inventory()
}

/// The client learns of a failure.
fn told(output: &Output) -> Result<()> {
    ensure!(!output.success(), "ctr reports success: {output}");
    if output.code() == 1 {
        expect_contains("standard error", &output.errors(), "ctr: ")?;
    }
    Ok(())
}

/// What a client does after a failure, and then the comparison.
fn gone(subject: &Subject, id: &str, before: &Before) -> Result<()> {
    subject.ctr(&["tasks", "delete", "--force", id])?.run()?;
    subject.ctr(&["containers", "delete", id])?.run()?;
    remove_fifos(id)?;
    subject.nothing_beyond(before)
}

/// The fifos of a task are its client's to remove; `ctr` leaves them when it did not see the end.
fn remove_fifos(id: &str) -> Result<()> {
    for directory in fs::read_dir("/run/containerd/fifo").into_iter().flatten().flatten() {
        let mut names = fs::read_dir(directory.path())?.flatten().map(|entry| entry.file_name());
        if names.any(|name| name.to_string_lossy().starts_with(id)) {
            fs::remove_dir_all(directory.path())?;
        }
    }
    Ok(())
}
