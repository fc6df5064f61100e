//! The side of a clone.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;

use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect as connect_to, socket};

use super::{Address, Answer, Ask, Described, VERSION, limit, receive, send};
use crate::checkpoint::{Remembered, Restored};
use crate::clone::{CloneError, Identity};
use crate::rootfs::Image;
use crate::rundir::RunDir;
use crate::volumes::SavedVolumes;

/// Where a machine for this clone waits. Who drops it does without.
#[derive(Debug)]
pub(crate) struct Source {
    socket: OwnedFd,
}

impl Source {
    /// Has a VMM forked that obeys this socket and logs into this file; a descriptor of its process. Blocks until it is there.
    pub(crate) fn fork(self, control: &OwnedFd, log: &File) -> io::Result<OwnedFd> {
        send(&self.socket, &Ask::Fork, &[control, log])?;
        let (answer, mut fds): (Answer, _) = receive(&self.socket)?;
        answer.map_err(io::Error::other)?;
        fds.pop().ok_or_else(|| nonsense("no process came with the answer"))
    }
}

/// The same file with a place of its own to read at: other clones have this descriptor's.
fn own(fd: &OwnedFd) -> io::Result<File> {
    File::open(format!("/proc/self/fd/{}", fd.as_raw_fd()))
}

fn nonsense(detail: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, detail)
}

/// The machine that waits there for a container of this namespace. Blocks until the other shim has answered.
pub(crate) fn connect(
    run_dir: &Path,
    namespace: &str,
    address: &Address,
    identity: Identity,
) -> Result<Restored, CloneError> {
    let failed = |source: io::Error| CloneError::Zygote { address: address.to_string(), source };
    let dir = RunDir::path_of(run_dir, namespace, &address.sandbox);
    let open = || {
        let dir = RunDir::open(&dir)?;
        let socket = socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None)?;
        limit(&socket)?;
        connect_to(socket.as_raw_fd(), &UnixAddr::new(&dir.socket(&address.socket()))?)?;
        Ok(socket)
    };
    let socket = open().map_err(|error: io::Error| match error.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => {
            CloneError::NoZygote { address: address.to_string() }
        }
        _ => failed(error),
    })?;
    let (described, fds) = receive(&socket).map_err(failed)?;
    let restored = restored(described, fds).map_err(failed)?;
    Ok(Restored { identity: Some(identity), zygote: Some(Source { socket }), ..restored })
}

fn restored(described: Described, fds: Vec<OwnedFd>) -> io::Result<Restored> {
    let Described { version, vcpus, labels, memory, lower, writable, volumes } = described;
    if version != VERSION {
        let detail = format!("its shim is of another version (it speaks {version}, this one {VERSION})");
        return Err(nonsense(&detail));
    }
    let count = [memory.len(), lower.len(), writable.1, usize::from(volumes.is_some())];
    if count.iter().try_fold(0usize, |sum, more| sum.checked_add(*more)) != Some(fds.len()) {
        return Err(nonsense("its files are not those that it describes"));
    }
    let remembered =
        Remembered::of_machine(&labels, vcpus).ok_or_else(|| nonsense("it is no container's machine"))?;
    let mut files = fds.iter().map(own).collect::<io::Result<Vec<_>>>()?.into_iter();
    let memory = memory.into_iter().zip(files.by_ref()).collect();
    let lower = lower.into_iter().zip(files.by_ref()).map(|(lower, file)| {
        let image = match lower.sha256 {
            Some(sha256) => Image::told(file, &sha256),
            None => Image::other(file),
        };
        (lower.serial, image)
    });
    let lower = lower.collect();
    let (serial, layers) = writable;
    let writable = (serial, files.by_ref().take(layers).collect());
    let volumes = volumes.zip(files.next()).map(|(exports, tables)| SavedVolumes { exports, tables });
    let (state, identity, zygote) = (None, None, None);
    Ok(Restored { remembered, vcpus, state, zygote, memory, lower, writable, volumes, identity })
}
