//! One stream between a guest port and a Unix socket of the host: credit (5.10.6.3) and
//! half-close (5.10.6.6) in both directions.

use std::collections::VecDeque;
use std::io::{ErrorKind, IoSlice};
use std::net::Shutdown;
use std::sync::Arc;

use super::metrics::Counters;
use super::spec::{
    BUF_ALLOC, CREDIT_STEP, HOST_CID, Header, MAX_PAYLOAD, SHUTDOWN_RCV, SHUTDOWN_SEND, TYPE_STREAM, op,
};
use crate::backend::unix_socket::Stream;
use crate::devices::virtio::queue::Buffers;

/// Names a connection; unique among those that the guest knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Key {
    pub(super) host_port: u32,
    pub(super) guest_port: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Phase {
    /// A host client that has not said where to. The guest knows nothing.
    Greeting,
    /// REQUEST is on its way to the guest, or its answer to us.
    Connecting,
    Open,
    /// The guest is done with it; its last bytes are on their way to the host peer.
    Draining,
}

/// The guest has used more than its credit.
#[derive(Debug)]
pub(super) struct Overrun;

/// Bytes of the guest that the host peer has not taken, counted for the device as a whole.
#[derive(Debug)]
struct Backlog {
    bytes: VecDeque<u8>,
    counters: Arc<Counters>,
}

impl Backlog {
    fn extend(&mut self, bytes: &[u8]) {
        self.bytes.extend(bytes);
        self.counters.add_unsent(bytes.len());
    }

    fn take(&mut self, count: usize) {
        self.bytes.drain(..count);
        self.counters.subtract_unsent(count);
        if self.bytes.is_empty() {
            self.bytes.shrink_to(0);
        }
    }

    fn len(&self) -> usize {
        self.bytes.len()
    }

    fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }
}

impl Drop for Backlog {
    fn drop(&mut self) {
        self.counters.subtract_unsent(self.len());
    }
}

#[derive(Debug)]
pub(super) struct Connection {
    pub(super) stream: Stream,
    pub(super) phase: Phase,
    pub(super) key: Key,
    /// Opened by the guest.
    pub(super) from_guest: bool,
    /// It stands in the muxer's list of those that have something for the guest.
    pub(super) queued: bool,

    /// Host → guest: the socket may have bytes or its end to read.
    readable: bool,
    /// The host peer sends no more; all it sent is with the guest.
    host_ended: bool,
    guest_receives: bool,
    sent: u32,
    guest_alloc: u32,
    guest_forwarded: u32,
    /// CREDIT_REQUEST was sent since the guest's window closed.
    credit_asked: bool,

    /// Guest → host: the socket may take bytes.
    writable: bool,
    /// The host peer receives no more; what the guest sends is dropped.
    host_deaf: bool,
    guest_sends: bool,
    /// The host peer has been shown the guest's end. Once only: showing it wakes the poller.
    end_shown: bool,
    buffer: Backlog,
    forwarded: u32,
    forwarded_told: u32,

    owes_request: bool,
    owes_response: bool,
    owes_credit: bool,
    shutdown_sent: u32,
}

impl Connection {
    fn new(stream: Stream, phase: Phase, key: Key, from_guest: bool, counters: Arc<Counters>) -> Self {
        Self {
            stream,
            phase,
            key,
            from_guest,
            queued: false,
            readable: true,
            host_ended: false,
            guest_receives: true,
            sent: 0,
            guest_alloc: 0,
            guest_forwarded: 0,
            credit_asked: false,
            writable: true,
            host_deaf: false,
            guest_sends: true,
            end_shown: false,
            buffer: Backlog { bytes: VecDeque::new(), counters },
            forwarded: 0,
            forwarded_told: 0,
            owes_request: false,
            owes_response: false,
            owes_credit: false,
            shutdown_sent: 0,
        }
    }

    /// A host client just accepted.
    pub(super) fn greeting(stream: Stream, counters: Arc<Counters>) -> Self {
        Self::new(stream, Phase::Greeting, Key { host_port: 0, guest_port: 0 }, false, counters)
    }

