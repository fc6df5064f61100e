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
    socket.write_all(&[ATTACHED])?;
    let mut archive = BufWriter::with_capacity(pump::BUFFER, &socket);
    walk::archive(&changes.upper, &mut archive)?;
    archive.flush()
}

/// Whether anything was written: most containers write nothing.
fn has_changed(changes: &Changes) -> io::Result<bool> {
    if fs::read_dir(&changes.upper)?.next().is_some() {
        return Ok(true);
    }
    let (upper, like) = (fs::metadata(&changes.upper)?, fs::metadata(&changes.like)?);
    let about = |metadata: &fs::Metadata| (metadata.mode() & 0o7777, metadata.uid(), metadata.gid());
    Ok(about(&upper) != about(&like))
}
