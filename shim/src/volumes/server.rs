//! The file server's process. It ends when its owner is dropped, with the shim (its control
//! socket closes) and with the VMM (its request sockets close).

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, setsockopt, socketpair, sockopt};

use super::protocol::{Answer, Call, MAX_PACKET};
use super::{SavedVolumes, Volume, VolumeError};
use crate::checkpoint::memory_file;
use crate::packets;
use crate::process::ProcessId;
use crate::snapshot::manifest::Export;

/// Requests that are served at a time. More take more memory: each thread keeps the buffers of
/// its largest message.
const THREADS: usize = 4;
/// A server that does not answer in this time is stuck.
const DEADLINE: Duration = Duration::from_secs(30);

/// A running server; killed and reaped when dropped.
#[derive(Debug)]
pub(crate) struct FileServer {
    path: PathBuf,
    child: Child,
    id: ProcessId,
    control: OwnedFd,
    /// It has not answered a call, so the next answer would be that one's.
    stuck: AtomicBool,
    /// What it serves, by number.
    exports: Vec<Export>,
}

impl FileServer {
    /// Starts a server, with its messages into `log`, and gives it the volumes, each under its
    /// place as its number; with `saved` ones, in whose order they are, it goes on with the tables of those. Returns the
    /// VMM's ends of its request sockets too. Blocks until the server has answered.
    pub(crate) fn start(
        path: &Path,
        log: File,
        volumes: &[Volume],
        saved: Option<&SavedVolumes>,
    ) -> Result<(Self, Vec<UnixStream>), VolumeError> {
        // What is refused is refused before there is a process.
        let (mut mounts, mut exports) = (Vec::new(), Vec::new());
        for volume in volumes {
            let (mount, kind) = volume.open()?;
            mounts.push(mount);
            exports.push(Export { destination: volume.destination(), kind });
        }
        let before = saved.map_or(&[][..], |saved| &saved.exports);
        for ((volume, export), before) in volumes.iter().zip(&exports).zip(before) {
            if export.kind != before.kind {
                return Err(VolumeError::Other {
                    source_path: volume.source.clone(),
                    destination: volume.destination.clone(),
                    found: export.kind,
                    saved: before.kind,
                });
            }
        }
        let server = Self::spawn(path, log, exports).map_err(|source| VolumeError::Server {
            path: path.into(),
            operation: "start",
            source,
        })?;
        for (id, mount) in (0u32..).zip(&mounts) {
            server.call("export", &Call::Export { id }, &[mount.as_raw_fd()])?;
        }
        if let Some(saved) = saved {
            server.call("restore", &Call::Restore, &[saved.tables.as_raw_fd()])?;
        }
        let pairs: io::Result<Vec<_>> = (0..THREADS).map(|_| UnixStream::pair()).collect();
        let (ours, theirs): (Vec<_>, Vec<_>) =
            pairs.map_err(|error| server.error("serve", error))?.into_iter().unzip();
        let fds: Vec<_> = theirs.iter().map(AsRawFd::as_raw_fd).collect();
        server.call("serve", &Call::Serve, &fds)?;
        Ok((server, ours))
    }

    fn spawn(path: &Path, log: File, exports: Vec<Export>) -> io::Result<Self> {
        let (control, theirs) =
            socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)?;
        let deadline = nix::sys::time::TimeVal::from(libc::timeval {
            tv_sec: i64::try_from(DEADLINE.as_secs()).unwrap_or(i64::MAX),
            tv_usec: 0,
        });
        setsockopt(&control, sockopt::ReceiveTimeout, &deadline)?;
        let mut child = Command::new(path)
            .env_clear()
            .current_dir("/")
            .stdin(Stdio::from(theirs))
            .stdout(Stdio::null())
            .stderr(Stdio::from(log))
            .spawn()?;
        match ProcessId::of(child.id()) {
            Ok(id) => Ok(Self { path: path.into(), child, id, control, stuck: false.into(), exports }),
            Err(error) => {
                let _ = child.kill();
                let _ = child.wait();
                Err(error)
            }
        }
    }

    /// What the guest knows of it. Nothing may be under way, nor come: the VM is paused. Blocks until the server has answered.
    pub(crate) fn save(&self) -> Result<SavedVolumes, VolumeError> {
        let tables = memory_file(&[]).map_err(|error| self.error("save", error))?;
        self.call("save", &Call::Save, &[tables.as_raw_fd()])?;
        Ok(SavedVolumes { exports: self.exports.clone(), tables })
    }

    pub(crate) fn id(&self) -> ProcessId {
        self.id
    }

    fn error(&self, operation: &'static str, source: io::Error) -> VolumeError {
        VolumeError::Server { path: self.path.clone(), operation, source }
    }

    fn call(&self, operation: &'static str, call: &Call, fds: &[RawFd]) -> Result<(), VolumeError> {
        if self.stuck.load(Ordering::Acquire) {
            let error = io::Error::other("it has not answered before; the container has to be started anew");
            return Err(self.error(operation, error));
        }
        let exchanged = self.exchange(call, fds);
        self.stuck.store(exchanged.is_err(), Ordering::Release);
        exchanged.map_err(|error| self.error(operation, error))?.map_err(VolumeError::Refused)
    }

    fn exchange(&self, call: &Call, fds: &[RawFd]) -> io::Result<Answer> {
        let (packet, socket) = (serde_json::to_vec(call)?, self.control.as_raw_fd());
        packets::send(socket, &packet, fds)?;
        let mut answer = vec![0; MAX_PACKET];
        let (received, _) =
            packets::receive(socket, &mut answer, MsgFlags::empty()).map_err(|error| match error.kind() {
                io::ErrorKind::WouldBlock => io::ErrorKind::TimedOut.into(),
                _ => error,
            })?;
        if received == 0 {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "it has ended; its log says why"));
        }
        Ok(serde_json::from_slice(&answer[..received])?)
    }
}

impl Drop for FileServer {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
