//! The shim's end of the control socket: requests with descriptors out, responses and
//! events in. One reader task; calls may overlap.

use std::collections::HashMap;
use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use nix::cmsg_space;
use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, recvmsg, sendmsg,
    socketpair,
};
use spore_vmm::api::{Call, Event, Failure, MAX_FDS, MAX_MESSAGE, Message, Reply, Request};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::{mpsc, oneshot};

/// Why a call got no reply.
#[derive(Debug)]
pub(super) enum CallError {
    /// The VMM closed the socket.
    Closed,
    Io(io::Error),
    Refused(Failure),
}

type Waiting = Arc<Mutex<HashMap<u64, oneshot::Sender<Result<Reply, Failure>>>>>;

/// The calling side. The socket closes, and with it the VMM ends, when this is dropped.
pub(super) struct Control {
    socket: Arc<AsyncFd<OwnedFd>>,
    next: AtomicU64,
    waiting: Waiting,
    reader: tokio::task::JoinHandle<()>,
}

/// A pair of connected sockets: ours, and the one for the VMM.
pub(super) fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    let (ours, theirs) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)?;
    let flags = nix::fcntl::OFlag::O_NONBLOCK;
    nix::fcntl::fcntl(ours.as_fd(), nix::fcntl::FcntlArg::F_SETFL(flags))?;
    Ok((ours, theirs))
}

impl Control {
    /// Takes our end. Events go to `events` with their descriptors; its sender is dropped
    /// when the VMM closes the socket.
    pub(super) fn new(
        socket: OwnedFd,
        events: mpsc::UnboundedSender<(Event, Vec<OwnedFd>)>,
    ) -> io::Result<Self> {
        let socket = Arc::new(crate::process::watch(socket, Interest::READABLE | Interest::WRITABLE)?);
        let waiting = Waiting::default();
        let reader = tokio::spawn(read(Arc::clone(&socket), Arc::clone(&waiting), events));
        Ok(Self { socket, next: AtomicU64::new(1), waiting, reader })
    }

    /// One call, with the descriptors that it names by position.
    pub(super) async fn call(&self, call: Call, fds: &[RawFd]) -> Result<Reply, CallError> {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let packet =
            serde_json::to_vec(&Request { id, call }).map_err(|error| CallError::Io(error.into()))?;
        if packet.len() > MAX_MESSAGE || fds.len() > MAX_FDS {
            return Err(CallError::Io(io::Error::new(
                io::ErrorKind::InvalidInput,
                "control message too large",
            )));
        }
        let (sender, answer) = oneshot::channel();
        lock(&self.waiting).insert(id, sender);
        let sent = self
            .socket
            .async_io(Interest::WRITABLE, |socket| {
                let rights = [ControlMessage::ScmRights(fds)];
                let rights = if fds.is_empty() { &rights[..0] } else { &rights[..] };
                let flags = MsgFlags::MSG_NOSIGNAL;
                sendmsg::<()>(socket.as_raw_fd(), &[IoSlice::new(&packet)], rights, flags, None)
                    .map_err(io::Error::from)
            })
            .await;
        if let Err(error) = sent {
            lock(&self.waiting).remove(&id);
            return Err(match error.kind() {
                io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => CallError::Closed,
                _ => CallError::Io(error),
            });
        }
        if self.reader.is_finished() {
            // The end of the socket came before our entry did.
            lock(&self.waiting).remove(&id);
        }
        answer.await.map_err(|_| CallError::Closed)?.map_err(CallError::Refused)
    }
}

