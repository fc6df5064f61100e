//! What becomes of writable disks: a restore's that is cut short, and one that is captured again and again.

use std::collections::HashSet;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use spore_harness::bed::Subject;
use spore_harness::{processes, wait};

use super::{COUNTER, SHOWN, Scene};
use crate::cases::expect_equal;

const SHIM: &str = "containerd-shim-spore-v2";
/// The moment is short; how often it may be missed.
const ATTEMPTS: usize = 20;
/// More than what is merged at once, less than what a machine can stack.
const CHECKPOINTS: usize = 20;
/// See `shim/src/rootfs/writable/layers/merge.rs`.
const FEW: usize = 16;

/// Directories of rootfs snapshots in which there is a file of this name.
fn with(subject: &Subject, name: &str) -> Result<HashSet<PathBuf>> {
    let snapshots = subject.with(|containerd| Ok(containerd.snapshots()))?;
    let dirs = fs::read_dir(snapshots)?.flatten().map(|entry| entry.path().join("spore"));
    Ok(dirs.filter(|dir| dir.join(name).exists()).collect())
}

fn new_with(subject: &Subject, name: &str, before: &HashSet<PathBuf>) -> Option<PathBuf> {
    with(subject, name).ok()?.into_iter().find(|dir| !before.contains(dir))
}

/// Files of a disk.
fn files(dir: &Path) -> Vec<String> {
    let names = fs::read_dir(dir).into_iter().flatten().flatten();
    let names = names.filter_map(|entry| entry.file_name().into_string().ok());
    names.filter(|name| name == "writable.ext4" || name.starts_with("layer")).collect()
}

/// The shim is killed when the disk is there and the task has not begun to run.
pub(super) fn a_killed_restore(subject: &Subject) -> Result<()> {
    let mut scene = Scene::new(subject);
    let source = scene.start("source", COUNTER)?;
    let image = scene.checkpoint(&source)?;
    for _ in 0..ATTEMPTS {
        let before = with(subject, "writable.ext4")?;
        let id = scene.name("cut");
        let call = subject.ctr(&["containers", "restore", "--rw", "--live", &id, &image])?.spawn()?;
        let dir = wait::until("a disk is restored", SHOWN, || new_with(subject, "writable.ext4", &before))?;
        let shim = processes::process(&[SHIM, &id])?;
        processes::halt(shim)?;
        let in_time = dir.join("restoring").exists();
        processes::kill_hard(shim)?;
        let output = call.wait()?;
        if !in_time {
            continue;
        }
        ensure!(!output.success(), "ctr reports success: {output}");
        wait::until("delete removes the disk", SHOWN, || {
            (files(&dir).is_empty() && !dir.join("restoring").exists()).then_some(())
        })
        .with_context(|| format!("{}: {:?}", dir.display(), files(&dir)))?;
        // The container is as good as new, and so is the checkpoint.
        subject.must(&["tasks", "start", "--detach", &id])?;
        expect_equal("what it says", &scene.says(&id, "echo here")?.as_str(), &"here\n")?;
        let again = scene.restore("again", &image)?;
        let (memory, disk) = scene.counted(&again)?;
        return expect_equal("the counters in memory and on disk", &memory, &disk);
    }
    bail!("no restore was killed before its task began")
}

pub(super) fn many_checkpoints(subject: &Subject) -> Result<()> {
    let mut scene = Scene::new(subject);
    let others = with(subject, "writable.ext4")?;
    let source = scene.start("many", COUNTER)?;
    let dir = new_with(subject, "writable.ext4", &others).context("the container has no disk")?;
    scene.says(&source, "echo early > /early")?;
    let (before, _) = scene.counted(&source)?;
    let image = scene.checkpoint(&source)?;
    let paths = subject.bed.rootfs().with_file_name(subject.id("checkpoints"));
    for round in 0..CHECKPOINTS {
        // Each overwrites some of what others wrote.
        let write = format!(
            "rm -f /part-{} && dd if=/dev/urandom of=/part-{round} bs=64k count=16 2>/dev/null && sync",
            round / 2
        );
        scene.says(&source, &write)?;
        let path = paths.join(round.to_string());
        let path = path.to_str().context("a path")?;
        subject.must(&["tasks", "checkpoint", "--image-path", path, &source])?;
    }
    // ctr does not print their names.
    let named = subject.must(&["images", "ls", "-q"])?;
    scene.images.extend(named.lines().filter(|name| name.contains(&source)).map(str::to_owned));
    wait::until("layers are merged", SHOWN, || (files(&dir).len() <= FEW).then_some(()))
        .with_context(|| format!("{:?}", files(&dir)))?;
    fs::remove_dir_all(&paths)?;
    let (memory, disk) = scene.counted(&source)?;
    expect_equal("the counters in memory and on disk", &memory, &disk)?;
    let sums = "cat /part-* | sha256sum";
    let expected = scene.says(&source, sums)?;
    subject.must(&["tasks", "kill", "--signal", "KILL", &source])?;
    wait::until("the task is deleted", SHOWN, || {
        subject.ctr(&["tasks", "delete", &source]).ok()?.run().ok()?.success().then_some(())
    })?;
    subject.must(&["tasks", "start", "--detach", &source])?;
    expect_equal("the disk's content in another machine", &scene.says(&source, sums)?, &expected)?;
    let copy = scene.restore("copy", &image)?;
    let (memory, disk) = scene.counted(&copy)?;
    expect_equal("the early one's counters", &memory, &disk)?;
    ensure!(before > 0 && memory >= before, "it began anew: {memory}, and {before} before the checkpoint");
    expect_equal(
        "the early one's files",
        &scene.says(&copy, "cat /early; ls -d /part-* 2>/dev/null; true")?.as_str(),
        &"early\n",
    )
}
