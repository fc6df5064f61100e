//! Carries a job's output to ours as it comes, and takes the records out of it.

use std::io::{Read, Write};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

use crate::job::{Demux, Record};

/// How a job ended, as far as its stream tells.
#[derive(Debug, PartialEq, Eq)]
pub enum Outcome {
    Ended(i32),
    Failed(String),
    /// The stream ended without a word.
    Silent,
}

/// A relay in progress.
pub struct Relay {
    records: Receiver<Record>,
    thread: JoinHandle<()>,
}

impl Relay {
    /// Starts to copy `from` to standard output on a thread of its own.
    pub fn start(from: impl Read + Send + 'static) -> Self {
        let (sender, records) = channel();
        Self { records, thread: thread::spawn(move || copy(from, &sender)) }
    }

    /// Waits for the end of the stream, at most until `end`; `None` when the deadline passed.
    pub fn wait(self, end: Instant, mut started: impl FnMut(&Record)) -> Result<Option<Outcome>> {
        let mut outcome = Outcome::Silent;
        loop {
            match self.records.recv_timeout(end.saturating_duration_since(Instant::now())) {
                Ok(record @ Record::Started { .. }) => started(&record),
                Ok(Record::Ended { status }) => outcome = Outcome::Ended(status),
                Ok(Record::Failed { reason }) => outcome = Outcome::Failed(reason),
                Err(RecvTimeoutError::Timeout) => return Ok(None),
                Err(RecvTimeoutError::Disconnected) => break,
            }
        }
        if self.thread.join().is_err() {
            bail!("the thread that relays output panicked");
        }
        Ok(Some(outcome))
    }
}

/// Whole lines at a time: several machines may share our output.
fn copy(mut from: impl Read, records: &Sender<Record>) {
    let mut demux = Demux::default();
    let mut buffer = vec![0; 64 * 1024];
    let mut pending = Vec::new();
    // When nobody reads our output any more the job still has to end in order.
    let write = |bytes: &[u8]| {
        let mut out = std::io::stdout().lock();
        out.write_all(bytes).and_then(|()| out.flush()).ok();
    };
    while let Ok(count @ 1..) = from.read(&mut buffer) {
        let (plain, found) = demux.feed(&buffer[..count]);
        pending.extend(plain);
        if let Some(end) = pending.iter().rposition(|byte| *byte == b'\n') {
            write(&pending[..=end]);
            pending.drain(..=end);
        }
        for record in found {
            records.send(record).ok();
        }
    }
    write(&pending);
}

/// What a ground may take beyond its job: to start, to collect logs, to stop.
pub const OVERHEAD: Duration = Duration::from_secs(150);