impl Drop for Control {
    fn drop(&mut self) {
        self.reader.abort();
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

async fn read(
    socket: Arc<AsyncFd<OwnedFd>>,
    waiting: Waiting,
    events: mpsc::UnboundedSender<(Event, Vec<OwnedFd>)>,
) {
    let mut buffer = vec![0; MAX_MESSAGE];
    loop {
        let received =
            socket.async_io(Interest::READABLE, |socket| receive(socket.as_raw_fd(), &mut buffer)).await;
        let Ok((length, fds)) = received else { break };
        if length == 0 {
            break;
        }
        match serde_json::from_slice::<Message>(&buffer[..length]) {
            Ok(Message::Response { id, result }) => {
                if let Some(sender) = lock(&waiting).remove(&id) {
                    let _ = sender.send(result);
                }
            }
            Ok(Message::Event(event)) => {
                let _ = events.send((event, fds));
            }
            // A VMM that does not speak the protocol is of no use.
            Err(_) => break,
        }
    }
    lock(&waiting).clear();
}

fn receive(socket: RawFd, buffer: &mut [u8]) -> io::Result<(usize, Vec<OwnedFd>)> {
    let mut space = cmsg_space!([RawFd; MAX_FDS]);
    let mut slices = [IoSliceMut::new(buffer)];
    let flags = MsgFlags::MSG_CMSG_CLOEXEC | MsgFlags::MSG_DONTWAIT;
    let message = recvmsg::<()>(socket, &mut slices, Some(&mut space), flags)?;
    let mut fds = Vec::new();
    for control in message.cmsgs().map_err(io::Error::from)? {
        if let ControlMessageOwned::ScmRights(rights) = control {
            fds.extend(crate::process::adopt(rights));
        }
    }
    if message.flags.contains(MsgFlags::MSG_TRUNC) {
        return Err(Errno::EMSGSIZE.into());
    }
    Ok((message.bytes, fds))
}

#[cfg(test)]
mod tests {
    use spore_vmm::api::FailureCode;

    use super::*;

    fn send(socket: &OwnedFd, message: &Message, fds: &[RawFd]) {
        let packet = serde_json::to_vec(message).unwrap();
        let rights = [ControlMessage::ScmRights(fds)];
        let rights = if fds.is_empty() { &rights[..0] } else { &rights[..] };
        sendmsg::<()>(socket.as_raw_fd(), &[IoSlice::new(&packet)], rights, MsgFlags::empty(), None).unwrap();
    }

    fn next_request(socket: &OwnedFd) -> (Request, usize) {
        let mut buffer = vec![0; MAX_MESSAGE];
        let mut poll = [nix::poll::PollFd::new(socket.as_fd(), nix::poll::PollFlags::POLLIN)];
        assert_eq!(nix::poll::poll(&mut poll, 10_000u16).unwrap(), 1);
        let (length, fds) = receive(socket.as_raw_fd(), &mut buffer).unwrap();
        (serde_json::from_slice(&buffer[..length]).unwrap(), fds.len())
    }

    #[tokio::test]
    async fn calls_carry_descriptors_and_the_end_of_the_vmm_fails_them() {
        let (ours, theirs) = pair().unwrap();
        let (sender, mut events) = mpsc::unbounded_channel();
        let control = Control::new(ours, sender).unwrap();
        let vmm = std::thread::spawn(move || {
            let (request, fds) = next_request(&theirs);
            assert_eq!((request.call, fds), (Call::Boot, 2));
            let (stream, _peer) = std::os::unix::net::UnixStream::pair().unwrap();
            send(&theirs, &Message::Event(Event::GuestConnection { port: 1024 }), &[stream.as_raw_fd()]);
            send(&theirs, &Message::Response { id: request.id, result: Ok(Reply::Done) }, &[]);
            let (request, _) = next_request(&theirs);
            let failure = Failure { code: FailureCode::WrongState, message: "no".into() };
            send(&theirs, &Message::Response { id: request.id, result: Err(failure) }, &[]);
            next_request(&theirs);
        });
        let null = std::fs::File::open("/dev/null").unwrap();
        let fds = [null.as_raw_fd(), null.as_raw_fd()];
        assert_eq!(control.call(Call::Boot, &fds).await.unwrap(), Reply::Done);
        let (event, fds) = events.recv().await.unwrap();
        assert_eq!((event, fds.len()), (Event::GuestConnection { port: 1024 }, 1));
        assert!(
            matches!(control.call(Call::State, &[]).await, Err(CallError::Refused(f)) if f.message == "no")
        );
        assert!(matches!(control.call(Call::State, &[]).await, Err(CallError::Closed)));
        assert!(events.recv().await.is_none());
        vmm.join().unwrap();
        assert!(matches!(control.call(Call::State, &[]).await, Err(CallError::Closed)));
    }
}
