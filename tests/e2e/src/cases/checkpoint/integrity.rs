//! Whether what a container has is whole, and of one instant, after any number of snapshots, clones and rollbacks that find it in
//! the midst of its work: hashes of memory and files, an SQLite, a PostgreSQL.
//!
//! The container's program (`integrity/*.py`) compares its memory with its disk in each step. Asked, it checks everything,
//! tells what memory and disk have, and keeps the word that it was asked with in both: by that word the case knows
//! which instant it looks at.

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;
use serde_json::Value;
use spore_harness::bed::Subject;
use spore_harness::image::{APPLICATIONS, POSTGRES_USER};

use super::Scene;
use crate::cases::{expect_equal, soak};

/// In `make test`, and in `make soak`.
const TURNS: usize = 2;
const MANY: usize = 100;
/// Snapshots at most, before the oldest go.
const KEPT: usize = 6;
/// Those that stay then.
const LEFT: usize = 2;
/// Which turns end with a rollback.
const ROLLBACK_EVERY: usize = 2;
const HOME: &str = "/var/lib/postgresql/witness";

/// What a container does meanwhile.
struct Load {
    name: &'static str,
    program: &'static str,
    user: u32,
}

pub(super) fn hashes(subject: &Subject) -> Result<()> {
    turns(subject, &Load { name: "hashes", program: include_str!("integrity/hashes.py"), user: 0 })
}

pub(super) fn sqlite(subject: &Subject) -> Result<()> {
    turns(subject, &Load { name: "sqlite", program: include_str!("integrity/sqlite.py"), user: 0 })
}

pub(super) fn postgresql(subject: &Subject) -> Result<()> {
    let program = include_str!("integrity/postgres.py");
    turns(subject, &Load { name: "postgresql", program, user: POSTGRES_USER })
}

/// Steps that have been made, and the word that was asked with last.
type State = (u64, String);

/// What the program tells.
#[derive(Debug, Deserialize)]
struct Told {
    wrong: Option<String>,
    memory: Option<State>,
    disk: Option<State>,
    facts: Option<Value>,
}

/// A snapshot, and when it was taken.
#[derive(Clone)]
struct Taken {
    id: String,
    /// What it was asked with last before.
    word: String,
    /// Steps made by then.
    steps: u64,
}

struct Witness {
    scene: Scene,
    source: String,
    snapshots: Vec<Taken>,
    /// Words asked with.
    asked: usize,
}

fn turns(subject: &Subject, load: &Load) -> Result<()> {
    let count = if soak().is_some() { MANY } else { TURNS };
    let mut witness = Witness::start(subject, load)?;
    for turn in 1..=count {
        witness.turn(turn).with_context(|| format!("{}, turn {turn} of {count}", load.name))?;
    }
    witness.forget(0)
}

impl Witness {
    fn start(subject: &Subject, load: &Load) -> Result<Self> {
        subject.import_applications()?;
        let mut scene = Scene::new(subject);
        let source = scene.name(load.name);
        let program = format!("{}\n\n{}\n\nmain()\n", include_str!("integrity/witness.py"), load.program);
        let (runtime, user) = (subject.runtime.id(), format!("{0}:{0}", load.user));
        let scale = format!("SCALE={}", if soak().is_some() { 4 } else { 1 });
        let run = [
            "run",
            "--detach",
            "--runtime",
            runtime,
            "--user",
            &user,
            "--env",
            &scale,
            APPLICATIONS,
            &source,
        ];
        subject.must(&[&run[..], &["python3", "-c", &program]].concat())?;
        Ok(Self { scene, source, snapshots: Vec::new(), asked: 0 })
    }

