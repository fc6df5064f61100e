//! The guest's serial output, as it arrives.

use std::io::{PipeReader, Read};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

#[derive(Default)]
struct Output {
    text: Vec<u8>,
    ended: bool,
}

/// Collects a pipe's output in a thread of its own, which ends with the pipe.
#[derive(Clone)]
pub struct Console(Arc<(Mutex<Output>, Condvar)>);

impl Console {
    pub(crate) fn collect(mut pipe: PipeReader) -> Self {
        let console = Self(Arc::default());
        let shared = console.clone();
        std::thread::spawn(move || {
            let mut chunk = vec![0; 64 * 1024];
            loop {
                let length = pipe.read(&mut chunk).unwrap_or(0);
                let (output, changed) = &*shared.0;
                let mut output = output.lock().expect("no holder panics");
                output.text.extend_from_slice(&chunk[..length]);
                output.ended |= length == 0;
                changed.notify_all();
                if length == 0 {
                    return;
                }
            }
        });
        console
    }

    /// Everything so far.
    #[must_use]
    pub fn text(&self) -> String {
        let output = self.0.0.lock().expect("no holder panics");
        String::from_utf8_lossy(&output.text).into_owned()
    }

    /// Waits until `done` finds what it looks for in the whole output; `None` at the
    /// deadline, or when the output ended without it.
    pub fn wait<T>(&self, deadline: Duration, mut done: impl FnMut(&str) -> Option<T>) -> Option<T> {
        let until = Instant::now() + deadline;
        let (output, changed) = &*self.0;
        let mut output = output.lock().expect("no holder panics");
        loop {
            if let Some(found) = done(&String::from_utf8_lossy(&output.text)) {
                return Some(found);
            }
            let left = until.saturating_duration_since(Instant::now());
            if output.ended || left.is_zero() {
                return None;
            }
            output = changed.wait_timeout(output, left).expect("no holder panics").0;
        }
    }

    /// Waits for the end of the output and returns all of it.
    pub fn wait_end(&self, deadline: Duration) -> String {
        let until = Instant::now() + deadline;
        let (output, changed) = &*self.0;
        let mut output = output.lock().expect("no holder panics");
        while !output.ended {
            let left = until.saturating_duration_since(Instant::now());
            assert!(!left.is_zero(), "the console is still open after {deadline:?}");
            output = changed.wait_timeout(output, left).expect("no holder panics").0;
        }
        String::from_utf8_lossy(&output.text).into_owned()
    }
}
