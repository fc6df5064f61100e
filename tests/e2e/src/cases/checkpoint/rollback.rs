//! A container goes back to its snapshots, in place.

use std::fs;

use anyhow::{Result, ensure};
use spore_harness::bed::Subject;
use spore_harness::network::space::Space;

use super::keeper::{ECHO, Keeper};
use super::{SHOWN, Scene, wait};
use crate::cases::{expect_contains, expect_equal};

/// Back, forth, and back again; what was begun in between ends, and everybody else goes on.
pub(super) fn back_and_forth(subject: &Subject) -> Result<()> {
    // Directories that stay.
    drop(Space::new(&subject.id("first"))?);
    let before = super::inventory_after_a_snapshot(subject)?;
    let mut keeper = Keeper::start(subject)?;
    keeper.set("one")?;
    keeper.reaches_its_peer()?;
    let task = keeper.task()?;
    let mut live = keeper.exec("live", ECHO)?;
    live.feed(b"a\n")?;
    live.says("got a\n")?;
    let first = keeper.snapshot()?;
    let mut late = keeper.exec("late", "echo begun; sleep 100000")?;
    late.says("begun")?;
    keeper.set("two")?;
    live.feed(b"b\n")?;
    live.says("got b\n")?;
    let second = keeper.snapshot()?;
    keeper.set("three")?;
    keeper.has("three")?;

    let told = keeper.back_to(&first[..12])?;
    expect_equal("the snapshot's id", &told["snapshot"], &first.as_str().into())?;
    for time in ["total_ns", "gap_ns", "restore_ns", "agent_ns", "streams_ns", "disk_ns", "thaw_ns"] {
        ensure!(told[time].as_u64().is_some_and(|ns| ns > 0), "{time} in {told}");
    }
    expect_equal("the status of what was begun since", &late.wait()?.code(), &137)?;
    keeper.has("one")?;
    expect_equal("the task", &keeper.task()?, &task)?;
    live.feed(b"c\n")?;
    live.says("got c\n")?;
    keeper.back_to(&second)?;
    keeper.has("two")?;
    live.feed(b"d\n")?;
    live.says("got d\n")?;
    keeper.back_to(&first)?;
    keeper.has("one")?;
    keeper.reaches_its_peer()?;
    live.feed(b"e\n")?;
    live.says("got e\n")?;
    // The attached client, and the volume.
    keeper.set("four")?;
    let log = wait::until("the volume has it", SHOWN, || {
        fs::read_to_string(&keeper.log).ok().filter(|log| log.ends_with("four\n"))
    })?;
    expect_equal("the volume", &log.as_str(), &"one\ntwo\nthree\nfour\n")?;

    // One that is paused stays paused.
    subject.must(&["tasks", "pause", &keeper.id])?;
    keeper.back_to(&second)?;
    expect_contains("the task", &keeper.task()?, "PAUSED")?;
    subject.must(&["tasks", "resume", &keeper.id])?;
    keeper.has("two")?;
    // And what is taken now can be gone back to as well.
    keeper.set("five")?;
    let third = keeper.snapshot()?;
    keeper.set("six")?;
    keeper.back_to(&third)?;
    keeper.has("five")?;
    live.feed(b"f\n")?;
    live.says("got f\n")?;
    live.close_stdin();
    expect_equal("the live exec's status", &live.wait()?.code(), &0)?;

    subject.must(&["tasks", "kill", "--signal", "KILL", &keeper.id])?;
    let Keeper { scene, id, call, _network, _volume, .. } = keeper;
    expect_equal("the container's status", &call.wait()?.code(), &137)?;
    let output = subject.spore(&["rollback", &id, &first])?.run()?;
    ensure!(!output.success(), "{output}");
    for snapshot in [&first, &second, &third] {
        ensure!(subject.spore(&["snapshot", "rm", snapshot])?.run()?.success(), "{snapshot}");
    }
    drop((scene, _network, _volume));
    subject.nothing_beyond(&before)
}

/// What cannot be gone back to, and the container that goes on as it is.
pub(super) fn refusals(subject: &Subject) -> Result<()> {
    let mut scene = Scene::new(subject);
    let [one, other] = ["one", "other"];
    let one = scene.start(one, super::COUNTER)?;
    let other = scene.start(other, super::COUNTER)?;
    let created = subject.spore(&["snapshot", "create", &other])?.run()?;
    ensure!(created.success(), "{created}");
    let snapshot = created.text().trim_end().to_owned();
    let refused = |args: &[&str], part: &str| -> Result<()> {
        let output = subject.spore(args)?.run()?;
        ensure!(!output.success(), "{args:?}: {output}");
        expect_contains("standard error", &output.errors(), part)
    };
    let counted = scene.counted(&one)?;
    refused(&["rollback", &one, &snapshot], "is of container")?;
    refused(&["rollback", &one, "ffffffffffff"], "there is none")?;
    let after = scene.counted(&one)?;
    expect_equal("the counters in memory and on disk", &after.0, &after.1)?;
    ensure!(after.0 > counted.0, "it does not go on: {counted:?}, {after:?}");
    subject.must(&["tasks", "kill", "--signal", "KILL", &other])?;
    wait::until("the task has ended", SHOWN, || {
        let tasks = subject.must(&["tasks", "ls"]).ok()?;
        tasks.lines().any(|line| line.starts_with(&other) && line.contains("STOPPED")).then_some(())
    })?;
    refused(&["rollback", &other, &snapshot], "cannot roll back a stopped container")?;
    let removed = subject.spore(&["snapshot", "rm", &snapshot])?.run()?;
    ensure!(removed.success(), "{removed}");
    Ok(())
}