    /// The guest asked for it, and gets its answer.
    pub(super) fn accepted(stream: Stream, key: Key, request: &Header, counters: Arc<Counters>) -> Self {
        let mut connection = Self::new(stream, Phase::Open, key, true, counters);
        connection.owes_response = true;
        connection.update_credit(request);
        connection
    }

    /// The host client named a guest port.
    pub(super) fn connect(&mut self, key: Key) {
        self.key = key;
        self.phase = Phase::Connecting;
        self.owes_request = true;
    }

    /// The guest accepted. False when the host client cannot be told so any more.
    pub(super) fn established(&mut self) -> bool {
        self.phase = Phase::Open;
        let line = format!("OK {}\n", self.key.host_port);
        // Nothing was sent before, so the socket has room for all of it.
        matches!(self.stream.send(&[IoSlice::new(line.as_bytes())]), Ok(sent) if sent == line.len())
    }

    /// Every packet of the guest carries its credit.
    pub(super) fn update_credit(&mut self, header: &Header) {
        self.guest_alloc = header.buf_alloc;
        self.guest_forwarded = header.fwd_cnt;
        if self.credit() > 0 {
            self.credit_asked = false;
        }
    }

    pub(super) fn owe_credit(&mut self) {
        self.owes_credit = true;
    }

    /// Bytes that the guest has room for.
    fn credit(&self) -> u32 {
        self.guest_alloc.saturating_sub(self.sent.wrapping_sub(self.guest_forwarded))
    }

    /// Notes what the poller saw.
    pub(super) fn note(&mut self, readable: bool, writable: bool) {
        self.readable |= readable;
        self.writable |= writable;
    }

    /// Whether the socket has bytes that the guest could take, or could be asked for.
    fn wants_data(&self) -> bool {
        self.phase == Phase::Open
            && self.readable
            && !self.host_ended
            && self.guest_receives
            && (self.credit() > 0 || !self.credit_asked)
    }

    /// Shutdown flags that the guest has not heard of.
    fn shutdown_due(&self) -> u32 {
        if self.phase != Phase::Open {
            return 0;
        }
        let mut flags = 0;
        if self.host_ended {
            flags |= SHUTDOWN_SEND;
        }
        if self.host_deaf {
            flags |= SHUTDOWN_RCV;
        }
        if flags & !self.shutdown_sent == 0 { 0 } else { flags }
    }

    /// Whether [`Self::produce`] may have a packet.
    pub(super) fn wants_guest(&self) -> bool {
        self.phase != Phase::Draining
            && (self.owes_request
                || self.owes_response
                || self.owes_credit
                || self.wants_data()
                || self.shutdown_due() != 0)
    }

    fn header(&mut self, guest_cid: u64, op: u16) -> Header {
        self.forwarded_told = self.forwarded;
        self.owes_credit = false;
        Header {
            src_cid: HOST_CID,
            dst_cid: guest_cid,
            src_port: self.key.host_port,
            dst_port: self.key.guest_port,
            len: 0,
            kind: TYPE_STREAM,
            op,
            flags: 0,
            buf_alloc: BUF_ALLOC,
            fwd_cnt: self.forwarded,
        }
    }

    /// The next packet for the guest, its payload already in `room` (at least one byte).
    pub(super) fn produce(&mut self, guest_cid: u64, room: &Buffers<'_>) -> Option<Header> {
        if self.phase == Phase::Draining {
            return None;
        }
        if std::mem::take(&mut self.owes_request) {
            return Some(self.header(guest_cid, op::REQUEST));
        }
        if std::mem::take(&mut self.owes_response) {
            return Some(self.header(guest_cid, op::RESPONSE));
        }
        if self.wants_data() {
            if self.credit() == 0 {
                self.credit_asked = true;
                return Some(self.header(guest_cid, op::CREDIT_REQUEST));
            }
            let count = self.receive(room);
            if count > 0 {
                self.sent = self.sent.wrapping_add(count);
                return Some(Header { len: count, ..self.header(guest_cid, op::RW) });
            }
        }
        let flags = self.shutdown_due();
        if flags != 0 {
            self.shutdown_sent |= flags;
            return Some(Header { flags, ..self.header(guest_cid, op::SHUTDOWN) });
        }
        self.owes_credit.then(|| self.header(guest_cid, op::CREDIT_UPDATE))
    }

