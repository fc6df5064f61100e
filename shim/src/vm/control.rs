//! The shim's end of the control socket: requests with descriptors out, responses and
//! events in. One reader task; calls may overlap.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, socketpair};
use spore_vmm::api::{Call, Event, Failure, MAX_FDS, MAX_MESSAGE, Message, Reply, Request};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::{mpsc, oneshot};

use crate::packets;

/// Why a call got no reply.
#[derive(Debug)]
pub(super) enum CallError {
    /// The VMM closed the socket.
    Closed,
    Io(io::Error),
    Refused(Failure),
}

/// An event with its descriptors, or why the VMM is not listened to any more. Nothing follows
/// an error, nor does anything when the VMM has closed the socket.
pub(super) type Heard = io::Result<(Event, Vec<OwnedFd>)>;

/// An answer, and the descriptors that came with it.
type Answer = Result<(Reply, Vec<OwnedFd>), Failure>;
type Waiting = Arc<Mutex<HashMap<u64, oneshot::Sender<Answer>>>>;

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
    /// Takes our end. Events go to `events`; its sender is dropped when nothing can follow.
    pub(super) fn new(socket: OwnedFd, events: mpsc::UnboundedSender<Heard>) -> io::Result<Self> {
        let socket = Arc::new(crate::process::watch(socket, Interest::READABLE | Interest::WRITABLE)?);
        let waiting = Waiting::default();
        let reader = tokio::spawn(read(Arc::clone(&socket), Arc::clone(&waiting), events));
        Ok(Self { socket, next: AtomicU64::new(1), waiting, reader })
    }

    /// One call, with the descriptors that it names by position.
    pub(super) async fn call(&self, call: Call, fds: &[RawFd]) -> Result<Reply, CallError> {
        self.exchange(call, fds).await.map(|(reply, _)| reply)
    }

    /// As [`Self::call`], with the descriptors of the answer.
    pub(super) async fn exchange(
        &self,
        call: Call,
        fds: &[RawFd],
    ) -> Result<(Reply, Vec<OwnedFd>), CallError> {
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
            .async_io(Interest::WRITABLE, |socket| packets::send(socket.as_raw_fd(), &packet, fds))
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

async fn read(socket: Arc<AsyncFd<OwnedFd>>, waiting: Waiting, events: mpsc::UnboundedSender<Heard>) {
    let end = hear(&socket, &waiting, &events).await;
    lock(&waiting).clear();
    if let Err(error) = end {
        let _ = events.send(Err(error));
    }
}

/// Takes messages until the VMM closes the socket.
async fn hear(
    socket: &AsyncFd<OwnedFd>,
    waiting: &Waiting,
    events: &mpsc::UnboundedSender<Heard>,
) -> io::Result<()> {
    let mut buffer = vec![0; MAX_MESSAGE];
    loop {
        let receive =
            |socket: &OwnedFd| packets::receive(socket.as_raw_fd(), &mut buffer, MsgFlags::MSG_DONTWAIT);
        let received = socket.async_io(Interest::READABLE, receive).await;
        let (length, fds) = match received {
            // A VMM that closed the socket with a request of ours unread: the kernel says that
            // once, and before what the VMM had sent.
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => continue,
            received => received?,
        };
        if length == 0 {
            return Ok(());
        }
        match parse(&buffer[..length])? {
            Message::Response { id, result } => {
                if let Some(sender) = lock(waiting).remove(&id) {
                    let _ = sender.send(result.map(|reply| (reply, fds)));
                }
            }
            Message::Event(event) => drop(events.send(Ok((event, fds)))),
        }
    }
}

/// The error does not repeat the message, which is not for people.
fn parse(packet: &[u8]) -> io::Result<Message> {
    serde_json::from_slice(packet).map_err(|error| {
        let (kind, column) = (error.classify(), error.column());
        let detail = format!("a message of {} bytes: {kind:?} error at byte {column}", packet.len());
        io::Error::new(io::ErrorKind::InvalidData, detail)
    })
}

#[cfg(test)]
mod tests {
    use spore_vmm::api::{EndReason, FailureCode};

    use super::*;

    fn send(socket: &OwnedFd, message: &Message, fds: &[RawFd]) {
        let packet = serde_json::to_vec(message).unwrap();
        packets::send(socket.as_raw_fd(), &packet, fds).unwrap();
    }

    fn next_request(socket: &OwnedFd) -> (Request, usize) {
        let mut buffer = vec![0; MAX_MESSAGE];
        let mut poll = [nix::poll::PollFd::new(socket.as_fd(), nix::poll::PollFlags::POLLIN)];
        assert_eq!(nix::poll::poll(&mut poll, 10_000u16).unwrap(), 1);
        let (length, fds) =
            packets::receive(socket.as_raw_fd(), &mut buffer, MsgFlags::MSG_DONTWAIT).unwrap();
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
        let (event, fds) = events.recv().await.unwrap().unwrap();
        assert_eq!((event, fds.len()), (Event::GuestConnection { port: 1024 }, 1));
        assert!(
            matches!(control.call(Call::State, &[]).await, Err(CallError::Refused(f)) if f.message == "no")
        );
        assert!(matches!(control.call(Call::State, &[]).await, Err(CallError::Closed)));
        assert!(events.recv().await.is_none());
        vmm.join().unwrap();
        assert!(matches!(control.call(Call::State, &[]).await, Err(CallError::Closed)));
    }

    #[tokio::test]
    async fn a_message_that_cannot_be_read_fails_the_calls_and_is_told() {
        let (ours, theirs) = pair().unwrap();
        let (sender, mut events) = mpsc::unbounded_channel();
        let control = Control::new(ours, sender).unwrap();
        let vmm = std::thread::spawn(move || {
            next_request(&theirs);
            let packet = b"{\"event\":\"sing\"}";
            packets::send(theirs.as_raw_fd(), packet, &[]).unwrap();
            theirs
        });
        assert!(matches!(control.call(Call::Boot, &[]).await, Err(CallError::Closed)));
        let error = events.recv().await.unwrap().unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
        assert!(events.recv().await.is_none());
        let _open = vmm.join().unwrap();
        assert!(matches!(control.call(Call::State, &[]).await, Err(CallError::Closed)), "it lives on");
    }

    #[tokio::test]
    async fn the_last_words_are_heard_though_a_request_was_left_unread() {
        let (ours, theirs) = pair().unwrap();
        packets::send(ours.as_raw_fd(), b"never read", &[]).unwrap();
        send(&theirs, &Message::Event(Event::Ended(EndReason::Reset)), &[]);
        drop(theirs);
        let (sender, mut events) = mpsc::unbounded_channel();
        let _control = Control::new(ours, sender).unwrap();
        let (words, _) = events.recv().await.unwrap().unwrap();
        assert_eq!(words, Event::Ended(EndReason::Reset));
        assert!(events.recv().await.is_none());
    }
}
