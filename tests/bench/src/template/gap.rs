//! For how long a container stands still while a snapshot of it is taken, as one of its processes sees it ([`super::tick`]), beside
//! what the command tells, and beside what the process sees when no snapshot is taken.

use std::io::{BufRead, BufReader, Write};

use anyhow::{Context, Result, bail};
use spore_harness::call::Piped;
use spore_harness::containerd::Runtime;

use super::TICK;
use crate::lab::{Lab, told_ms};
use crate::report::Row;
use crate::stats::Sample;

/// That are counted, after one that is not.
const SNAPSHOTS: usize = 20;
const CONTAINER: &str = "ticking";
/// Of the first window in which nothing happens; later ones have as many as the last snapshot took.
const TICKS: u32 = 1000;

/// What the process tells of some of its ticks.
struct Answer {
    longest_ms: f64,
    elapsed_ms: f64,
    ticks: u32,
}

/// The process, at whose other end `ctr tasks exec` is.
struct Ticker(Piped);

impl Ticker {
    /// Puts this program into the container: a volume would have its own part in every snapshot.
    fn start(lab: &Lab) -> Result<Self> {
        let program = std::env::current_exe()?;
        let inside = format!("/{TICK}");
        lab.spore(&["cp", &program.to_string_lossy(), &format!("{CONTAINER}:{inside}")])?;
        Ok(Self(lab.exec_piped(CONTAINER, "ticker", &[&inside, TICK])?))
    }

    /// The answer when so many ticks have gone by since the last one; it counts anew from then.
    fn ask(&mut self, ticks: u32) -> Result<Answer> {
        writeln!(self.0.stdin, "{ticks}")?;
        let mut line = String::new();
        // It says one line for each question: nothing stays in the buffer.
        BufReader::new(&mut self.0.stdout).read_line(&mut line)?;
        let figures: Option<Vec<u32>> = line.split_whitespace().map(|word| word.parse().ok()).collect();
        match figures.as_deref() {
            Some(&[longest, elapsed, ticks]) => Ok(Answer {
                longest_ms: f64::from(longest) / 1e3,
                elapsed_ms: f64::from(elapsed) / 1e3,
                ticks,
            }),
            _ => bail!("the ticking process answered {line:?}"),
        }
    }

    /// The answer for the time in which something is done.
    fn during<T>(&mut self, act: impl FnOnce() -> Result<T>) -> Result<(T, Answer)> {
        self.ask(0)?;
        let done = act()?;
        Ok((done, self.ask(0)?))
    }
}

/// The longest times between two ticks, of all windows of a kind.
#[derive(Default)]
struct Longest {
    quiet: Vec<f64>,
    beside_a_client: Vec<f64>,
    snapshot: Vec<f64>,
}

pub(super) fn run(lab: &Lab) -> Result<Vec<Row>> {
    lab.detach(Runtime::Spore, CONTAINER, &[])?;
    let mut ticker = Ticker::start(lab)?;
    let (mut longest, mut tick) = (Longest::default(), Vec::new());
    let (mut stood, mut paused) = (Vec::new(), Vec::new());
    let mut ticks = TICKS;
    for round in 0..=SNAPSHOTS {
        ticker.ask(0)?;
        let quiet = ticker.ask(ticks)?;
        let (_, beside_a_client) = ticker.during(|| lab.spore(&["ps"]))?;
        let ((told, _), snapshot) = ticker.during(|| lab.spore_json(&["snapshot", "create", CONTAINER]))?;
        let id = told["id"].as_str().with_context(|| format!("no id in {told}"))?;
        lab.spore(&["snapshot", "rm", id])?;
        let [of_processes, of_machine] = [told_ms(&told, "stood_ns")?, told_ms(&told, "pause_ns")?];
        eprintln!(
            "gap: round {round} of {SNAPSHOTS}: quiet {:.1} ms, beside a client {:.1} ms, snapshot {:.1} ms, of which it tells {of_processes:.1} ms, its machine {of_machine:.1} ms, in {} ticks{}",
            quiet.longest_ms,
            beside_a_client.longest_ms,
            snapshot.longest_ms,
            snapshot.ticks,
            if round == 0 { " (warm-up, not counted)" } else { "" },
        );
        ticks = snapshot.ticks;
        if round > 0 {
            tick.push(quiet.elapsed_ms / f64::from(quiet.ticks));
            longest.quiet.push(quiet.longest_ms);
            longest.beside_a_client.push(beside_a_client.longest_ms);
            longest.snapshot.push(snapshot.longest_ms);
            stood.push(of_processes);
            paused.push(of_machine);
        }
    }
    drop(ticker);
    lab.remove(CONTAINER)?;
    let (quiet, stood) = (Sample::new(longest.quiet), Sample::new(stood));
    let beside_a_client = Sample::new(longest.beside_a_client);
    let snapshot = Sample::new(longest.snapshot);
    Ok(vec![
        Row::new("a tick of the container's process, mean of a quiet time", "ms", &Sample::new(tick)),
        Row::new("longest gap in a quiet time", "ms", &quiet),
        Row::new("longest gap while spore ps asks", "ms", &beside_a_client),
        Row::new("longest gap while a snapshot is taken", "ms", &snapshot).against(&stood, None),
        Row::new("the container stood still, as snapshot create tells it", "ms", &stood),
        Row::new("its machine stood still, within that", "ms", &Sample::new(paused)),
    ])
}
