//! A container whose state can be told: in memory, on its disk, in a volume, on its network and with its clients.

use std::fs;

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use spore_harness::bed::Subject;
use spore_harness::call::Running;
use spore_harness::image::BUSYBOX;
use spore_harness::network::space::Space;

use super::{Removed, Scene};
use crate::cases::expect_equal;

/// Keeps a word in memory, on its disk and, line by line, in a file of a volume that it has open; says when it gets one, and tells
/// what it has when it is asked.
const KEEPER: &str = "exec 3>> /data/log; v=none; while :; do \
    if [ -e /set ]; then v=$(cat /set); echo $v > /v; rm /set; echo $v >&3; echo has $v; fi; \
    if [ -e /ask ]; then rm /ask; echo $v $(cat /v) > /told.new; mv /told.new /told; fi; usleep 1000; done";

/// Reads its input line by line and answers.
pub(super) const ECHO: &str = "while read line; do echo got $line; done";

pub(super) struct Keeper {
    pub(super) scene: Scene,
    pub(super) id: String,
    pub(super) call: Running,
    pub(super) log: std::path::PathBuf,
    pub(super) _network: (Space, Space),
    pub(super) _volume: Removed,
}

impl Keeper {
    /// With a volume, and a cable to somebody at 10.77.0.1.
    pub(super) fn start(subject: &Subject) -> Result<Self> {
        let mut scene = Scene::new(subject);
        let volume = subject.bed.rootfs().with_file_name(subject.id("rollback-volume"));
        fs::create_dir(&volume)?;
        let removed = Removed(volume.clone());
        let network = (Space::new(&subject.id("near"))?, Space::new(&subject.id("far"))?);
        network.0.wire(("eth0", "10.77.0.2/24"), &network.1, ("peer", "10.77.0.1/24"))?;
        let id = scene.name("keeper");
        let mount = format!("type=bind,src={},dst=/data,options=rbind:rw", volume.display());
        let namespace = format!("network:{}", network.0.path().display());
        let runtime = subject.runtime.id();
        let args = ["run", "--runtime", runtime, "--mount", &mount, "--with-ns", &namespace, BUSYBOX, &id];
        let call = subject.ctr(&[&args[..], &["sh", "-c", KEEPER]].concat())?.spawn()?;
        let keeper = Self { scene, id, call, log: volume.join("log"), _network: network, _volume: removed };
        keeper.scene.says(&keeper.id, "true")?;
        Ok(keeper)
    }

    pub(super) fn set(&mut self, word: &str) -> Result<()> {
        self.scene.says(&self.id, &format!("echo {word} > /new; mv /new /set"))?;
        self.call.says(&format!("has {word}\n"))
    }

    /// In memory and on disk.
    pub(super) fn has(&self, word: &str) -> Result<()> {
        self.scene.says(&self.id, "rm -f /told; touch /ask")?;
        let told = self.scene.says(&self.id, "cat /told")?;
        expect_equal("in memory, on disk", &told.trim_end(), &format!("{word} {word}").as_str())
    }

    pub(super) fn exec(&self, name: &str, script: &str) -> Result<Running> {
        let exec = self.scene.subject.id(name);
        let call =
            self.scene.subject.ctr(&["tasks", "exec", "--exec-id", &exec, &self.id, "sh", "-c", script])?;
        call.spawn_with_open_stdin()
    }

    pub(super) fn spore(&self, args: &[&str]) -> Result<String> {
        let output = self.scene.subject.spore(args)?.run()?;
        ensure!(output.success(), "spore {args:?}: {output}");
        Ok(output.text())
    }

    pub(super) fn snapshot(&self) -> Result<String> {
        Ok(self.spore(&["snapshot", "create", &self.id])?.trim_end().to_owned())
    }

    pub(super) fn back_to(&self, snapshot: &str) -> Result<Value> {
        let told = self.spore(&["rollback", &self.id, snapshot, "--json"])?;
        eprintln!("rollback: {}", told.trim_end());
        serde_json::from_str(&told).with_context(|| told.clone())
    }

    /// Its line of `ctr tasks ls`: pid and state.
    pub(super) fn task(&self) -> Result<String> {
        let tasks = self.scene.subject.must(&["tasks", "ls"])?;
        let line = tasks.lines().find(|line| line.starts_with(&self.id)).context("no task")?;
        Ok(line.split_whitespace().skip(1).collect::<Vec<_>>().join(" "))
    }

    pub(super) fn reaches_its_peer(&self) -> Result<()> {
        self.scene.says(&self.id, "ping -c 1 -w 5 10.77.0.1").map(drop)
    }
}
