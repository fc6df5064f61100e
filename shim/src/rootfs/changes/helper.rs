//! `upper-fill`: a process of its own between the guest's archive and the host's files.

use std::fs::File;
use std::io::BufReader;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use nix::sys::socket::{setsockopt, sockopt};

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

/// Applies the archive that comes from `stream` to the directory; returns how much the guest could
/// not send, or what went wrong.
pub(super) async fn fill(directory: &Path, limits: Limits, stream: UnixStream) -> Result<u64, String> {
    let child = tokio::process::Command::new("/proc/self/exe")
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
    let ended = tokio::time::timeout(DEADLINE, child.wait_with_output()).await;
    let output = ended.map_err(|_| format!("not done within {} s", DEADLINE.as_secs()))?;
    let output = output.map_err(|error| format!("wait for {SUBCOMMAND}: {error}"))?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).trim().parse().unwrap_or(0));
    }
    let text = String::from_utf8_lossy(&output.stderr);
    let text = text.trim().trim_start_matches(crate::RUNTIME).trim_start_matches(": ");
    Err(if text.is_empty() { format!("{SUBCOMMAND} ended with {}", output.status) } else { text.into() })
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
