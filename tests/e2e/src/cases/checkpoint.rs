//! A snapshot of a container's machine is a checkpoint of containerd's, and a task again.

mod by_path;
mod disks;
mod hibernate;
mod integrity;
mod keeper;
mod rollback;

use std::collections::HashSet;
use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use spore_harness::bed::Subject;
use spore_harness::call::{Output, Running};
use spore_harness::image::BUSYBOX;
use spore_harness::leftovers::Inventory;
use spore_harness::wait;

use super::{Case, expect_contains, expect_equal};

pub(crate) const CASES: &[Case] = &[
    Case::new("checkpoint::a_counter_goes_on_where_it_was", a_counter_goes_on).spore_only().starts(3),
    // The ctr of 1.7 tells only runc.
    Case::new("checkpoint::with_exit_the_task_ends", with_exit).spore_only().starts(2).since("2."),
    // Nor does the containerd of 1.7 know paths of others.
    Case::new("checkpoint::by_path_is_a_delta", by_path::delta).spore_only().starts(4).since("2."),
    Case::new("checkpoint::with_volumes", with_volumes).spore_only().starts(2),
    Case::new("checkpoint::of_what_cannot_be_is_refused", refusals).spore_only().starts(1),
    // What is in the store afterwards is counted.
    Case::new("checkpoint::snapshot_command", snapshot_command).spore_only().starts(3).alone(),
    Case::new("checkpoint::rollback_back_and_forth", rollback::back_and_forth).spore_only().alone().starts(3),
    Case::new("checkpoint::rollback_refused", rollback::refusals).spore_only().starts(2),
    Case::new("checkpoint::hibernate_and_resume", hibernate::and_resume).spore_only().alone().starts(6),
    Case::new("checkpoint::hibernate_loses_no_byte", hibernate::streams)
        .spore_only()
        .newest_unless_soak()
        .starts(4),
    Case::new("checkpoint::a_killed_restore_leaves_no_disk", disks::a_killed_restore)
        .spore_only()
        .alone()
        .newest_unless_soak()
        .starts(3),
    Case::new("checkpoint::many_leave_few_layers", disks::many_checkpoints)
        .spore_only()
        .alone()
        .newest_unless_soak()
        .starts(3),
    Case::new("checkpoint::integrity_of_postgresql", integrity::postgresql)
        .spore_only()
        .newest_unless_soak()
        .starts(6),
    Case::new("checkpoint::integrity_of_hashes", integrity::hashes)
        .spore_only()
        .newest_unless_soak()
        .starts(6),
    Case::new("checkpoint::integrity_of_sqlite", integrity::sqlite)
        .spore_only()
        .newest_unless_soak()
        .starts(6),
];

/// How long a program may take to show what it does.
pub(super) const SHOWN: Duration = Duration::from_secs(60);

/// Counts in memory and, by the same step, on its disk; tells both when it is asked.
pub(super) const COUNTER: &str = "echo 0 > /n; n=0; while :; do n=$((n+1)); echo $n > /next; mv /next /n; \
    if [ -e /ask ]; then rm /ask; echo $n $(cat /n) > /told; fi; usleep 1000; done";

/// Containers, checkpoint images: removed with the value.
pub(super) struct Scene {
    pub(super) subject: Subject,
    containers: Vec<String>,
    images: Vec<String>,
    waiting: Vec<Running>,
}

impl Scene {
    pub(super) fn new(subject: &Subject) -> Self {
        Self { subject: subject.clone(), containers: Vec::new(), images: Vec::new(), waiting: Vec::new() }
    }

    pub(super) fn name(&mut self, what: &str) -> String {
        let id = self.subject.id(what);
        self.containers.push(id.clone());
        id
    }

    pub(super) fn start(&mut self, what: &str, script: &str) -> Result<String> {
        let id = self.name(what);
        let runtime = self.subject.runtime.id();
        self.subject.must(&["run", "--detach", "--runtime", runtime, BUSYBOX, &id, "sh", "-c", script])?;
        Ok(id)
    }

    /// A task that has ended.
    fn stopped(&mut self) -> Result<String> {
        let id = self.start("stopped", "true")?;
        let deadline = Instant::now() + SHOWN;
        let ended = |line: &str| line.contains(&id) && line.contains("STOPPED");
        while !self.subject.must(&["tasks", "ls"])?.lines().any(ended) {
            ensure!(Instant::now() < deadline, "the task does not end");
        }
        Ok(id)
    }

