//! slog to containerd: JSON lines into the `log` fifo of the bundle, each with the
//! sandbox's namespace and id.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use slog::{Drain, Level, Logger, o};

/// Writes to the fifo without ever blocking: a record that finds the fifo full is lost, as
/// a stuck reader must not stop the sandbox.
struct Fifo(Handle);

/// The open fifo, shared so that it can be closed before the shim's connections are:
/// containerd stops reading the log when it sees those close, and complains about the rest.
#[derive(Clone, Default)]
pub(crate) struct Handle(Arc<Mutex<Option<File>>>);

impl Handle {
    pub(crate) fn close(&self) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take();
    }
}

impl Write for Fifo {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut file = self.0.0.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(file) = file.as_mut() else { return Ok(bytes.len()) };
        match file.write(bytes) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(bytes.len()),
            other => other,
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Collects one record, so that it reaches the fifo in one write.
struct Line {
    fifo: Fifo,
    buffer: Vec<u8>,
}

impl Write for Line {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.buffer.extend_from_slice(bytes);
        if self.buffer.ends_with(b"\n") {
            let result = self.fifo.write_all(&self.buffer);
            self.buffer.clear();
            result?;
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The logger of a shim daemon whose working directory is the bundle.
pub(crate) fn open(namespace: &str, id: &str, debug: bool) -> (Logger, Handle) {
    open_at(Path::new("log"), namespace, id, debug)
}

fn open_at(path: &Path, namespace: &str, id: &str, debug: bool) -> (Logger, Handle) {
    // Read and write: opening does not wait for a reader, and the fifo outlives a restart
    // of containerd, which opens it again.
    let file = OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK).open(path);
    let level = if debug { Level::Debug } else { Level::Info };
    let values = o!(
        "runtime" => crate::RUNTIME,
        "namespace" => namespace.to_string(),
        "sandbox" => id.to_string(),
        "pid" => std::process::id(),
    );
    let Ok(file) = file else { return (Logger::root(slog::Discard, values), Handle::default()) };
    let handle = Handle(Arc::new(Mutex::new(Some(file))));
    let line = Line { fifo: Fifo(handle.clone()), buffer: Vec::with_capacity(512) };
    let drain = slog_json::Json::default(line).filter_level(level).ignore_res();
    (Logger::root(Mutex::new(drain).ignore_res(), values), handle)
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use slog::{debug, info};

    use super::*;

    #[test]
    fn records_carry_the_sandbox_and_a_full_fifo_does_not_block() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let (logger, handle) = open_at(&path, "default", "web", false);
        let mut reader = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(&path).unwrap();
        info!(logger, "hello"; "task" => "web");
        let mut bytes = [0; 4096];
        let length = reader.read(&mut bytes).unwrap();
        let line: serde_json::Value = serde_json::from_slice(&bytes[..length]).unwrap();
        assert_eq!((line["msg"].as_str(), line["sandbox"].as_str()), (Some("hello"), Some("web")));
        assert_eq!((line["task"].as_str(), line["namespace"].as_str()), (Some("web"), Some("default")));
        for _ in 0..2000 {
            info!(logger, "more than a fifo holds"; "padding" => "x".repeat(100));
        }
        handle.close();
        info!(logger, "lost, but no fault");
    }
    #[test]
    fn debug_records_are_there_if_they_are_asked_for() {
        for (asked, expected) in [(false, &["told"][..]), (true, &["for developers", "told"])] {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("log");
            nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
            let (logger, handle) = open_at(&path, "default", "web", asked);
            let mut reader =
                OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(&path).unwrap();
            debug!(logger, "for developers");
            info!(logger, "told");
            // The reader finds the end.
            handle.close();
            let mut text = String::new();
            reader.read_to_string(&mut text).unwrap();
            let lines = text.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
            let told: Vec<_> = lines.map(|line| line["msg"].as_str().unwrap().to_owned()).collect();
            assert_eq!(told, expected);
        }
    }
}
