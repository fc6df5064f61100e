//! What a command has done so far: on a terminal, once it takes more than a second, as a line that
//! moves.

use std::cell::{Cell, OnceCell};
use std::io::IsTerminal;
use std::time::{Duration, Instant};

use futures::StreamExt;
use futures::stream::FuturesUnordered;
use indicatif::{ProgressBar, ProgressStyle};
use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::failure::Failure;

/// What is done sooner is not worth a line.
const PATIENCE: Duration = Duration::from_secs(1);
const COPYING: &str = "{spinner} {bytes} ({bytes_per_sec}) {wide_msg}";
const WAITING: &str = "{spinner} {elapsed} {wide_msg}";

/// Between two looks at the clock.
const TICK: Duration = Duration::from_millis(100);

/// Waits for what a shim does, and says what that is, for as long as it takes: the shim bounds each step, and its end ends the
/// call. Interrupted, it says with `anyway` what becomes of it.
pub(crate) async fn answered<T>(
    call: impl Future<Output = T>,
    doing: &str,
    anyway: &str,
) -> Result<T, Failure> {
    let (progress, mut ticks) = (Progress::waiting(), tokio::time::interval(TICK));
    let interrupted = tokio::signal::ctrl_c();
    tokio::pin!(call, interrupted);
    let answer = loop {
        tokio::select! {
            answer = &mut call => break answer,
            _ = &mut interrupted => {
                progress.finish();
                eprintln!("spore: warning: {anyway}");
                return Err(Failure::Interrupted);
            }
            _ = ticks.tick() => progress.now(0, doing),
        }
    };
    progress.finish();
    Ok(answer)
}

/// Work of many jobs, some at a time. From its beginning on SIGINT and SIGTERM end nothing but the row of jobs, so that what
/// was made can be taken back.
pub(crate) struct Work {
    progress: Progress,
    interrupt: Signal,
    terminate: Signal,
}

impl Work {
    pub(crate) fn begin() -> Result<Self, Failure> {
        let listen =
            |kind| signal(kind).map_err(|error| Failure::Refused(format!("listen for signals: {error}")));
        let (interrupt, terminate) = (listen(SignalKind::interrupt())?, listen(SignalKind::terminate())?);
        Ok(Self { progress: Progress::waiting(), interrupt, terminate })
    }

    /// Begins jobs, so many at a time, until one of them is not to be gone on after, or somebody interrupts; those under way then
    /// are waited for. Gives what came of them in the order of their ends, and whether they were interrupted; `line` tells
    /// how far they are.
    pub(crate) async fn several<T>(
        &mut self,
        at_once: usize,
        mut jobs: impl Iterator<Item = impl Future<Output = T>>,
        go_on: impl Fn(&T) -> bool,
        line: impl Fn(usize) -> String,
    ) -> (Vec<T>, bool) {
        let Self { progress, interrupt, terminate } = self;
        let mut ticks = tokio::time::interval(TICK);
        let (mut done, mut stopped, mut interrupted) = (Vec::new(), false, false);
        let mut under_way = FuturesUnordered::new();
        loop {
            while !stopped
                && under_way.len() < at_once
                && let Some(job) = jobs.next()
            {
                under_way.push(job);
            }
            let signal = tokio::select! {
                outcome = under_way.next() => match outcome {
                    None => break,
                    Some(outcome) => {
                        stopped |= !go_on(&outcome);
                        done.push(outcome);
                        false
                    }
                },
                _ = interrupt.recv() => true,
                _ = terminate.recv() => true,
                _ = ticks.tick() => {
                    progress.now(0, &line(done.len()));
                    false
                }
            };
            // What comes after a failure changes nothing any more.
            interrupted |= signal && !stopped;
            stopped |= signal;
        }
        (done, interrupted)
    }

    pub(crate) fn finish(&self) {
        self.progress.finish();
    }
}

pub(crate) struct Progress {
    begin: Instant,
    line: &'static str,
    shown: bool,
    bar: OnceCell<ProgressBar>,
    entries: Cell<u64>,
    bytes: Cell<u64>,
}

