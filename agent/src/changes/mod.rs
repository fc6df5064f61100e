//! Sends what a container changed of its root file system, for the host to have it where its
//! clients read it (commit, diff, copy): the overlay's upper directory as an archive
//! ([`spore_agent_api::changes`]).
//!
//! Walking and sending block, so they run on a worker thread; backpressure is the socket's.

mod walk;

use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use spore_agent_api::stream::{ATTACHED, REFUSED_NO_SUCH_PROCESS, UNCHANGED};

use crate::container::registry::Registry;
use crate::container::rootfs::Changes;
use crate::error::AgentError;
use crate::say;
use crate::stdio::pump::{self, Watched};

/// A host that takes nothing for so long is not there any more.
const STALLED: Duration = Duration::from_secs(60);

/// Serves one connection to its end.
pub async fn serve(connection: Watched, id: &str, registry: &Arc<Registry>) {
    let container = match registry.find(id) {
        Ok(container) => container,
        Err(_) => {
            let _ = pump::write_some(&connection, &[REFUSED_NO_SUCH_PROCESS]).await;
            return;
        }
    };
    let socket = connection.into_inner();
    let sent = container.with_changes(move |changes| {
        send(&changes, socket).map_err(|error| AgentError::internal("send its changes", error))
    });
    if let Err(error) = sent.await {
        say!("{}: {error}", container.name_of(""));
    }
}

fn send(changes: &Changes, socket: OwnedFd) -> io::Result<()> {
    let flags = OFlag::from_bits_truncate(fcntl(&socket, FcntlArg::F_GETFL)?);
    fcntl(&socket, FcntlArg::F_SETFL(flags & !OFlag::O_NONBLOCK))?;
    let _ =
        rustix::net::sockopt::set_socket_timeout(&socket, rustix::net::sockopt::Timeout::Send, Some(STALLED));
    let mut socket = File::from(socket);
    if !has_changed(changes)? {
        return socket.write_all(&[UNCHANGED]);
    }
    // Whatever becomes of this machine, its disk then holds all that the host gets.
    rustix::fs::syncfs(File::open(&changes.upper)?)?;
    socket.write_all(&[ATTACHED])?;
    let mut archive = BufWriter::with_capacity(pump::BUFFER, &socket);
    walk::archive(&changes.upper, &mut archive)?;
    archive.flush()
}

/// Most entries of a directory that is compared instead of sent.
const MAX_FINGERPRINT: usize = 64;

/// The entries of a small directory tree, with what changes when they do.
pub type Fingerprint = Vec<(PathBuf, u64, i64, i64)>;

/// `None` for a tree that is large, or cannot be read.
pub fn fingerprint(upper: &Path) -> Option<Fingerprint> {
    let mut found = Vec::new();
    let mut directories = vec![upper.to_path_buf()];
    while let Some(directory) = directories.pop() {
        let metadata = fs::symlink_metadata(&directory).ok()?;
        found.push((directory.clone(), metadata.ino(), metadata.ctime(), metadata.ctime_nsec()));
        if !metadata.is_dir() {
            continue;
        }
        for entry in fs::read_dir(&directory).ok()? {
            directories.push(entry.ok()?.path());
        }
        if found.len() + directories.len() > MAX_FINGERPRINT {
            return None;
        }
    }
    found.sort_unstable();
    Some(found)
}

/// Whether anything was written: most containers write nothing. The mount points that were
/// made for a container are no change of its own.
fn has_changed(changes: &Changes) -> io::Result<bool> {
    if changes.prepared.is_some() && changes.prepared == fingerprint(&changes.upper) {
        return Ok(false);
    }
    if fs::read_dir(&changes.upper)?.next().is_some() {
        return Ok(true);
    }
    let (upper, like) = (fs::metadata(&changes.upper)?, fs::metadata(&changes.like)?);
    let about = |metadata: &fs::Metadata| (metadata.mode() & 0o7777, metadata.uid(), metadata.gid());
    Ok(about(&upper) != about(&like))
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::unix::net::UnixStream;

    use super::*;

    /// What the host gets first.
    fn answer(changes: &Changes) -> u8 {
        let (ours, theirs) = UnixStream::pair().unwrap();
        send(changes, theirs.into()).unwrap();
        let mut answer = [0];
        (&ours).read_exact(&mut answer).unwrap();
        answer[0]
    }

    #[test]
    fn only_what_was_written_is_sent() {
        let dir = tempfile::tempdir().unwrap();
        let (upper, like) = (dir.path().join("upper"), dir.path().join("like"));
        for path in [&upper, &like] {
            fs::create_dir(path).unwrap();
        }
        let mut changes = Changes { upper: upper.clone(), like, fresh: true, prepared: None };
        assert_eq!(answer(&changes), UNCHANGED, "empty");
        fs::create_dir(upper.join("run")).unwrap();
        assert_eq!(answer(&changes), ATTACHED, "of an earlier task, as far as is known");
        changes.prepared = fingerprint(&upper);
        assert_eq!(answer(&changes), UNCHANGED, "a mount point");
        fs::create_dir(upper.join("run/below")).unwrap();
        assert_eq!(answer(&changes), ATTACHED);
        for number in 0..MAX_FINGERPRINT {
            fs::write(upper.join(number.to_string()), b"").unwrap();
        }
        assert_eq!(fingerprint(&upper), None, "it is not small");
    }
}
