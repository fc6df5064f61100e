//! Snapshots on their way in and out: blocking work on a thread of its own, whose bytes are counted for the line that moves.

use std::io::{self, Read, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use crate::failure::Failure;
use crate::progress::Progress;

/// Between two looks at the count.
const TICK: Duration = Duration::from_millis(100);
/// How long work may take to notice that it was interrupted, and to take away what it has begun.
const UNDOING: Duration = Duration::from_secs(10);

/// Stands for standard input or output in place of a file's name.
pub(super) const STANDARD: &str = "-";

/// What has gone through.
#[derive(Default)]
pub(super) struct Meter {
    bytes: AtomicU64,
    stopped: AtomicBool,
}

/// A stream that counts, and fails once the work is to stop.
pub(super) struct Metered<S> {
    stream: S,
    meter: Arc<Meter>,
}

impl<S> Metered<S> {
    pub(super) fn new(stream: S, meter: &Arc<Meter>) -> Self {
        Self { stream, meter: Arc::clone(meter) }
    }

    fn go_on(&self) -> io::Result<()> {
        // Not of the kind that is tried again.
        if self.meter.stopped.load(Ordering::Relaxed) { Err(io::Error::other("interrupted")) } else { Ok(()) }
    }

    fn count(&self, moved: usize) -> usize {
        self.meter.bytes.fetch_add(moved as u64, Ordering::Relaxed);
        moved
    }
}

impl<S: Read> Read for Metered<S> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.go_on()?;
        self.stream.read(buffer).map(|moved| self.count(moved))
    }
}

impl<S: Write> Write for Metered<S> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.go_on()?;
        self.stream.write(bytes).map(|moved| self.count(moved))
    }

    fn flush(&mut self) -> io::Result<()> {
        self.stream.flush()
    }
}

/// Runs the work to its end, or until Ctrl-C.
pub(super) async fn run<T: Send + 'static>(
    name: &str,
    work: impl FnOnce(&Arc<Meter>) -> Result<T, Failure> + Send + 'static,
) -> Result<T, Failure> {
    let meter = Arc::new(Meter::default());
    let theirs = Arc::clone(&meter);
    let mut working = tokio::task::spawn_blocking(move || work(&theirs));
    let (progress, mut ticks) = (Progress::new(), tokio::time::interval(TICK));
    let interrupted = tokio::signal::ctrl_c();
    tokio::pin!(interrupted);
    let done = loop {
        tokio::select! {
            done = &mut working => break done,
            _ = &mut interrupted => {
                meter.stopped.store(true, Ordering::Relaxed);
                // A read from a terminal or a pipe may go on for ever; what an import has begun then the store sweeps up.
                let _ = tokio::time::timeout(UNDOING, working).await;
                progress.finish();
                return Err(Failure::Interrupted);
            }
            _ = ticks.tick() => progress.now(meter.bytes.load(Ordering::Relaxed), name),
        }
    };
    progress.finish();
    done.map_err(|error| Failure::Refused(format!("{name}: cut short: {error}")))?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_counted_and_a_stopped_stream_fails_at_once() {
        let meter = Arc::new(Meter::default());
        let mut out = Metered::new(Vec::new(), &meter);
        out.write_all(&[1; 1000]).unwrap();
        assert_eq!(meter.bytes.load(Ordering::Relaxed), 1000);
        meter.stopped.store(true, Ordering::Relaxed);
        assert_eq!(out.write_all(&[1]).unwrap_err().to_string(), "interrupted");
        let mut input = Metered::new(&[1u8; 10][..], &meter);
        assert!(input.read_exact(&mut [0; 1]).is_err());
        assert_eq!(out.stream.len(), 1000);
    }
}
