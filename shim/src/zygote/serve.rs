//! The side that has the zygote.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use nix::sys::socket::{AddressFamily, Backlog, SockFlag, SockType, UnixAddr, accept4, bind, listen, socket};
use slog::{Logger, info, warn};
use tokio::io::Interest;
use tokio::task::{AbortHandle, JoinSet};

use super::{Address, Answer, Ask, Described, Lower, VERSION, in_order, limit, receive, send};
use crate::checkpoint::Remembered;
use crate::process;
use crate::rootfs::Image;
use crate::rundir::RunDir;
use crate::vm::Zygote;

/// How long a zygote is kept that nobody asks.
const IDLE: Duration = Duration::from_secs(60);

/// A zygote, and all that machines of it are made of.
pub(crate) struct Parts {
    pub(crate) zygote: Zygote,
    pub(crate) remembered: Remembered,
    pub(crate) vcpus: u8,
    /// Layers that the memory stands on, by id.
    pub(crate) memory: Vec<(String, File)>,
    /// Read-only disks by serial.
    pub(crate) lower: Vec<(String, Image)>,
    /// The writable one's serial and layers, from the bottom up.
    pub(crate) writable: (String, Vec<File>),
    /// As long as this is held these layers keep their names.
    pub(crate) _held: Arc<()>,
}

/// A zygote that is served. Dropped, it ends, and its socket goes.
pub(crate) struct Served {
    work: AbortHandle,
}

impl Drop for Served {
    fn drop(&mut self) {
        self.work.abort();
    }
}

/// Removes the socket, whatever ends the service.
struct Socket {
    dir: Arc<RunDir>,
    name: String,
}

impl Drop for Socket {
    fn drop(&mut self) {
        // Through the descriptor: of this very directory.
        let _ = std::fs::remove_file(self.dir.socket(&self.name));
    }
}

/// Serves it in the directory of the sandbox until nobody asks any more; `over` is called at the end.
pub(crate) fn serve(
    parts: Parts,
    dir: Arc<RunDir>,
    address: &Address,
    log: Logger,
    over: impl FnOnce() + Send + 'static,
) -> io::Result<Served> {
    let socket_flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let listener = socket(AddressFamily::Unix, SockType::SeqPacket, socket_flags, None)?;
    let name = address.socket();
    bind(listener.as_raw_fd(), &UnixAddr::new(&dir.socket(&name))?)?;
    let file = Socket { dir, name };
    listen(&listener, Backlog::new(128).map_err(io::Error::from)?)?;
    let listener = process::watch(listener, Interest::READABLE)?;
    let work = tokio::spawn(async move {
        let (parts, mut serving) = (Arc::new(parts), JoinSet::new());
        loop {
            let accept = |fd: &OwnedFd| Ok(accept4(fd.as_raw_fd(), SockFlag::SOCK_CLOEXEC)?);
            tokio::select! {
                accepted = listener.async_io(Interest::READABLE, accept) => match accepted {
                    Ok(fd) => {
                        let client = process::adopt(vec![fd]);
                        let parts = Arc::clone(&parts);
                        let log = log.clone();
                        serving.spawn(async move {
                            for client in client {
                                if let Err(error) = hand_over(Arc::clone(&parts), client).await {
                                    warn!(log, "a clone is not forked off the zygote"; "error" => %error);
                                }
                            }
                        });
                    }
                    Err(error) => {
                        warn!(log, "the zygote is not served any more"; "error" => %error);
                        break;
                    }
                },
                Some(_) = serving.join_next() => {}
                () = tokio::time::sleep(IDLE), if serving.is_empty() => {
                    info!(log, "a zygote ends: nobody has asked it for a while");
                    break;
                }
            }
        }
        drop(file);
        over();
    });
    Ok(Served { work: work.abort_handle() })
}

async fn elsewhere<T: Send + 'static>(
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    tokio::task::spawn_blocking(work).await.map_err(io::Error::other)?
}

/// Tells a client what there is, and forks a VMM when it asks.
async fn hand_over(parts: Arc<Parts>, client: OwnedFd) -> io::Result<()> {
    let told = Arc::clone(&parts);
    let (client, fds) = elsewhere(move || {
        limit(&client)?;
        let (described, files) = told.describe();
        send(&client, &described, &files)?;
        match receive::<Ask>(&client) {
            Ok((Ask::Fork, fds)) => Ok((client, Some(fds))),
            // It was refused something else.
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok((client, None)),
            Err(error) => Err(error),
        }
    })
    .await?;
    let Some(fds) = fds else { return Ok(()) };
    let forked = match &fds[..] {
        [control, log] => parts.zygote.fork(control, log).await.map_err(|error| error.to_string()),
        _ => Err(format!("{} descriptors instead of a socket and a log", fds.len())),
    };
    drop(fds);
    elsewhere(move || {
        let (answer, pidfd): (Answer, _) = match forked {
            Ok(pidfd) => (Ok(()), Some(pidfd)),
            Err(message) => (Err(message), None),
        };
        let fds: Vec<_> = pidfd.iter().map(|fd| fd as &dyn AsRawFd).collect();
        send(&client, &answer, &fds)
    })
    .await
}

impl Parts {
    fn describe(&self) -> (Described, Vec<&dyn AsRawFd>) {
        let Self { zygote, remembered, vcpus, memory, lower, writable, .. } = self;
        let volumes = zygote.volumes.as_ref();
        let described = Described {
            version: VERSION,
            vcpus: *vcpus,
            labels: remembered.labels(),
            memory: memory.iter().map(|(id, _)| id.clone()).collect(),
            lower: lower
                .iter()
                .map(|(serial, image)| Lower { serial: serial.clone(), sha256: image.known() })
                .collect(),
            writable: (writable.0.clone(), writable.1.len()),
            volumes: volumes.map(|saved| saved.exports.clone()),
        };
        let files = in_order(
            memory.iter().map(|(_, file)| file),
            lower.iter().map(|(_, image)| image.file()),
            writable.1.iter(),
            volumes.map(|saved| &saved.tables),
        );
        (described, files)
    }
}
