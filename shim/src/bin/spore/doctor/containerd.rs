//! containerd: whether it answers, and what it finds on its PATH, which the shim inherits.

use std::os::unix::net::UnixStream;

use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};

use super::host::find;
use super::{Bad, INSTALL, bad};
use crate::Global;
use crate::containerd::Containerd;

/// The oldest series that Spore is tested with.
const OLDEST: (u32, u32) = (1, 6);
const SHIM: &str = "containerd-shim-spore-v2";

/// The version that answers at the socket, and the PATH to look for programs in: containerd's
/// own, or this process's when that is not to be seen.
pub(super) async fn reached(global: &Global) -> (Result<String, Bad>, String) {
    let path = path_of(global.socket()).or_else(|| std::env::var("PATH").ok()).unwrap_or_default();
    let version = match Containerd::connect(global).await {
        Ok(containerd) => containerd.version().await,
        Err(failure) => Err(failure),
    };
    let found = match version {
        Ok(version) => {
            let mut numbers =
                version.trim_start_matches('v').split('.').map(|text| text.parse().unwrap_or(0));
            let series = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
            let shown = format!("{version} at {}", global.socket());
            let (major, minor) = OLDEST;
            if series >= OLDEST {
                Ok(shown)
            } else {
                bad(shown, format!("containerd {major}.{minor} or newer"))
            }
        }
        Err(failure) => bad(failure.to_string(), "start containerd, or name its socket by --address"),
    };
    (found, path)
}

/// The PATH of the process that listens at a socket.
fn path_of(socket: &str) -> Option<String> {
    let peer = getsockopt(&UnixStream::connect(socket).ok()?, PeerCredentials).ok()?;
    let environment = std::fs::read(format!("/proc/{}/environ", peer.pid())).ok()?;
    let path = environment.split(|byte| *byte == 0).find_map(|entry| entry.strip_prefix(b"PATH="))?;
    Some(String::from_utf8_lossy(path).into_owned())
}

pub(super) fn shim(path: &str) -> Result<String, Bad> {
    if let Some(found) = find(SHIM, path) {
        return Ok(found.display().to_string());
    }
    let beside = std::env::current_exe().ok().and_then(|spore| Some(spore.parent()?.join(SHIM)));
    match beside.filter(|path| path.exists()) {
        Some(beside) => bad(
            format!("{} is not on containerd's PATH ({path})", beside.display()),
            "add its directory there, or link it into one that is",
        ),
        None => bad(format!("{SHIM} is not on containerd's PATH ({path})"), INSTALL),
    }
}
