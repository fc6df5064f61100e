//! The program in the container whose standing still is measured: it ticks, and tells the longest time between two ticks.
//!
//! It is this program, started as `tick`. Each line on its standard input is a number; when so many ticks have gone by since
//! the last answer, it answers `LONGEST ELAPSED TICKS`, times in microseconds of CLOCK_MONOTONIC, and begins anew. It ends with
//! its input.

use std::io::{BufRead, Write};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// The first argument that makes a program this one.
pub(crate) const VERB: &str = "tick";
/// Milliseconds of a tick, where the machine keeps up.
const TICK: u8 = 1;

/// Since the last answer.
struct Window {
    begun: Instant,
    last: Instant,
    longest: Duration,
    ticks: u64,
}

impl Window {
    fn begin() -> Self {
        let now = Instant::now();
        Self { begun: now, last: now, longest: Duration::ZERO, ticks: 0 }
    }

    fn tick(&mut self, now: Instant) {
        self.longest = self.longest.max(now.duration_since(self.last));
        self.last = now;
        self.ticks += 1;
    }
}

pub(crate) fn main() -> Result<()> {
    let stdin = std::io::stdin();
    let mut line = String::new();
    let mut asked = None;
    let mut window = Window::begin();
    loop {
        let mut input = [PollFd::new(stdin.as_fd(), PollFlags::POLLIN)];
        let ready = match poll(&mut input, PollTimeout::from(TICK)) {
            Ok(ready) => ready > 0,
            Err(Errno::EINTR) => continue,
            Err(error) => bail!("waiting for a tick: {error}"),
        };
        window.tick(Instant::now());
        if asked.is_some_and(|wanted| window.ticks >= wanted) {
            let Window { begun, last, longest, ticks } = window;
            let elapsed = last.duration_since(begun);
            let mut stdout = std::io::stdout().lock();
            writeln!(stdout, "{} {} {ticks}", longest.as_micros(), elapsed.as_micros())?;
            stdout.flush()?;
            asked = None;
            window = Window::begin();
        }
        if ready {
            line.clear();
            // A question is one line, and the next comes after its answer: nothing stays in the buffer.
            if stdin.lock().read_line(&mut line)? == 0 {
                return Ok(());
            }
            asked = Some(line.trim().parse::<u64>().with_context(|| format!("\"{line}\" is no number"))?);
        }
    }
}
