//! The control socket: obeys the shim, one call after the other, on the main thread.

use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer, SendFlags,
    recvmsg, sendmsg,
};

use crate::tree::{Tree, state};
use crate::worker::Service;
use containerd_shim_spore::protocol::{Answer, Call, MAX_FDS, MAX_PACKET};

#[derive(Debug, thiserror::Error)]
pub(crate) enum ServeError {
    #[error("control socket: {operation}: {source}")]
    Socket { operation: &'static str, source: io::Error },
    #[error("control socket: a packet was cut short; it is too long or has too many descriptors")]
    Truncated,
    #[error(
        "control socket: a message that cannot be read: {0}; install shim and file server of one release"
    )]
    Malformed(serde_json::Error),
}

/// A message and its descriptors.
type Packet = (Vec<u8>, Vec<OwnedFd>);

/// Obeys until the shim closes the socket. `null` takes and forgets everything.
pub(crate) fn run(control: &OwnedFd, tree: Tree, null: File) -> Result<(), ServeError> {
    let tree = Arc::new(tree);
    // Taken when the sockets come.
    let mut service = Some(Service::new(Arc::clone(&tree), null));
    while let Some((packet, fds)) = receive(control)? {
        let call: Call = serde_json::from_slice(&packet).map_err(ServeError::Malformed)?;
        answer(control, &obey(&call, fds, &tree, &mut service))?;
    }
    Ok(())
}

fn obey(call: &Call, fds: Vec<OwnedFd>, tree: &Tree, service: &mut Option<Service>) -> Answer {
    match call {
        Call::Export { id } => tree.export(*id, one(fds)?).map_err(|error| format!("export {id}: {error}")),
        Call::Restore if service.is_none() => Err("restore: requests are being served already".into()),
        Call::Restore => {
            state::restore(tree, File::from(one(fds)?)).map_err(|error| format!("restore: {error}"))
        }
        Call::Save => state::save(tree, File::from(one(fds)?)).map_err(|error| format!("save: {error}")),
        Call::Serve if fds.is_empty() => Err("serve: there is no socket".into()),
        Call::Serve => match service.take() {
            Some(service) => start(fds, service).map_err(|error| format!("serve: {error}")),
            None => Err("serve: requests are being served already".into()),
        },
    }
}

fn one(mut fds: Vec<OwnedFd>) -> Result<OwnedFd, String> {
    match (fds.pop(), fds.is_empty()) {
        (Some(fd), true) => Ok(fd),
        _ => Err("not exactly one descriptor is attached".into()),
    }
}

/// One thread a socket; the process ends with the last of them, which is when the VMM has.
fn start(sockets: Vec<OwnedFd>, service: Service) -> io::Result<()> {
    let service = Arc::new(service);
    let left = Arc::new(AtomicUsize::new(sockets.len()));
    for socket in sockets {
        let (service, left) = (Arc::clone(&service), Arc::clone(&left));
        std::thread::Builder::new().name("spore-fs".into()).spawn(move || {
            if let Err(error) = service.run(UnixStream::from(socket)) {
                eprintln!("spore-fs: request socket: {error}; it is closed");
            }
            if left.fetch_sub(1, Ordering::AcqRel) == 1 {
                std::process::exit(0);
            }
        })?;
    }
    Ok(())
}

fn receive(control: &OwnedFd) -> Result<Option<Packet>, ServeError> {
    let mut packet = vec![0; MAX_PACKET];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut control_data = RecvAncillaryBuffer::new(&mut space);
    let failed = |error: rustix::io::Errno| ServeError::Socket { operation: "receive", source: error.into() };
    let received = rustix::io::retry_on_intr(|| {
        recvmsg(control, &mut [IoSliceMut::new(&mut packet)], &mut control_data, RecvFlags::CMSG_CLOEXEC)
    })
    .map_err(failed)?;
    let mut fds = Vec::new();
    for message in control_data.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            fds.extend(rights);
        }
    }
    if received.bytes == 0 {
        return Ok(None);
    }
    if received.flags.intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC) {
        return Err(ServeError::Truncated);
    }
    packet.truncate(received.bytes);
    Ok(Some((packet, fds)))
}

fn answer(control: &OwnedFd, answer: &Answer) -> Result<(), ServeError> {
    let packet = serde_json::to_vec(answer).map_err(ServeError::Malformed)?;
    let mut none = SendAncillaryBuffer::default();
    sendmsg(control, &[IoSlice::new(&packet)], &mut none, SendFlags::NOSIGNAL)
        .map(drop)
        .map_err(|error| ServeError::Socket { operation: "answer", source: error.into() })
}
