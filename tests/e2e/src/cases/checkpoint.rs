//! A snapshot of a container's machine is a checkpoint of containerd's, and a task again.

mod disks;

use std::collections::HashSet;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use spore_harness::bed::Subject;
use spore_harness::call::{Output, Running};
use spore_harness::image::BUSYBOX;

use super::{Case, expect_contains, expect_equal};

pub(crate) const CASES: &[Case] = &[
    Case::new("checkpoint::a_counter_goes_on_where_it_was", a_counter_goes_on).spore_only().starts(3),
    // The ctr of 1.7 tells only runc.
    Case::new("checkpoint::with_exit_the_task_ends", with_exit).spore_only().starts(2).since("2."),
    Case::new("checkpoint::of_what_cannot_be_is_refused", refusals).spore_only().starts(3),
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
];

/// How long a program may take to show what it does.
const SHOWN: Duration = Duration::from_secs(60);

/// Counts in memory and, by the same step, on its disk; tells both when it is asked.
const COUNTER: &str = "echo 0 > /n; n=0; while :; do n=$((n+1)); echo $n > /next; mv /next /n; \
    if [ -e /ask ]; then rm /ask; echo $n $(cat /n) > /told; fi; usleep 1000; done";

/// Containers, checkpoint images: removed with the value.
struct Scene {
    subject: Subject,
    containers: Vec<String>,
    images: Vec<String>,
    waiting: Vec<Running>,
}

impl Scene {
    fn new(subject: &Subject) -> Self {
        Self { subject: subject.clone(), containers: Vec::new(), images: Vec::new(), waiting: Vec::new() }
    }

    fn name(&mut self, what: &str) -> String {
        let id = self.subject.id(what);
        self.containers.push(id.clone());
        id
    }

    fn start(&mut self, what: &str, script: &str) -> Result<String> {
        let id = self.name(what);
        let runtime = self.subject.runtime.id();
        self.subject.must(&["run", "--detach", "--runtime", runtime, BUSYBOX, &id, "sh", "-c", script])?;
        Ok(id)
    }

    /// `ctr containers checkpoint` of the task and its writable layer.
    fn checkpoint(&mut self, id: &str) -> Result<String> {
        let image = format!("localhost/checkpoint/{id}:1");
        self.images.push(image.clone());
        self.subject.must(&["containers", "checkpoint", "--image", "--rw", "--task", id, &image])?;
        Ok(image)
    }

    fn restore(&mut self, what: &str, image: &str) -> Result<String> {
        let id = self.name(what);
        // It waits for the task's end, as `ctr run` does.
        let call = self.subject.ctr(&["containers", "restore", "--rw", "--live", &id, image])?;
        self.waiting.push(call.spawn().context("ctr containers restore")?);
        Ok(id)
    }

    fn shell(&self, id: &str, script: &str) -> Result<Output> {
        let exec = self.subject.id("exec");
        self.subject.ctr(&["tasks", "exec", "--exec-id", &exec, id, "sh", "-c", script])?.run()
    }

    /// What a script says once it succeeds.
    fn says(&self, id: &str, script: &str) -> Result<String> {
        let deadline = Instant::now() + SHOWN;
        loop {
            let output = self.shell(id, script)?;
            if output.success() {
                return Ok(output.text());
            }
            ensure!(Instant::now() < deadline, "{id}: {script}: {output}");
        }
    }

    fn counted(&self, id: &str) -> Result<(u64, u64)> {
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
    let stopped = scene.start("stopped", "true")?;
    let deadline = Instant::now() + SHOWN;
    while !subject
        .must(&["tasks", "ls"])?
        .lines()
        .any(|line| line.contains(&stopped) && line.contains("STOPPED"))
    {
        ensure!(Instant::now() < deadline, "the task does not end");
    }
    let refused = |id: &str, part: &str| -> Result<()> {
        let output = subject.ctr(&["tasks", "checkpoint", id])?.run()?;
        ensure!(!output.success(), "{output}");
        expect_contains("standard error", &output.errors(), part)
    };
    refused(&stopped, "stopped")?;
    let id = scene.name("volume");
    let mount = "type=bind,src=/usr,dst=/mnt,options=rbind:ro";
    let runtime = subject.runtime.id();
    subject.must(&[
        "run",
        "--detach",
        "--runtime",
        runtime,
        "--mount",
        mount,
        BUSYBOX,
        &id,
        "sleep",
        "1000",
    ])?;
    refused(&id, "bind mounts")?;
    // As if nothing had been asked.
    expect_equal("what it says", &scene.says(&id, "echo here")?.as_str(), &"here\n")
}
