//! A container whose machine is put away is the same afterwards, to its clients to the byte.

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use spore_harness::bed::Subject;
use spore_harness::network::space::Space;

use super::keeper::{ECHO, Keeper};
use crate::cases::{expect_contains, expect_equal};

/// Lines that a process is sent and sends back.
const LINES: usize = 20_000;
/// Writes lines until it is told to stop.
const WRITER: &str = "n=0; while [ ! -e /stop ]; do n=$((n+1)); echo line $n; done";

fn lines(count: usize) -> String {
    (1..=count).map(|number| format!("line {number}\n")).collect()
}

/// `spore ps`'s status of it.
fn status(subject: &Subject, id: &str) -> Result<String> {
    let output = subject.spore(&["ps", "--json"])?.run()?;
    let rows: Value = serde_json::from_slice(&output.stdout).with_context(|| output.to_string())?;
    let mut rows = rows.as_array().into_iter().flatten();
    let row = rows.find(|row| row["id"] == id).with_context(|| output.to_string())?;
    Ok(row["status"].as_str().unwrap_or_default().to_owned())
}

fn hibernations(subject: &Subject) -> Result<Vec<String>> {
    let output = subject.spore(&["snapshot", "ls", "--json"])?.run()?;
    let rows: Value = serde_json::from_slice(&output.stdout).with_context(|| output.to_string())?;
    let rows = rows.as_array().into_iter().flatten().filter(|row| row["purpose"] == "hibernation");
    Ok(rows.filter_map(|row| row["id"].as_str()).map(str::to_owned).collect())
}

impl Keeper {
    fn sleeps(&self) -> Result<()> {
        let told = self.spore(&["hibernate", &self.id, "--json"])?;
        eprintln!("hibernate: {}", told.trim_end());
        expect_equal("the status", &status(&self.scene.subject, &self.id)?.as_str(), &"hibernated")
    }

    fn wakes(&self) -> Result<()> {
        let told = self.spore(&["resume", &self.id, "--json"])?;
        eprintln!("resume: {}", told.trim_end());
        expect_equal("the status", &status(&self.scene.subject, &self.id)?.as_str(), &"running")
    }
}

/// Memory, disk, volume, network, pid and clients; by either resume.
pub(super) fn and_resume(subject: &Subject) -> Result<()> {
    drop(Space::new(&subject.id("first"))?);
    let before = super::inventory_after_a_snapshot(subject)?;
    let mut keeper = Keeper::start(subject)?;
    keeper.set("one")?;
    keeper.reaches_its_peer()?;
    let pid = keeper.task()?;
    let mut live = keeper.exec("live", ECHO)?;
    live.feed(b"a\n")?;
    live.says("got a\n")?;

    keeper.sleeps()?;
    let task = keeper.task()?;
    expect_equal("the task", &task, &pid.replace("RUNNING", "PAUSED"))?;
    let [snapshot] = &hibernations(subject)?[..] else {
        anyhow::bail!("no hibernation is listed, or several")
    };
    for (args, part) in [
        (&["snapshot", "rm", snapshot][..], "hibernates in it; resume the container, or kill and delete it"),
        (&["snapshot", "create", &keeper.id], "hibernates; resume it first"),
        (&["hibernate", &keeper.id], "hibernates; resume it first"),
        (&["fs", "cat", &keeper.id, "/v"], "hibernates; resume it first"),
    ] {
        let output = subject.spore(args)?.run()?;
        ensure!(!output.success(), "{args:?}: {output}");
        expect_contains("standard error", &output.errors(), part)?;
    }
    // Typed while nobody is there to read it.
    live.feed(b"b\n")?;
    keeper.wakes()?;
    live.says("got b\n")?;
    expect_equal("the task", &keeper.task()?, &pid)?;
    keeper.has("one")?;
    keeper.reaches_its_peer()?;
    keeper.set("two")?;

    keeper.sleeps()?;
    let [next] = &hibernations(subject)?[..] else { anyhow::bail!("not one hibernation is listed") };
    ensure!(next != snapshot, "it hibernates in what it did before");
    subject.must(&["tasks", "resume", &keeper.id])?;
    keeper.has("two")?;
    keeper.reaches_its_peer()?;
    live.feed(b"c\n")?;
    live.says("got c\n")?;
    // A snapshot that was taken before can still be gone back to, and one of a machine that has woken too.
    let taken = keeper.snapshot()?;
    keeper.set("three")?;
    keeper.sleeps()?;
    keeper.wakes()?;
    keeper.has("three")?;
    keeper.back_to(&taken)?;
    keeper.has("two")?;
    live.feed(b"d\n")?;
    live.says("got d\n")?;
    live.close_stdin();
    expect_equal("the live exec's status", &live.wait()?.code(), &0)?;
    let log = std::fs::read_to_string(&keeper.log)?;
    expect_equal("the volume", &log.as_str(), &"one\ntwo\nthree\n")?;
    ensure!(subject.spore(&["snapshot", "rm", &taken])?.run()?.success(), "{taken}");

    // Killed where it has no machine.
    keeper.sleeps()?;
    subject.must(&["tasks", "kill", "--signal", "KILL", &keeper.id])?;
    let Keeper { scene, call, _network, _volume, .. } = keeper;
    expect_equal("the container's status", &call.wait()?.code(), &137)?;
    drop((scene, _network, _volume));
    subject.nothing_beyond(&before)
}

/// In the midst of output and of input, again and again.
pub(super) fn streams(subject: &Subject) -> Result<()> {
    let keeper = Keeper::start(subject)?;
    let mut writer = keeper.exec("writer", WRITER)?;
    let mut reader = keeper.exec("reader", "while read line; do echo \"$line\"; done")?;
    let expected = lines(LINES);
    writer.says("line 1\n")?;
    for part in expected.as_bytes().chunks(expected.len() / 3 + 1) {
        // More than the process can have read.
        reader.feed(part)?;
        ensure!(!writer.ended()?, "the writer has ended");
        keeper.sleeps()?;
        keeper.wakes()?;
    }
    reader.close_stdin();
    keeper.scene.says(&keeper.id, "touch /stop")?;
    let written = writer.wait()?.text();
    ensure!(
        written == lines(written.lines().count()),
        "{} bytes arrive, and not the lines one after the other",
        written.len()
    );
    let read = reader.wait()?;
    ensure!(read.text() == expected, "{} of {} bytes come back", read.stdout.len(), expected.len());
    Ok(())
}