    /// A snapshot of the container at work; a clone of it, or of the container as it is; and every so often back.
    fn turn(&mut self, turn: usize) -> Result<()> {
        let source = self.source.clone();
        let (before, word) = self.ask(&source, "source", "")?;
        let id = self.spore(&["snapshot", "create", &source])?.trim_end().to_owned();
        let (after, now) = self.ask(&source, "source, after the snapshot", "")?;
        of_instant("the source, after the snapshot", &after, &word, before.0)?;
        let taken = Taken { id, word, steps: before.0 };
        self.snapshots.push(taken.clone());

        let clone = self.scene.name("clone");
        let (how, state, word, steps) = if turn % 2 == 1 {
            self.spore(&["clone", &source, "--snapshot", &taken.id, "--name", &clone])?;
            let state = self.examine(&clone, "clone of the snapshot", ".crash")?;
            ("the clone of the snapshot", state, &taken.word, taken.steps)
        } else {
            self.spore(&["clone", &source, "--name", &clone])?;
            ("the clone of the container", self.examine(&clone, "clone of the container", "")?, &now, after.0)
        };
        of_instant(how, &state, word, steps)?;
        self.remove(&clone)?;

        if turn.is_multiple_of(ROLLBACK_EVERY) {
            // By turns the latest and the earliest.
            let at = if turn.is_multiple_of(2 * ROLLBACK_EVERY) { self.snapshots.len() - 1 } else { 0 };
            let back = self.snapshots[at].clone();
            self.spore(&["rollback", &source, &back.id])?;
            let (state, _) = self.ask(&source, "source, after the rollback", "")?;
            of_instant("the source, after the rollback", &state, &back.word, back.steps)?;
        }
        if self.snapshots.len() >= KEPT {
            self.forget(LEFT)?;
        }
        Ok(())
    }

    /// Asks a clone, which has the machine for itself meanwhile.
    fn examine(&mut self, clone: &str, who: &str, how: &str) -> Result<State> {
        let source = self.source.clone();
        self.scene.subject.must(&["tasks", "pause", &source])?;
        let (state, _) = self.ask(clone, who, how)?;
        self.scene.subject.must(&["tasks", "resume", &source])?;
        Ok(state)
    }

    /// Has a container check everything; what it has in memory and on disk, which is the same, and the new word.
    fn ask(&mut self, id: &str, who: &str, how: &str) -> Result<(State, String)> {
        self.asked += 1;
        let word = format!("word-{}{how}", self.asked);
        let asked =
            format!("mkdir -p {HOME} && echo {word} > {HOME}/ask.new && mv {HOME}/ask.new {HOME}/ask");
        let told = format!("{HOME}/told-{word}");
        let script = format!("{asked} && until [ -e {told} ]; do usleep 50000; done && cat {told}");
        let output = self.scene.shell(id, &script).with_context(|| format!("{who} does not tell"))?;
        ensure!(output.success(), "{who}: {output}");
        let text = output.text();
        let told: Told = serde_json::from_str(&text).with_context(|| text.clone())?;
        if let Some(wrong) = told.wrong {
            bail!("{who}: {wrong}");
        }
        let (Some(memory), Some(disk)) = (told.memory, told.disk) else { bail!("{who}: {text}") };
        expect_equal(&format!("{who}: count and word on disk, and in memory"), &disk, &memory)?;
        eprintln!("integrity: {who}: {} steps, {}", memory.0, told.facts.unwrap_or_default());
        Ok((memory, word))
    }

    fn spore(&self, args: &[&str]) -> Result<String> {
        let output = self.scene.subject.spore(args)?.run()?;
        ensure!(output.success(), "spore {args:?}: {output}");
        Ok(output.text())
    }

    fn remove(&self, id: &str) -> Result<()> {
        self.scene.subject.must(&["tasks", "delete", "--force", id])?;
        self.scene.subject.must(&["containers", "delete", id]).map(drop)
    }

    /// Removes the oldest snapshots but so many.
    fn forget(&mut self, left: usize) -> Result<()> {
        let oldest: Vec<_> = self.snapshots.drain(..self.snapshots.len() - left).collect();
        let ids: Vec<_> = oldest.iter().map(|taken| taken.id.as_str()).collect();
        self.spore(&[&["snapshot", "rm"], &ids[..]].concat()).map(drop)
    }
}

/// Fails when a state is not one that began where it was asked with `word`, after so many steps.
fn of_instant(who: &str, state: &State, word: &str, steps: u64) -> Result<()> {
    expect_equal(&format!("{who}: the word that it was asked with last"), &state.1.as_str(), &word)?;
    ensure!(state.0 > steps, "{who}: {} steps, and {steps} had been made before", state.0);
    Ok(())
}
