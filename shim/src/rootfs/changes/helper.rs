//! `upper-fill`: a process of its own between the guest's archive and the host's files.

use std::fs::File;
use std::io::BufReader;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use nix::sys::socket::{setsockopt, sockopt};
use tokio::io::{AsyncRead, AsyncReadExt};

use super::apply::apply;
use super::archive::Limits;
use super::confine;
use crate::rootfs::build::die_with_parent;

pub(crate) const SUBCOMMAND: &str = "upper-fill";
/// How long the guest may send nothing.
const STALLED: i64 = 60;
/// How long all of it may take.
const DEADLINE: Duration = Duration::from_secs(600);
const BUFFER: usize = 128 * 1024;
/// Of what it says, as much as an error shows.
const MOST_SAID: u64 = 4096;

/// Applies the archive that comes from `stream` to the directory; returns how much the guest could
/// not send, or what went wrong. `stop` ends it early, for the reason that it gives. Nothing writes to the
/// directory any more when this returns.
pub(super) async fn fill(
    directory: &Path,
    limits: Limits,
    stream: UnixStream,
    stop: impl Future<Output = &'static str>,
) -> Result<u64, String> {
    let mut child = tokio::process::Command::new("/proc/self/exe")
        .arg(SUBCOMMAND)
        .arg(directory)
        .args([limits.entries.to_string(), limits.bytes.to_string()])
        .env_clear()
        .current_dir("/")
        .stdin(Stdio::from(OwnedFd::from(stream)))
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .map_err(|error| format!("start {SUBCOMMAND}: {error}"))?;
    let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
    let ended = async {
        let (stdout, stderr, status) = tokio::join!(text_of(stdout), text_of(stderr), child.wait());
        (stdout, stderr, status)
    };
    let stopped = tokio::select! {
        (skipped, said, status) = ended => {
            let status = status.map_err(|error| format!("wait for {SUBCOMMAND}: {error}"))?;
            return outcome(status, &skipped, &said);
        }
        () = tokio::time::sleep(DEADLINE) => format!("not done within {} s", DEADLINE.as_secs()),
        reason = stop => reason.to_owned(),
    };
    // Waits for its end, too.
    child.kill().await.map_err(|error| format!("{stopped}; kill {SUBCOMMAND}: {error}"))?;
    Err(stopped)
}

async fn text_of(pipe: Option<impl AsyncRead + Unpin>) -> String {
    let mut text = Vec::new();
    if let Some(pipe) = pipe {
        let _ = pipe.take(MOST_SAID).read_to_end(&mut text).await;
    }
    String::from_utf8_lossy(&text).trim().to_owned()
}

fn outcome(status: ExitStatus, skipped: &str, said: &str) -> Result<u64, String> {
    if status.success() {
        return Ok(skipped.parse().unwrap_or(0));
    }
    let said = said.trim_start_matches(crate::RUNTIME).trim_start_matches(": ");
    Err(if said.is_empty() { format!("{SUBCOMMAND} ended with {status}") } else { said.into() })
}

/// `upper-fill DIRECTORY ENTRIES BYTES`, the archive on standard input.
pub(crate) fn main(arguments: &[String]) -> Result<(), String> {
    die_with_parent()?;
    let [directory, entries, bytes] = arguments else {
        return Err(format!("{SUBCOMMAND}: a directory and two numbers are needed"));
    };
    let number = |text: &String| text.parse::<u64>().map_err(|error| format!("{text:?}: {error}"));
    let limits = Limits { entries: number(entries)?, bytes: number(bytes)? };
    let input = std::io::stdin().as_fd().try_clone_to_owned().map_err(|error| format!("stdin: {error}"))?;
    // Of a pipe, which tests use, there is no such time.
    let stalled = nix::sys::time::TimeVal::from(libc::timeval { tv_sec: STALLED, tv_usec: 0 });
    let _ = setsockopt(&input, sockopt::ReceiveTimeout, &stalled);
    confine::enter(Path::new(directory))?;
    let root = File::open("/").map_err(|error| format!("open the root: {error}"))?;
    let input = BufReader::with_capacity(BUFFER, File::from(input));
    let skipped = apply(&root.into(), input, limits).map_err(|error| error.to_string())?;
    println!("{skipped}");
    Ok(())
}
