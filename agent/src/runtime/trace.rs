//! Keeps what libcontainer logs as an error.
//!
//! libcontainer's processes tell each other only the outermost error ("failed to prepare
//! rootfs"); the cause goes to `tracing`, in whichever of the forked processes it arose.
//! They all inherit one pipe, into which every error event is written as a line, and
//! which the helper reads when something has failed.

use std::fmt::{self, Write as _};
use std::fs::File;
use std::io::{self, Read, Write as _};
use std::sync::Mutex;

use nix::fcntl::OFlag;
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Level, Metadata, Subscriber};

/// Marks a line that tells what is wrong with the process's executable.
const EXECUTABLE: &str = "\u{1}executable ";
const MAX_LINE: usize = 1024;

/// The write end, in every process that libcontainer forks.
#[derive(Debug, Clone, Copy)]
pub struct Trace(&'static File);

/// The read end, in the helper.
#[derive(Debug)]
pub struct Journal(File);

struct Collector {
    trace: Trace,
    // Two events of one process never interleave; two processes' lines do not either, being
    // below PIPE_BUF.
    line: Mutex<String>,
}

/// Installs the collector for this process and its forks.
pub fn install() -> io::Result<(Trace, Journal)> {
    let (read, write) = nix::unistd::pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK)?;
    // For the rest of a short process's life.
    let trace = Trace(Box::leak(Box::new(File::from(write))));
    let collector = Collector { trace, line: Mutex::default() };
    tracing::subscriber::set_global_default(collector).map_err(io::Error::other)?;
    Ok((trace, Journal(File::from(read))))
}

impl Trace {
    /// Records what is wrong with the executable.
    pub fn executable(self, message: &str) {
        self.write(&format!("{EXECUTABLE}{message}"));
    }

    fn write(self, line: &str) {
        let mut line: String = line.chars().filter(|c| *c != '\n').take(MAX_LINE).collect();
        line.push('\n');
        // A full pipe holds enough already.
        let _ = (&*self.0).write_all(line.as_bytes());
    }
}

/// What the processes have recorded.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Findings {
    pub executable: Option<String>,
    pub errors: Vec<String>,
}

impl Journal {
    /// Everything recorded so far.
    pub fn read(&mut self) -> Findings {
        let mut bytes = Vec::new();
        // Ends with "would block": the write end stays open in this process.
        let _ = self.0.read_to_end(&mut bytes);
        findings(&String::from_utf8_lossy(&bytes))
    }
}

fn findings(text: &str) -> Findings {
    let mut found = Findings::default();
    for line in text.lines() {
        match line.strip_prefix(EXECUTABLE) {
            Some(message) => found.executable = Some(message.into()),
            None if found.errors.iter().any(|known| known == line) => {}
            None => found.errors.push(line.into()),
        }
    }
    found
}

impl Subscriber for Collector {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        *metadata.level() == Level::ERROR
    }

    fn new_span(&self, _span: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }

    fn record(&self, _span: &Id, _values: &Record<'_>) {}

    fn record_follows_from(&self, _span: &Id, _follows: &Id) {}

    fn event(&self, event: &Event<'_>) {
        // try_lock: a forked child must not wait for a thread that it does not have.
        let Ok(mut line) = self.line.try_lock() else { return };
        line.clear();
        event.record(&mut Fields(&mut line));
        self.trace.write(&line);
    }

    fn enter(&self, _span: &Id) {}

    fn exit(&self, _span: &Id) {}
}

struct Fields<'a>(&'a mut String);

impl Visit for Fields<'_> {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        if !self.0.is_empty() {
            self.0.push_str(", ");
        }
        // Writing to a string does not fail.
        let _ = match field.name() {
            "message" => write!(self.0, "{value:?}"),
            name => write!(self.0, "{name}: {value:?}"),
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_executables_fault_is_told_apart_and_repeats_are_dropped() {
        let text = format!("failed x\n{EXECUTABLE}exec: \"a\": no\nfailed x\nfailed y\n");
        assert_eq!(
            findings(&text),
            Findings {
                executable: Some("exec: \"a\": no".into()),
                errors: vec!["failed x".into(), "failed y".into()]
            }
        );
    }
}