impl Progress {
    /// Of bytes that are copied.
    pub(crate) fn new() -> Self {
        Self::with(COPYING)
    }

    /// Of something that somebody else does.
    pub(crate) fn waiting() -> Self {
        Self::with(WAITING)
    }

    fn with(line: &'static str) -> Self {
        Self {
            begin: Instant::now(),
            line,
            shown: std::io::stderr().is_terminal(),
            bar: OnceCell::new(),
            entries: Cell::new(0),
            bytes: Cell::new(0),
        }
    }

    /// An entry is copied.
    pub(crate) fn entry(&self, name: &[u8]) {
        self.entries.set(self.entries.get() + 1);
        self.draw(Some(name));
    }

    /// So many bytes more.
    pub(crate) fn bytes(&self, count: usize) {
        self.bytes.set(self.bytes.get().saturating_add(count as u64));
        self.draw(None);
    }

    /// So many bytes in all, of what is named so; called again and again.
    pub(crate) fn now(&self, bytes: u64, name: &str) {
        self.bytes.set(bytes);
        self.draw(Some(name.as_bytes()));
        if let Some(bar) = self.bar.get() {
            bar.tick();
        }
    }

    fn draw(&self, name: Option<&[u8]>) {
        if !self.shown || self.begin.elapsed() < PATIENCE {
            return;
        }
        let bar = self.bar.get_or_init(|| {
            let style =
                ProgressStyle::with_template(self.line).unwrap_or_else(|_| ProgressStyle::default_spinner());
            ProgressBar::new_spinner().with_style(style).with_elapsed(self.begin.elapsed())
        });
        bar.set_position(self.bytes.get());
        if let Some(name) = name {
            bar.set_message(crate::show::name(name));
        }
    }

    /// Takes the line away.
    pub(crate) fn finish(&self) {
        if let Some(bar) = self.bar.get() {
            bar.finish_and_clear();
        }
    }

    /// Entries and bytes.
    pub(crate) fn totals(&self) -> (u64, u64) {
        (self.entries.get(), self.bytes.get())
    }
}

#[cfg(test)]
mod tests {
    use nix::sys::signal::{Signal, raise};

    use super::*;

    /// One test, for a signal is every `Work`'s.
    #[tokio::test]
    async fn jobs_go_on_some_at_a_time_until_one_fails_or_somebody_interrupts() {
        let mut work = Work::begin().unwrap();
        let (under_way, most) = (Cell::new(0), Cell::new(0));
        let job = |number: u64| {
            let (under_way, most) = (&under_way, &most);
            async move {
                under_way.set(under_way.get() + 1);
                most.set(most.get().max(under_way.get()));
                tokio::task::yield_now().await;
                under_way.set(under_way.get() - 1);
                number
            }
        };
        let line = |done| format!("{done} of some");
        let (done, interrupted) = work.several(3, (0..10).map(job), |_| true, line).await;
        assert_eq!((done.len(), most.get(), interrupted), (10, 3, false));
        let (done, interrupted) = work.several(2, (0..10).map(job), |number| *number != 3, line).await;
        assert!(done.contains(&3) && done.len() < 10 && !interrupted, "{done:?}");
        assert_eq!(under_way.get(), 0);
        assert!(work.several(2, (0..0).map(job), |_| true, line).await.0.is_empty());

        // Those under way come to their end, and no more are begun.
        let slow = (0..10).map(|number| async move {
            if number == 0 {
                raise(Signal::SIGTERM).unwrap();
            }
            tokio::time::sleep(TICK).await;
            number
        });
        let (mut done, interrupted) = work.several(2, slow, |_| true, line).await;
        done.sort_unstable();
        assert_eq!((done, interrupted), (vec![0, 1], true));
        // What is taken away afterwards is taken away.
        let (done, interrupted) = work.several(usize::MAX, (0..4).map(job), |_| true, line).await;
        assert_eq!((done.len(), interrupted), (4, false));
    }
}