    /// Reads from the socket into the guest's buffer, within credit; 0 when there is nothing.
    fn receive(&mut self, room: &Buffers<'_>) -> u32 {
        let limit = MAX_PAYLOAD.min(self.credit() as usize);
        match self.stream.receive(room.range(0, limit).slices()) {
            Ok(0) => self.host_ended = true,
            // At most MAX_PAYLOAD.
            Ok(count) => return u32::try_from(count).unwrap_or(u32::MAX),
            Err(error) if error.kind() == ErrorKind::WouldBlock => self.readable = false,
            // The peer is gone, and what it had sent was read before.
            Err(_) => {
                self.host_ended = true;
                self.deafen();
            }
        }
        0
    }

    /// Takes a payload from the guest.
    pub(super) fn consume(&mut self, data: &Buffers<'_>) -> Result<(), Overrun> {
        if self.buffer.len() + data.len() > BUF_ALLOC as usize || !self.guest_sends {
            return Err(Overrun);
        }
        let mut done = 0;
        while done < data.len() && self.buffer.is_empty() && self.writable && !self.host_deaf {
            match self.stream.send_volatile(data.range(done, usize::MAX).slices()) {
                Ok(count) => {
                    done += count;
                    self.forward(count);
                }
                Err(error) => self.send_failed(&error),
            }
        }
        if self.host_deaf {
            self.forward(data.len() - done);
            return Ok(());
        }
        let mut chunk = [0; 4096];
        while done < data.len() {
            let count = data.read_at(done, &mut chunk);
            if count == 0 {
                break;
            }
            self.buffer.extend(&chunk[..count]);
            done += count;
        }
        Ok(())
    }

    fn send_failed(&mut self, error: &std::io::Error) {
        if error.kind() == ErrorKind::WouldBlock {
            self.writable = false;
        } else {
            self.deafen();
        }
    }

    /// The host peer receives no more: what waits for it is dropped, as consumed.
    fn deafen(&mut self) {
        self.host_deaf = true;
        let dropped = self.buffer.len();
        self.buffer.take(dropped);
        self.forward(dropped);
    }

    /// `count` bytes of the guest left our hands.
    fn forward(&mut self, count: usize) {
        // At most BUF_ALLOC.
        self.forwarded = self.forwarded.wrapping_add(u32::try_from(count).unwrap_or(u32::MAX));
        if self.forwarded.wrapping_sub(self.forwarded_told) >= CREDIT_STEP {
            self.owes_credit = true;
        }
    }

    /// Sends what waits for the host peer, as far as the socket takes it. `closed` says that
    /// the poller saw the peer gone.
    pub(super) fn flush(&mut self, closed: bool) {
        while !self.buffer.is_empty() && self.writable && !self.host_deaf {
            let (front, back) = self.buffer.bytes.as_slices();
            match self.stream.send(&[IoSlice::new(front), IoSlice::new(back)]) {
                Ok(count) => {
                    self.buffer.take(count);
                    self.forward(count);
                }
                Err(error) => self.send_failed(&error),
            }
        }
        if self.buffer.is_empty() {
            if closed && self.guest_sends {
                self.deafen();
            } else if !self.guest_sends && !self.end_shown {
                self.end_shown = true;
                self.stream.shutdown(Shutdown::Write);
            }
        }
    }

    /// Nothing of the guest is on its way to the host peer.
    pub(super) fn drained(&self) -> bool {
        self.buffer.is_empty()
    }

    /// The guest shut directions; true when it has now shut both.
    pub(super) fn guest_shutdown(&mut self, flags: u32) -> bool {
        if flags & SHUTDOWN_RCV != 0 && self.guest_receives {
            self.guest_receives = false;
            self.stream.shutdown(Shutdown::Read);
        }
        if flags & SHUTDOWN_SEND != 0 && self.guest_sends {
            self.guest_sends = false;
            self.flush(false);
        }
        !self.guest_receives && !self.guest_sends
    }
}