    /// `ctr containers checkpoint` of the task and its writable layer.
    fn checkpoint(&mut self, id: &str) -> Result<String> {
        let image = format!("localhost/checkpoint/{id}:1");
        self.images.push(image.clone());
        self.subject.must(&["containers", "checkpoint", "--image", "--rw", "--task", id, &image])?;
        Ok(image)
    }

    /// The name that was made up last.
    pub(super) fn last(&self) -> String {
        self.containers.last().cloned().unwrap_or_default()
    }

    /// What somebody else has made under a name.
    pub(super) fn adopt(&mut self, id: &str) {
        self.containers.push(id.to_owned());
    }

    fn restore(&mut self, what: &str, image: &str) -> Result<String> {
        let id = self.name(what);
        // It waits for the task's end, as `ctr run` does.
        let call = self.subject.ctr(&["containers", "restore", "--rw", "--live", &id, image])?;
        self.waiting.push(call.spawn().context("ctr containers restore")?);
        Ok(id)
    }

    pub(super) fn shell(&self, id: &str, script: &str) -> Result<Output> {
        let exec = self.subject.id("exec");
        self.subject.ctr(&["tasks", "exec", "--exec-id", &exec, id, "sh", "-c", script])?.run()
    }

    /// What a script says once it succeeds.
    pub(super) fn says(&self, id: &str, script: &str) -> Result<String> {
        let deadline = Instant::now() + SHOWN;
        loop {
            let output = self.shell(id, script)?;
            if output.success() {
                return Ok(output.text());
            }
            ensure!(Instant::now() < deadline, "{id}: {script}: {output}");
        }
    }

    pub(super) fn counted(&self, id: &str) -> Result<(u64, u64)> {
        self.says(id, "rm -f /told; touch /ask")?;
        let told = self.says(id, "cat /told")?;
        let numbers: Vec<u64> = told.split_whitespace().map(str::parse).collect::<Result<_, _>>()?;
        let [memory, disk] = numbers[..] else { anyhow::bail!("{id}: {told:?}") };
        Ok((memory, disk))
    }
}

impl Drop for Scene {
    fn drop(&mut self) {
        for id in &self.containers {
            let remove = |args: &[&str]| drop(self.subject.ctr(args).and_then(|call| call.run()));
            remove(&["tasks", "kill", "--signal", "KILL", id]);
            remove(&["tasks", "delete", "--force", id]);
            remove(&["containers", "delete", id]);
        }
        for image in &self.images {
            drop(self.subject.ctr(&["images", "rm", image]).and_then(|call| call.run()));
        }
    }
}

/// Two tasks of one checkpoint, and the source, each go on by themselves; memory and disk are of one instant.
fn a_counter_goes_on(subject: &Subject) -> Result<()> {
    let mut scene = Scene::new(subject);
    let source = scene.start("source", COUNTER)?;
    let before = scene.counted(&source)?;
    let image = scene.checkpoint(&source)?;
    let after = scene.counted(&source)?;
    ensure!(after.0 > before.0, "the source has not gone on: {before:?}, {after:?}");
    let boot_id = "cat /proc/sys/kernel/random/boot_id";
    let mut ids = HashSet::from([scene.says(&source, boot_id)?]);
    for copy in ["copy", "again"] {
        let id = scene.restore(copy, &image)?;
        let (memory, disk) = scene.counted(&id)?;
        expect_equal("the counters in memory and on disk", &memory, &disk)?;
        ensure!(memory > before.0, "{copy} began anew: {before:?}, {memory}");
        ids.insert(scene.says(&id, boot_id)?);
        expect_contains("tasks", &subject.must(&["tasks", "ls"])?, &id)?;
    }
    expect_equal("different boot ids", &ids.len(), &3)
}

fn with_exit(subject: &Subject) -> Result<()> {
    let mut scene = Scene::new(subject);
    let source = scene.start("exits", COUNTER)?;
    let output = subject.must(&["tasks", "checkpoint", "--exit", &source])?;
    // It prints the checkpoint's name.
    scene.images.extend(output.split_whitespace().last().map(str::to_owned));
    let tasks = subject.must(&["tasks", "ls"])?;
    let line = tasks.lines().find(|line| line.contains(&source)).unwrap_or_default();
    expect_contains("the source's task", line, "STOPPED")
}

