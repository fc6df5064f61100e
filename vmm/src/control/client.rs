//! The peer's side of the control socket, blocking: for `spore-vmm run` and for tests.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::socket::{Packet, Socket, SocketError, send_with};
use crate::api::{Call, Event, Failure, Message, Reply, Request};

#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    #[error(transparent)]
    Socket(#[from] SocketError),
    #[error("the VMM closed the control socket")]
    HungUp,
    #[error("the VMM sent something that is not a message: {0}")]
    Malformed(String),
    #[error("the VMM did not answer within {0:?}")]
    Timeout(Duration),
    #[error("waiting for the VMM: {0}")]
    Wait(#[source] nix::Error),
}

/// Calls a VMM. Events that arrive in between are kept for [`Self::event`].
#[derive(Debug)]
pub struct Client {
    socket: Socket,
    next_id: u64,
    events: VecDeque<(Event, Option<OwnedFd>)>,
}

impl Client {
    pub fn new(socket: Socket) -> Self {
        Self { socket, next_id: 1, events: VecDeque::new() }
    }

    /// Sends a call with its descriptors and waits for the answer.
    pub fn call(
        &mut self,
        call: Call,
        fds: &[BorrowedFd<'_>],
        patience: Duration,
    ) -> Result<Result<Reply, Failure>, ClientError> {
        let deadline = Instant::now() + patience;
        let request = Request { id: self.next_id, call };
        self.next_id += 1;
        let bytes =
            serde_json::to_vec(&request).map_err(|error| ClientError::Malformed(error.to_string()))?;
        while !send_with(self.socket.as_fd(), &bytes, fds)? {
            self.wait(PollFlags::POLLOUT, deadline, patience)?;
        }
        loop {
            match self.receive()? {
                Some((Message::Response { id, result }, _)) if id == request.id => return Ok(result),
                Some((Message::Response { id, .. }, _)) => {
                    return Err(ClientError::Malformed(format!(
                        "an answer to request {id}, which was not asked"
                    )));
                }
                Some((Message::Event(event), fd)) => self.events.push_back((event, fd)),
                None => self.wait(PollFlags::POLLIN, deadline, patience)?,
            }
        }
    }

    /// The next event that has arrived, without waiting.
    pub fn try_event(&mut self) -> Result<Option<(Event, Option<OwnedFd>)>, ClientError> {
        if let Some(event) = self.events.pop_front() {
            return Ok(Some(event));
        }
        match self.receive()? {
            Some((Message::Event(event), fd)) => Ok(Some((event, fd))),
            Some((Message::Response { id, .. }, _)) => {
                Err(ClientError::Malformed(format!("an answer to request {id}, which was not asked")))
            }
            None => Ok(None),
        }
    }

    /// Waits for the next event.
    pub fn event(&mut self, patience: Duration) -> Result<(Event, Option<OwnedFd>), ClientError> {
        let deadline = Instant::now() + patience;
        loop {
            match self.try_event()? {
                Some(event) => return Ok(event),
                None => self.wait(PollFlags::POLLIN, deadline, patience)?,
            }
        }
    }

    fn receive(&self) -> Result<Option<(Message, Option<OwnedFd>)>, ClientError> {
        match self.socket.receive()? {
            Packet::Data { bytes, fds } => {
                let message = serde_json::from_slice(&bytes);
                let message = message.map_err(|error| ClientError::Malformed(error.to_string()))?;
                Ok(Some((message, fds.into_iter().next())))
            }
            Packet::Nothing => Ok(None),
            Packet::HungUp => Err(ClientError::HungUp),
            Packet::TooLong | Packet::TooManyFds => Err(ClientError::Malformed("too long a packet".into())),
        }
    }

    fn wait(&self, flags: PollFlags, deadline: Instant, patience: Duration) -> Result<(), ClientError> {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(ClientError::Timeout(patience));
        }
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        match poll(&mut [PollFd::new(self.socket.as_fd(), flags)], timeout) {
            Ok(_) | Err(nix::Error::EINTR) => Ok(()),
            Err(error) => Err(ClientError::Wait(error)),
        }
    }
}

impl AsFd for Client {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}
