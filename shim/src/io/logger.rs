//! Logging programs, named by `binary:///PATH?NAME=VALUE` (containerd's `cio.BinaryIO`): started
//! with standard output of the task on descriptor 3, standard error on 4, and a pipe on 5 that
//! the program closes when it is ready; NAME and VALUE are its arguments, CONTAINER_ID and
//! CONTAINER_NAMESPACE its environment.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe::{Receiver, Sender};

use super::sink::Sink;

pub(crate) const SUBCOMMAND: &str = "logger";
/// A logging program is ready within this time.
const READY: Duration = Duration::from_secs(10);
/// What it gets to write out the last lines.
const LAST_LINES: Duration = Duration::from_secs(10);
const POLL: Duration = Duration::from_millis(5);

/// Program and arguments that a URI names.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Named {
    program: PathBuf,
    arguments: Vec<String>,
}

/// What stands behind `binary://`.
pub(super) fn parse(rest: &str) -> Named {
    let (path, query) = rest.split_once('?').unwrap_or((rest, ""));
    let mut arguments = Vec::new();
    for pair in query.split('&').filter(|pair| !pair.is_empty()) {
        let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
        // In queries, and only there, "+" is a space.
        arguments.extend([name, value].map(|text| unescaped(&text.replace('+', " "))));
    }
    Named { program: unescaped(path).into(), arguments }
}

/// Percent-encoding undone.
pub(super) fn unescaped(text: &str) -> String {
    let mut bytes = Vec::new();
    let mut rest = text.as_bytes();
    while let Some((&first, tail)) = rest.split_first() {
        let code = tail
            .get(..2)
            .filter(|_| first == b'%')
            .and_then(|code| u8::from_str_radix(std::str::from_utf8(code).ok()?, 16).ok());
        match code {
            Some(byte) => {
                bytes.push(byte);
                rest = &tail[2..];
            }
            None => {
                bytes.push(first);
                rest = tail;
            }
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

/// A running logging program. Ends when its pipes do, or by force when this is dropped.
pub(crate) struct Logger(Child);

impl Logger {
    /// Starts it and waits until it is ready; gives the sinks for standard output and error.
    pub(super) async fn start(named: &Named, namespace: &str, id: &str) -> io::Result<(Self, Sink, Sink)> {
        let pipe = || nix::unistd::pipe2(OFlag::O_CLOEXEC).map_err(io::Error::from);
        let (out_read, out) = pipe()?;
        let (error_read, error) = pipe()?;
        let (ready, ready_write) = pipe()?;
        let child = Command::new("/proc/self/exe")
            .arg(SUBCOMMAND)
            .arg(&named.program)
            .args(&named.arguments)
            .env_clear()
            .env("CONTAINER_ID", id)
            .env("CONTAINER_NAMESPACE", namespace)
            .current_dir("/")
            .stdin(Stdio::from(out_read))
            .stdout(Stdio::from(error_read))
            .stderr(Stdio::from(ready_write))
            .spawn()?;
        let logger = Self(child);
        Self::wait_until_ready(ready).await?;
        let sink = |fd: OwnedFd| Sender::from_owned_fd(fd).map(Sink::Logger);
        Ok((logger, sink(out)?, sink(error)?))
    }

    async fn wait_until_ready(ready: OwnedFd) -> io::Result<()> {
        let mut ready = Receiver::from_owned_fd(ready)?;
        let mut said = [0; 4096];
        let Ok(length) = tokio::time::timeout(READY, ready.read(&mut said)).await else {
            return Err(io::Error::new(io::ErrorKind::TimedOut, format!("is not ready after {READY:?}")));
        };
        // A byte, or the end: both mean that it is. What could not be started says so here.
        let said = String::from_utf8_lossy(&said[..length?]).into_owned();
        match said.strip_prefix(FAILED) {
            Some(reason) => Err(io::Error::other(reason.to_owned())),
            None => Ok(()),
        }
    }

    /// Waits for its end, once its pipes are closed; by force after a while.
    pub(crate) async fn finish(mut self) {
        let end = tokio::time::Instant::now() + LAST_LINES;
        while matches!(self.0.try_wait(), Ok(None)) && tokio::time::Instant::now() < end {
            tokio::time::sleep(POLL).await;
        }
    }
}

impl Drop for Logger {
    fn drop(&mut self) {
        if matches!(self.0.try_wait(), Ok(None)) {
            let _ = self.0.kill();
        }
        let _ = self.0.wait();
    }
}

/// Begins what the launcher says instead of being ready.
const FAILED: &str = "\u{1}";

/// The launcher: `logger PROGRAM [ARGUMENTS]`, with the three pipes as its standard streams.
/// Copies of those without close-on-exec land on 3, 4 and 5, the lowest that are free.
pub(crate) fn main(arguments: &[String]) -> Result<(), String> {
    let Some((program, rest)) = arguments.split_first() else {
        return Err("logger: a program is needed".into());
    };
    let streams = (io::stdin(), io::stdout(), io::stderr());
    for (stream, wanted) in [(streams.0.as_fd(), 3), (streams.1.as_fd(), 4), (streams.2.as_fd(), 5)] {
        match fcntl(stream, FcntlArg::F_DUPFD(3)) {
            Ok(copy) if copy == wanted => {}
            Ok(copy) => return Err(failed(program, &format!("descriptor {copy} instead of {wanted}"))),
            Err(error) => return Err(failed(program, &error.desc())),
        }
    }
    let null = Stdio::null;
    let error = Command::new(program).args(rest).stdin(null()).stdout(null()).stderr(null()).exec();
    Err(failed(program, &error))
}

/// Tells the shim, by the pipe of readiness.
fn failed(program: &str, error: &dyn std::fmt::Display) -> String {
    let text = format!("{program}: {error}");
    let _ = std::fs::write("/proc/self/fd/5", format!("{FAILED}{text}"));
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_uri_names_program_and_arguments() {
        let named = parse("/usr/bin/log%20it?--to=%2Fvar%2Flog&quiet&a=b+c");
        assert_eq!(named.program, std::path::Path::new("/usr/bin/log it"));
        assert_eq!(named.arguments, ["--to", "/var/log", "quiet", "", "a", "b c"]);
        assert_eq!(unescaped("/var/log/a+b%20c"), "/var/log/a+b c");
        assert_eq!(unescaped("100%"), "100%");
        assert_eq!(unescaped("%zz%4"), "%zz%4");
    }
}