fn refusals(subject: &Subject) -> Result<()> {
    let mut scene = Scene::new(subject);
    let stopped = scene.stopped()?;
    let refused = |id: &str, part: &str| -> Result<()> {
        let output = subject.ctr(&["tasks", "checkpoint", id])?.run()?;
        ensure!(!output.success(), "{output}");
        expect_contains("standard error", &output.errors(), part)
    };
    refused(&stopped, "stopped")
}

/// Writes numbered lines into a file of the host's, and on demand reads another that it has open.
const WRITER: &str = "exec 3> /data/log 4< /data/gone; n=0; while :; do n=$((n+1)); echo $n >&3; \
    if [ -e /data/ask ]; then rm /data/ask; { cat <&4; cat /file; } > /data/told.new 2>&1; mv /data/told.new /data/told; fi; \
    usleep 10000; done";

/// Open files of the host's are the same afterwards, at the same place; what is gone is gone.
fn with_volumes(subject: &Subject) -> Result<()> {
    let mut scene = Scene::new(subject);
    let host = subject.bed.rootfs().with_file_name(subject.id("checkpointed-volume"));
    fs::create_dir(&host)?;
    let _removed = Removed(host.clone());
    fs::write(host.join("gone"), "not read before\n")?;
    fs::write(host.join("one"), "one file\n")?;
    let id = scene.name("volumes");
    let directory = format!("type=bind,src={},dst=/data,options=rbind:rw", host.display());
    let file = format!("type=bind,src={},dst=/file,options=rbind:ro", host.join("one").display());
    let mut args = vec!["run", "--detach", "--runtime", subject.runtime.id(), "--mount", &directory];
    args.extend(["--mount", &file, BUSYBOX, &id, "sh", "-c", WRITER]);
    subject.must(&args)?;
    let lines = |least: usize| -> Result<Vec<String>> {
        wait::until("the container has written", SHOWN, || {
            let text = fs::read_to_string(host.join("log")).ok()?;
            let lines: Vec<_> = text.lines().map(str::to_owned).collect();
            (lines.len() >= least).then_some(lines)
        })
    };
    lines(20)?;
    let image = scene.checkpoint(&id)?;
    subject.must(&["tasks", "kill", "--signal", "KILL", &id])?;
    subject.must(&["tasks", "delete", "--force", &id])?;
    let before = lines(20)?.len();
    // The new file likely has the old one's inode.
    fs::remove_file(host.join("gone"))?;
    fs::write(host.join("other"), "another file\n")?;

    scene.restore("volumes-again", &image)?;
    let after = lines(before + 20)?;
    // Line by line as if nothing had been, though the source had gone on a little.
    for (number, line) in (1..).zip(&after[..before + 19]) {
        expect_equal("a line", line, &number.to_string())?;
    }
    fs::write(host.join("ask"), "")?;
    let told = wait::until("the container has told", SHOWN, || fs::read_to_string(host.join("told")).ok())?;
    expect_contains("what it reads", &told, "Stale file handle")?;
    expect_contains("what it reads", &told, "one file\n")?;
    ensure!(!told.contains("another"), "{told}");
    Ok(())
}

/// What exists once a snapshot has been taken: the store's directory and the digest of the image's disk stay.
pub(super) fn inventory_after_a_snapshot(subject: &Subject) -> Result<(Inventory, Vec<String>)> {
    let mut scene = Scene::new(subject);
    let id = scene.start("first", COUNTER)?;
    let created = subject.spore(&["snapshot", "create", &id])?.run()?;
    let removed = subject.spore(&["snapshot", "rm", created.text().trim_end()])?.run()?;
    ensure!(removed.success(), "{created}; {removed}");
    drop(scene);
    subject.inventory()
}

/// A directory, removed with the value.
struct Removed(PathBuf);

impl Drop for Removed {
    fn drop(&mut self) {
        fs::remove_dir_all(&self.0).ok();
    }
}

