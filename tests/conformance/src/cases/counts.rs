//! Many of everything: what a runtime keeps of each is a leak, what each costs more than the one
//! before a slow death. Bounded counts by default; `SPORE_CONFORMANCE_SOAK` asks for the long ones.
//!
//! What is compared before and after fails the case. Times are told, not judged: the first and the last
//! fifth of them go to `counts.md` among the results.

pub(crate) mod network;

use std::fmt::Write;
use std::fs::File;
use std::io::Write as _;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use spore_harness::bed::Subject;
use spore_harness::containerd::Runtime;
use spore_harness::image::BUSYBOX;
use spore_harness::network::traffic;
use spore_harness::processes::{self, Use};
use spore_harness::wait;

use super::Case;
use super::volumes::Directory;
use crate::guest::Guest;

pub(crate) const CASES: &[Case] = &[
    Case::new("counts: create, exec and delete, again and again", cycles).alone().starts(12),
    Case::new("counts: containers alive at once", alive).alone().starts(4),
    Case::new("counts: execs in one container", execs).alone().starts(2),
    Case::new("counts: a long stream each way", streams).alone().starts(2),
    Case::new("counts: clients that attach and go away, side by side", attach).alone().starts(2),
];

/// Threads that a Go program may have made for itself meanwhile; a leak makes one each time.
const SLACK: usize = 3;
const LONG: Duration = Duration::from_secs(3600);
/// Of a long count between two of its [`Control`].
const BETWEEN: usize = 10;

/// Of Spore only: it is not runc that is under test.
fn is_long(subject: &Subject) -> bool {
    subject.is_spore() && std::env::var_os("SPORE_CONFORMANCE_SOAK").is_some()
}

/// The bounded count, or the long one.
fn count(subject: &Subject, bounded: usize, long: usize) -> usize {
    if is_long(subject) { long } else { bounded }
}

/// What the machine itself makes of hours: runc, as bounded as always, now and then among the long count.
struct Control {
    subject: Option<Subject>,
    seconds: Mutex<Vec<f64>>,
}

impl Control {
    fn of(subject: &Subject) -> Self {
        let runc = || Subject::new(Arc::clone(&subject.bed), &subject.series, Runtime::Runc);
        Self { subject: is_long(subject).then(runc), seconds: Mutex::default() }
    }

    /// Before the `number`th of the long count.
    fn now_and_then(&self, number: usize, act: impl FnOnce(&Subject) -> Result<()>) -> Result<()> {
        let Some(runc) = self.subject.as_ref().filter(|_| number.is_multiple_of(BETWEEN)) else {
            return Ok(());
        };
        let spent = timed(|| act(runc))?;
        self.seconds.lock().unwrap_or_else(PoisonError::into_inner).push(spent);
        Ok(())
    }

    fn tell(self, what: &str) -> Result<()> {
        let seconds = self.seconds.into_inner().unwrap_or_else(PoisonError::into_inner);
        self.subject.map_or(Ok(()), |runc| tell(&runc, &format!("{what}, among Spore's"), &seconds, ""))
    }
}

/// Writes a line of figures: the medians of the first and of the last fifth of `seconds`.
fn tell(subject: &Subject, what: &str, seconds: &[f64], more: &str) -> Result<()> {
    let fifth = seconds.len().div_ceil(5);
    let median = |part: &[f64]| {
        let mut part = part.to_vec();
        part.sort_by(f64::total_cmp);
        part.get(part.len() / 2).copied().unwrap_or_default()
    };
    let mut line = format!("{}/{}: {} {what}", subject.series, subject.runtime.name(), seconds.len());
    let (first, last) = (median(&seconds[..fifth]), median(&seconds[seconds.len() - fifth..]));
    write!(line, ": {first:.2} s each at first, {last:.2} s at last{more}")?;
    eprintln!("  {line}");
    let results = std::env::var_os("SPORE_RESULTS").map_or_else(|| PathBuf::from("."), PathBuf::from);
    let mut file = File::options().append(true).create(true).open(results.join("counts.md"))?;
    Ok(writeln!(file, "* {line}")?)
}

