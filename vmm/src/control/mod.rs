//! The control socket: packets with descriptors in, packets with descriptors out.
//!
//! [`socket`] moves packets; [`fds`] makes sure that every descriptor which arrived is used
//! once or closed; [`Channel`] speaks the types of [`crate::api`]; [`server`] is the event loop
//! that obeys them, [`disk_work`] what it leaves to other threads, [`zygote`] a VM from which others are forked.

pub mod client;
mod disk_work;
mod fds;
pub mod server;
pub mod socket;
mod zygote;

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

pub use fds::{FdError, FdTable};
use socket::{Packet, Socket, SocketError};

use crate::api::{Event, Failure, FailureCode, Message, Reply, Request};

/// Messages that may wait for a peer that does not read. One that lets this many pile up is
/// treated as gone.
const MAX_WAITING: usize = 1024;

/// A packet that is not a request. Answered with the id that it carries, or 0.
#[derive(Debug, thiserror::Error)]
pub enum RequestError {
    #[error("control message: {found} bytes or more; at most {max} are allowed")]
    TooLong { found: usize, max: usize },
    #[error(
        "control message: more than {max} descriptors are attached, or more than the limit of open files (RLIMIT_NOFILE) allows"
    )]
    TooManyFds { max: usize },
    #[error("control message: not a request of protocol {version}: {source}", version = crate::api::PROTOCOL_VERSION)]
    Malformed { id: u64, source: serde_json::Error },
}

impl RequestError {
    pub fn id(&self) -> u64 {
        match self {
            Self::Malformed { id, .. } => *id,
            Self::TooLong { .. } | Self::TooManyFds { .. } => 0,
        }
    }

    pub fn failure(&self) -> Failure {
        Failure { code: FailureCode::InvalidArgument, message: self.to_string() }
    }
}

/// What came in.
#[derive(Debug)]
pub enum Incoming {
    Request(Request, FdTable),
    Bad(RequestError),
    /// Nothing to read now.
    Nothing,
    /// The peer closed its end.
    HungUp,
}

/// Packets that the peer has not taken yet, oldest first.
type Waiting = VecDeque<(Vec<u8>, Option<OwnedFd>)>;

/// The VMM's end of the control socket. Cheap to clone; clones share the queue of messages
/// that the peer has not taken yet.
#[derive(Debug, Clone)]
pub struct Channel {
    socket: Arc<Socket>,
    waiting: Arc<Mutex<Waiting>>,
}

impl Channel {
    pub fn new(socket: Socket) -> Self {
        Self { socket: Arc::new(socket), waiting: Arc::default() }
    }

    /// Takes over an inherited descriptor by number.
    pub fn inherit(fd: RawFd) -> Result<Self, SocketError> {
        Socket::inherit(fd).map(Self::new)
    }

    /// Reads one packet without waiting.
    pub fn receive(&self) -> Result<Incoming, SocketError> {
        Ok(match self.socket.receive()? {
            Packet::Data { bytes, fds } => match decode(&bytes) {
                Ok(request) => Incoming::Request(request, FdTable::new(fds)),
                Err(error) => Incoming::Bad(error),
            },
            Packet::TooLong => {
                let max = crate::api::MAX_MESSAGE;
                Incoming::Bad(RequestError::TooLong { found: max + 1, max })
            }
            Packet::TooManyFds => Incoming::Bad(RequestError::TooManyFds { max: crate::api::MAX_FDS }),
            Packet::Nothing => Incoming::Nothing,
            Packet::HungUp => Incoming::HungUp,
        })
    }

    pub fn respond(&self, id: u64, result: Result<Reply, Failure>) -> Result<(), SocketError> {
        self.send(&Message::Response { id, result }, None)
    }

    /// A successful answer with a descriptor.
    pub fn respond_with(&self, id: u64, reply: Reply, fd: OwnedFd) -> Result<(), SocketError> {
        self.send(&Message::Response { id, result: Ok(reply) }, Some(fd))
    }

    pub fn event(&self, event: Event, fd: Option<OwnedFd>) -> Result<(), SocketError> {
        self.send(&Message::Event(event), fd)
    }

    fn send(&self, message: &Message, fd: Option<OwnedFd>) -> Result<(), SocketError> {
        let bytes =
            serde_json::to_vec(message).map_err(|error| SocketError::Send(io::Error::other(error)))?;
        let mut waiting = self.waiting();
        if waiting.len() >= MAX_WAITING {
            return Err(SocketError::PeerStalled { waiting: waiting.len() });
        }
        waiting.push_back((bytes, fd));
        self.flush_locked(&mut waiting)
    }

    /// Sends what waits, as far as the peer takes it.
    pub fn flush(&self) -> Result<(), SocketError> {
        self.flush_locked(&mut self.waiting())
    }

    /// Whether [`Self::flush`] should be called once the socket is writable.
    pub fn has_waiting(&self) -> bool {
        !self.waiting().is_empty()
    }

    /// Messages that the peer has not taken.
    fn waiting_count(&self) -> usize {
        self.waiting().len()
    }

    fn flush_locked(&self, waiting: &mut Waiting) -> Result<(), SocketError> {
        while let Some((bytes, fd)) = waiting.front() {
            if !self.socket.send(bytes, fd.as_ref())? {
                break;
            }
            waiting.pop_front();
        }
        Ok(())
    }

    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl AsRawFd for Channel {
    fn as_raw_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }
}

fn decode(bytes: &[u8]) -> Result<Request, RequestError> {
    serde_json::from_slice(bytes).map_err(|source| {
        // Answer the call that the peer meant, if the packet still says which.
        let id = serde_json::from_slice::<serde_json::Value>(bytes).ok();
        let id = id.and_then(|value| value.get("id").and_then(serde_json::Value::as_u64)).unwrap_or(0);
        RequestError::Malformed { id, source }
    })
}

#[cfg(test)]
mod tests;