/// Snapshots of the `spore` command: taken of a container that goes on, listed, shown, carried away, removed, brought back.
fn snapshot_command(subject: &Subject) -> Result<()> {
    let spore = |args: &[&str]| -> Result<Output> { subject.spore(args)?.run() };
    let refused = |args: &[&str], status: i32, part: &str| -> Result<()> {
        let output = spore(args)?;
        expect_equal("status", &output.code(), &status)?;
        expect_contains("standard error", &output.errors(), "spore: error: ")?;
        expect_contains("standard error", &output.errors(), part)
    };
    let before = inventory_after_a_snapshot(subject)?;
    refused(&["snapshot", "import", "/dev/null"], 1, "the archive ends early")?;
    let mut scene = Scene::new(subject);
    let source = scene.start("source", COUNTER)?;
    let must = |args: &[&str]| -> Result<String> {
        let output = spore(args)?;
        ensure!(output.success(), "spore {args:?}: {output}");
        Ok(output.text())
    };
    let counted = scene.counted(&source)?;
    let told = must(&["snapshot", "create", &source, "--wait", "resumed", "--json"])?;
    let told: Value = serde_json::from_str(&told).with_context(|| told.clone())?;
    let after = scene.counted(&source)?;
    ensure!(after.0 > counted.0, "it has not gone on: {counted:?}, {after:?}");
    for time in ["stood_ns", "pause_ns", "save_ns", "fork_ns"] {
        ensure!(told[time].as_u64().is_some_and(|ns| ns > 0), "{time} in {told}");
    }
    let durable = must(&["snapshot", "create", &source])?;
    let (first, durable) = (told["id"].as_str().unwrap_or_default(), durable.trim_end());
    let listed =
        || -> Result<Vec<Value>> { Ok(serde_json::from_str(&must(&["snapshot", "ls", "--json"])?)?) };
    let has = |rows: &[Value], id: &str| {
        rows.iter().any(|row| row["id"] == id && row["container"] == source.as_str())
    };
    ensure!(has(&listed()?, durable), "{durable} is not in the store");
    let deadline = Instant::now() + SHOWN;
    while !has(&listed()?, first) {
        ensure!(Instant::now() < deadline, "{first} does not come into the store");
    }
    let table = must(&["snapshot", "ls"])?;
    let line = table.lines().find(|line| line.contains(durable)).with_context(|| table.clone())?;
    expect_contains("its line", line, &source)?;
    expect_contains("its line", line, "snapshot")?;
    let manifest: Value = serde_json::from_str(&must(&["snapshot", "inspect", &durable[..12]])?)?;
    expect_equal("the manifest's id", &manifest["id"], &durable.into())?;
    expect_equal("its purpose", &manifest["purpose"], &"snapshot".into())?;

    let archive = tempfile::NamedTempFile::new()?;
    let path = archive.path().to_string_lossy().into_owned();
    let exported = spore(&["snapshot", "export", durable, &path])?;
    ensure!(exported.success(), "{exported}");
    expect_contains("standard error", &exported.errors(), "memory travels")?;
    let streamed = spore(&["snapshot", "export", durable, "-"])?;
    ensure!(
        streamed.success() && streamed.stdout == std::fs::read(&path)?,
        "another archive on standard output"
    );
    must(&["snapshot", "rm", durable])?;
    ensure!(!has(&listed()?, durable), "{durable} is still there");
    expect_equal("the imported id", &must(&["snapshot", "import", &path])?.trim_end(), &durable)?;
    let known = subject.spore(&["snapshot", "import", "-"])?.stdin(streamed.stdout).run()?;
    expect_equal("the id of what is there already", &known.text().trim_end(), &durable)?;
    expect_equal(
        "what came back",
        &must(&["snapshot", "inspect", durable, "--json"])?,
        &format!("{manifest}\n"),
    )?;

    refused(&["snapshot", "create", &scene.stopped()?], 1, "stopped container")?;
    refused(&["snapshot", "create", "nobodys"], 1, "no shim of it answers")?;
    refused(&["snapshot", "rm", first, "ffffffffffff"], 1, "there is none")?;
    refused(&["snapshot", "inspect", "0"], 1, "there is none")?;
    refused(&["snapshot", "create", "../x"], 2, "is not the id of a container")?;
    ensure!(has(&listed()?, first), "{first} was removed with an id that means none");
    must(&["snapshot", "rm", first, durable])?;
    drop((scene, archive));
    subject.nothing_beyond(&before)
}