/// What shim and VMM (runc: the shim) of a container use.
fn used(subject: &Subject, id: &str) -> Result<Vec<(&'static str, Use)>> {
    if !subject.is_spore() {
        let shim = processes::process(&["containerd-shim-runc-v2", id])?;
        return Ok(vec![("shim", Use::of(shim)?)]);
    }
    let (vmm, shim) = processes::child_and_parent("spore-vmm", &["containerd-shim-spore-v2", id])?;
    Ok(vec![("shim", Use::of(shim)?), ("VMM", Use::of(vmm)?)])
}

/// Waits until shim and VMM have no more descriptors and threads than before; what memory they took.
fn as_before(subject: &Subject, id: &str, before: &[(&'static str, Use)]) -> Result<String> {
    let same = || {
        let now = used(subject, id).ok()?;
        let pairs = before.iter().zip(&now);
        let settled = |(before, now): (&(_, Use), &(_, Use))| {
            let (before, now) = (before.1, now.1);
            now.descriptors <= before.descriptors && now.threads <= before.threads + SLACK
        };
        pairs.clone().all(settled).then_some(now.clone())
    };
    let after = wait::until("descriptors and threads are as before", Duration::from_secs(60), same)
        .with_context(|| format!("before {before:?}, now {:?}", used(subject, id)))?;
    let mut text = String::new();
    for ((name, before), (_, after)) in before.iter().zip(&after) {
        write!(text, "; {name} {} -> {} KiB", before.resident_kib, after.resident_kib)?;
    }
    Ok(text)
}

/// The seconds that something takes.
fn timed(act: impl FnOnce() -> Result<()>) -> Result<f64> {
    let begin = Instant::now();
    act().map(|()| begin.elapsed().as_secs_f64())
}

/// Does something so many times, by several at once, each with its number, counted down; the seconds that each tells.
fn repeated(times: usize, clients: usize, act: impl Fn(usize) -> Result<f64> + Sync) -> Result<Vec<f64>> {
    let (left, seconds) = (AtomicUsize::new(times), Mutex::new(Vec::new()));
    let take = |left: usize| left.checked_sub(1);
    let worker = || -> Result<()> {
        while let Ok(number) = left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, take) {
            let spent = act(number).inspect_err(|_| left.store(0, Ordering::Relaxed))?;
            let mut seconds = seconds.lock().unwrap_or_else(PoisonError::into_inner);
            seconds.push(spent);
            if seconds.len().is_multiple_of(25) {
                eprintln!("  {} of {times}", seconds.len());
            }
        }
        Ok(())
    };
    thread::scope(|scope| {
        let workers: Vec<_> = (0..clients).map(|_| scope.spawn(worker)).collect();
        workers.into_iter().try_for_each(|worker| worker.join().map_err(|_| anyhow!("a worker panicked"))?)
    })?;
    Ok(seconds.into_inner().unwrap_or_else(PoisonError::into_inner))
}

/// How much of the machine's CPU is used while nobody asks its containers for anything.
fn at_rest(subject: &Subject) -> Result<String> {
    let (begin, busy) = (Instant::now(), processes::busy_seconds()?);
    // What is measured is the time itself.
    thread::sleep(Duration::from_secs(count(subject, 2, 30) as u64));
    let share = (processes::busy_seconds()? - busy) / begin.elapsed().as_secs_f64();
    Ok(format!("; at rest {:.0} % of a CPU", share * 100.0))
}

fn cycles(subject: &Subject) -> Result<()> {
    subject.warm_up()?;
    let before = subject.inventory()?;
    let control = Control::of(subject);
    let cycle = |subject: &Subject| {
        let guest = Guest::start(subject, &[])?;
        guest.shell("true")?;
        guest.end()
    };
    let seconds = repeated(count(subject, 4, 500), 2, |number| {
        control.now_and_then(number, cycle)?;
        timed(|| cycle(subject))
    })?;
    subject.nothing_beyond(&before)?;
    let what = "containers created, used and deleted, two at a time";
    tell(subject, what, &seconds, "")?;
    control.tell(what)
}

fn alive(subject: &Subject) -> Result<()> {
    subject.warm_up()?;
    let before = subject.inventory()?;
    let (mut guests, mut seconds) = (Vec::new(), Vec::new());
    for _ in 0..count(subject, 4, 50) {
        let begin = Instant::now();
        guests.push(Guest::start(subject, &["--memory-limit", "67108864"])?);
        seconds.push(begin.elapsed().as_secs_f64());
    }
    for guest in &guests {
        let echoed = guest.shell(&format!("echo {}", guest.id))?;
        ensure!(echoed.trim_end() == guest.id, "{echoed:?}");
    }
    let rest = at_rest(subject)?;
    drop(guests);
    subject.nothing_beyond(&before)?;
    tell(subject, "containers alive at once", &seconds, &rest)
}

fn execs(subject: &Subject) -> Result<()> {
    let guest = Guest::start(subject, &[])?;
    guest.shell("true")?;
    let before = used(subject, &guest.id)?;
    let mut seconds = Vec::new();
    for number in 0..count(subject, 15, 1000) {
        let begin = Instant::now();
        let text = guest.shell(&format!("echo {number}"))?;
        ensure!(text == format!("{number}\n"), "{text:?}");
        seconds.push(begin.elapsed().as_secs_f64());
    }
    let memory = as_before(subject, &guest.id, &before)?;
    tell(subject, "execs in one container", &seconds, &memory)
}

/// A pipeline of the ground's shell around `ctr run`. Each byte is what its place in the stream asks for: the
/// program at both ends is this one, which the container has as a volume.
fn streams(subject: &Subject) -> Result<()> {
    let mib = count(subject, 64, 1024);
    let bytes = (mib as u64) << 20;
    let directory = Directory::new(subject)?;
    traffic::install(directory.path())?;
    let mount = directory.mount("rbind:ro");
    let inside = format!("/data/{}", traffic::VERB);
    let outside = directory.path().join(traffic::VERB).display().to_string();
    let (give, take) = (["traffic", "give", &bytes.to_string()].join(" "), "traffic take");
    let mut seconds = Vec::new();
    for (before, script, after) in [
        (String::new(), format!("{inside} {give}"), format!(" | {outside} {take}")),
        (format!("{outside} {give} | "), format!("{inside} {take}"), String::new()),
    ] {
        let begin = Instant::now();
        let run = subject.run_with("stream", &["--mount", &mount], BUSYBOX, &["sh", "-c", &script])?;
        let output = run.in_pipeline(&before, &after).deadline(LONG).run()?;
        ensure!(output.success() && output.text().trim() == bytes.to_string(), "{output}");
        seconds.push(begin.elapsed().as_secs_f64());
    }
    tell(subject, &format!("streams of {mib} MiB, out and in"), &seconds, "")
}

fn attach(subject: &Subject) -> Result<()> {
    let options = ["--detach", "--runtime", subject.runtime.id()];
    let id = subject.id("attached");
    let mut args = vec!["run"];
    args.extend(options);
    args.extend([BUSYBOX, &id, "sh", "-c", "while :; do echo tick; sleep 1; done"]);
    subject.must(&args)?;
    let guest = Guest::adopt(subject, &id);
    let before = used(subject, &guest.id)?;
    let begin = Instant::now();
    let mut clients = Vec::new();
    for _ in 0..count(subject, 4, 24) {
        clients.push(guest.task("attach", &[], &[])?.spawn()?);
    }
    // One fifo, many readers: who gets a line is chance, but lines come.
    wait::until("a line reaches a client", Duration::from_secs(120), || {
        clients.iter().any(|client| client.stdout().contains("tick")).then_some(())
    })?;
    for client in clients {
        client.kill()?;
    }
    let mut again = guest.task("attach", &[], &[])?.spawn()?;
    again.says("tick")?;
    again.kill()?;
    let memory = as_before(subject, &guest.id, &before)?;
    tell(subject, "rounds of clients side by side", &[begin.elapsed().as_secs_f64()], &memory)
}
