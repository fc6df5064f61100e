//! One socket to the file server, and the request that is under way on it.

use std::io;
use std::os::fd::{AsRawFd, RawFd};

use super::spec::{self, IN_HEADER, MAX_MESSAGE, OUT_HEADER};
use crate::backend::unix_socket::Stream;
use crate::devices::virtio::Watch;
use crate::devices::virtio::queue::HeldChain;
use crate::memory::GuestRam;

/// Where the rest of a reply goes that the guest has no room for.
const DISCARD: usize = 16 * 1024;

/// A request that was sent, or is being sent.
struct Work {
    queue: u16,
    chain: HeldChain,
    header: [u8; IN_HEADER],
    length: usize,
    sent: usize,
    reply: [u8; OUT_HEADER],
    received: usize,
}

/// A request whose answer is in guest memory.
pub(super) struct Done {
    pub(super) queue: u16,
    pub(super) head: u16,
    /// Bytes of the chain's writable part.
    pub(super) written: usize,
}

/// A request that the server will not answer.
pub(super) struct Orphan {
    pub(super) queue: u16,
    pub(super) chain: HeldChain,
    pub(super) header: [u8; IN_HEADER],
}

pub(super) struct Connection {
    stream: Stream,
    work: Option<Work>,
}

impl Connection {
    pub(super) fn new(stream: Stream) -> Self {
        Self { stream, work: None }
    }

    pub(super) fn fd(&self) -> RawFd {
        self.stream.as_raw_fd()
    }

    pub(super) fn is_idle(&self) -> bool {
        self.work.is_none()
    }

    /// What is waited for: always an answer or the server's end, and room while sending.
    pub(super) fn watch(&self) -> Watch {
        let writable = self.work.as_ref().is_some_and(|work| work.sent < work.length);
        Watch { fd: self.fd(), readable: true, writable }
    }

    /// Takes a request up; `header` is its own, `length` all that the guest wrote of it.
    pub(super) fn begin(&mut self, queue: u16, chain: HeldChain, header: [u8; IN_HEADER], length: usize) {
        let header = spec::with_length(header, length);
        let reply = [0; OUT_HEADER];
        self.work = Some(Work { queue, chain, header, length, sent: 0, reply, received: 0 });
    }

    /// Gives the request under way up.
    pub(super) fn abandon(&mut self) -> Option<Orphan> {
        self.work.take().map(|Work { queue, chain, header, .. }| Orphan { queue, chain, header })
    }

    /// Moves what can be moved now; the request when it is answered. After an error the
    /// connection is of no more use.
    pub(super) fn progress(&mut self, memory: &GuestRam) -> io::Result<Option<Done>> {
        let Some(work) = &mut self.work else { return later(self.unasked()).map(|()| None) };
        if work.sent < work.length {
            return later(work.send(&self.stream, memory)).map(|()| None);
        }
        let written = later(work.receive(&self.stream, memory).map(Some))?;
        Ok(written.and_then(|written| {
            let Work { queue, chain, .. } = self.work.take()?;
            Some(Done { queue, head: chain.head(), written })
        }))
    }

    /// An idle socket is ready to be read: the server has gone, or says what nobody asked.
    fn unasked(&self) -> io::Result<()> {
        match self.stream.peek(&mut [0])? {
            0 => Err(io::ErrorKind::UnexpectedEof.into()),
            _ => Err(invalid("an answer that nothing was asked for".into())),
        }
    }
}

impl Work {
    fn send(&mut self, stream: &Stream, memory: &GuestRam) -> io::Result<()> {
        let chain = self.chain.resolve(memory);
        while self.sent < self.length {
            let head = &self.header[self.sent.min(IN_HEADER)..];
            let from = self.sent.max(IN_HEADER);
            let rest = chain.readable.range(from, self.length - from);
            match stream.send_after(head, rest.slices())? {
                0 => return Err(io::ErrorKind::WriteZero.into()),
                sent => self.sent += sent,
            }
        }
        Ok(())
    }

    /// Receives the reply; the bytes that the guest has of it when it is whole.
    fn receive(&mut self, stream: &Stream, memory: &GuestRam) -> io::Result<usize> {
        let chain = self.chain.resolve(memory);
        let room = chain.writable.len();
        let mut surplus = Vec::new();
        loop {
            let wanted = if self.received < OUT_HEADER { MAX_MESSAGE } else { self.checked_length()? };
            if self.received >= wanted {
                break;
            }
            let head = &mut self.reply[self.received.min(OUT_HEADER)..];
            let from = self.received.max(OUT_HEADER);
            let rest = chain.writable.range(from, wanted - from);
            let received = if head.is_empty() && rest.is_empty() {
                surplus.resize(DISCARD, 0);
                let len = (wanted - from).min(DISCARD);
                stream.take(&mut surplus[..len])?
            } else {
                stream.receive_after(head, rest.slices())?
            };
            if received == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            self.received += received;
        }
        if self.received > self.checked_length()? {
            return Err(invalid(format!(
                "{} bytes for a reply of {}",
                self.received,
                self.checked_length()?
            )));
        }
        if self.received > room && room >= OUT_HEADER {
            self.reply = spec::error_reply(&self.header, libc::EIO);
            self.received = OUT_HEADER;
        }
        chain.writable.write_at(0, &self.reply);
        Ok(self.received.min(room))
    }

    fn checked_length(&self) -> io::Result<usize> {
        let length = spec::reply_length(&self.reply);
        match (OUT_HEADER..=MAX_MESSAGE).contains(&length) {
            true => Ok(length),
            false => {
                Err(invalid(format!("a reply of {length} bytes; {OUT_HEADER} to {MAX_MESSAGE} are allowed")))
            }
        }
    }
}

/// "Not now" is no error.
fn later<T: Default>(moved: io::Result<T>) -> io::Result<T> {
    match moved {
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(T::default()),
        other => other,
    }
}

fn invalid(detail: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, detail)
}
