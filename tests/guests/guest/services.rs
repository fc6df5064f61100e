//! What the guest offers and asks for over vsock. One loop, no blocking: every packet and
//! every byte of credit moves from here.

use crate::memory::{self, CHECKSUM_SEED, checksum};
use crate::pattern;
use crate::virtio::vsock::{
    HOST, Header, OP_CREDIT_REQUEST, OP_CREDIT_UPDATE, OP_REQUEST, OP_RESPONSE, OP_RST, OP_RW, OP_SHUTDOWN,
    SHUTDOWN_RECEIVE, SHUTDOWN_SEND, TX_PAYLOAD, Vsock,
};
use crate::{power, say};

/// Accepts and answers with a reset.
const PORT_RESET: u32 = 3;
/// Sends back what it receives, and its end.
const PORT_ECHO: u32 = 7;
/// Reads to the end, then answers `<bytes> <checksum>\n`.
const PORT_SINK: u32 = 9;
/// Accepts and reads nothing.
const PORT_STALL: u32 = 13;
/// Sends [`SOURCE_BYTES`] of the pattern with seed 19, then its end.
const PORT_SOURCE: u32 = 19;
/// Powers the machine off.
const PORT_POWER_OFF: u32 = 99;

const SOURCE_BYTES: u64 = 1024 * 1024;
/// What each connection holds, and tells the host as `buf_alloc`.
const WINDOW: usize = 64 * 1024;
const CONNECTIONS: usize = 256;

#[derive(Clone, Copy, PartialEq)]
enum State {
    Free,
    /// We asked; the host has not answered.
    Asked,
    Open,
}

#[derive(Clone, Copy)]
struct Connection {
    state: State,
    service: u32,
    local: u32,
    remote: u32,
    /// Bytes received and not yet given on: `held` of them from `start`, in `window`.
    start: usize,
    held: usize,
    window: Option<usize>,
    forwarded: u32,
    announced: u32,
    peer_buffer: u32,
    peer_forwarded: u32,
    sent: u32,
    received: u64,
    sum: u64,
    /// The host sends no more.
    ended: bool,
    /// We sent our end.
    finished: bool,
    progress: u64,
}

const FREE: Connection = Connection {
    state: State::Free,
    service: 0,
    local: 0,
    remote: 0,
    start: 0,
    held: 0,
    window: None,
    forwarded: 0,
    announced: 0,
    peer_buffer: 0,
    peer_forwarded: 0,
    sent: 0,
    received: 0,
    sum: CHECKSUM_SEED,
    ended: false,
    finished: false,
    progress: 0,
};

struct Services {
    vsock: Vsock,
    connections: [Connection; CONNECTIONS],
    windows: &'static mut [u8],
    payload: &'static mut [u8],
}

/// Serves for ever; first asks the host for a connection to each of `ports`.
pub fn serve(ports: impl Iterator<Item = u32>) -> Result<(), &'static str> {
    let vsock = Vsock::open()?;
    say!("vsock cid={}", vsock.cid);
    let mut services = Services {
        vsock,
        connections: [FREE; CONNECTIONS],
        windows: memory::allocate(CONNECTIONS * WINDOW),
        payload: memory::allocate(TX_PAYLOAD),
    };
    for (index, port) in ports.enumerate() {
        let connection = &mut services.connections[index];
        *connection = Connection {
            state: State::Asked,
            service: PORT_ECHO,
            local: 5000 + index as u32,
            remote: port,
            ..FREE
        };
        services.send(index, OP_REQUEST, 0, 0);
    }
    say!("serving");
    loop {
        services.step();
    }
}

impl Services {
    fn header(&self, index: usize, op: u16, flags: u32, len: usize) -> Header {
        let connection = &self.connections[index];
        Header {
            src_cid: self.vsock.cid,
            dst_cid: HOST,
            src_port: connection.local,
            dst_port: connection.remote,
            len: len as u32,
            kind: 1,
            op,
            flags,
            buf_alloc: WINDOW as u32,
            fwd_cnt: connection.forwarded,
        }
    }

    /// Sends a packet with the first `len` bytes of `payload`.
    fn send(&mut self, index: usize, op: u16, flags: u32, len: usize) {
        let header = self.header(index, op, flags, len);
        self.vsock.send(&header, &self.payload[..len]);
        let connection = &mut self.connections[index];
        connection.announced = connection.forwarded;
        connection.sent = connection.sent.wrapping_add(len as u32);
    }

    fn credit(&self, index: usize) -> usize {
        let connection = &self.connections[index];
        let in_flight = connection.sent.wrapping_sub(connection.peer_forwarded);
        connection.peer_buffer.saturating_sub(in_flight) as usize
    }

    fn refuse(&mut self, header: &Header) {
        let reset = Header {
            src_cid: header.dst_cid,
            dst_cid: header.src_cid,
            src_port: header.dst_port,
            dst_port: header.src_port,
            kind: 1,
            op: OP_RST,
            ..Header::default()
        };
        self.vsock.send(&reset, &[]);
    }

    fn step(&mut self) {
        if let Some(number) = self.vsock.event() {
            say!("vsock event {number}");
            // TRANSPORT_RESET, the only one there is: no connection is any more.
            self.connections = [FREE; CONNECTIONS];
        }
        // The payload buffer is free between sends, so a packet may land in it.
        if let Some(header) = self.vsock.receive(self.payload) {
            self.packet(&header);
        }
        for index in 0..CONNECTIONS {
            if self.connections[index].state == State::Open {
                self.advance(index);
            }
        }
    }

    fn find(&self, header: &Header) -> Option<usize> {
        self.connections.iter().position(|connection| {
            connection.state != State::Free
                && connection.local == header.dst_port
                && connection.remote == header.src_port
        })
    }

    fn packet(&mut self, header: &Header) {
        if header.kind != 1 || header.src_cid != HOST || header.dst_cid != self.vsock.cid {
            say!("vsock: misdirected {header:?}");
            return;
        }
        let Some(index) = self.find(header) else {
            match header.op {
                OP_REQUEST => self.accept(header),
                OP_RST => {}
                _ => self.refuse(header),
            }
            return;
        };
        let connection = &mut self.connections[index];
        connection.peer_buffer = header.buf_alloc;
        connection.peer_forwarded = header.fwd_cnt;
        match header.op {
            OP_RESPONSE if connection.state == State::Asked => {
                connection.state = State::Open;
                say!("connected port={}", header.src_port);
            }
            OP_RST => {
                if connection.state == State::Asked {
                    say!("refused port={}", header.src_port);
                }
                self.free(index);
            }
            OP_SHUTDOWN => {
                connection.ended |= header.flags & SHUTDOWN_SEND != 0;
                if header.flags & SHUTDOWN_RECEIVE != 0 && connection.ended {
                    // The host is wholly gone: what we hold has no reader.
                    self.send(index, OP_RST, 0, 0);
                    self.free(index);
                }
            }
            OP_RW => self.data(index, header.len as usize),
            OP_CREDIT_REQUEST => self.send(index, OP_CREDIT_UPDATE, 0, 0),
            _ => {}
        }
    }

    fn accept(&mut self, header: &Header) {
        let known = [PORT_RESET, PORT_ECHO, PORT_SINK, PORT_STALL, PORT_SOURCE, PORT_POWER_OFF];
        let free = self.connections.iter().position(|connection| connection.state == State::Free);
        let (true, Some(index)) = (known.contains(&header.dst_port), free) else {
            return self.refuse(header);
        };
        let window = self.connections[index].window;
        self.connections[index] = Connection {
            state: State::Open,
            service: header.dst_port,
            local: header.dst_port,
            remote: header.src_port,
            peer_buffer: header.buf_alloc,
            peer_forwarded: header.fwd_cnt,
            window,
            ..FREE
        };
        self.send(index, OP_RESPONSE, 0, 0);
        match header.dst_port {
            PORT_RESET => {
                self.send(index, OP_RST, 0, 0);
                self.free(index);
            }
            PORT_POWER_OFF => power::off(),
            _ => {}
        }
    }

    fn free(&mut self, index: usize) {
        self.connections[index].state = State::Free;
    }

    /// Stores `length` bytes of `payload` in the connection's window.
    fn data(&mut self, index: usize, length: usize) {
        let connection = &mut self.connections[index];
        if connection.held + length > WINDOW {
            say!("vsock: the host ignored credit: {} held, {length} more", connection.held);
            power::fail();
        }
        connection.received += length as u64;
        if connection.service == PORT_SINK {
            connection.sum = checksum(connection.sum, &self.payload[..length]);
            connection.forwarded = connection.forwarded.wrapping_add(length as u32);
        } else {
            let window = &mut self.windows[index * WINDOW..(index + 1) * WINDOW];
            let at = (connection.start + connection.held) % WINDOW;
            let first = length.min(WINDOW - at);
            window[at..at + first].copy_from_slice(&self.payload[..first]);
            window[..length - first].copy_from_slice(&self.payload[first..length]);
            connection.held += length;
        }
    }

    /// Sends what the connection's service has to send and credit allows.
    fn advance(&mut self, index: usize) {
        let credit = self.credit(index).min(TX_PAYLOAD);
        let connection = self.connections[index];
        match connection.service {
            PORT_ECHO if connection.held > 0 && credit > 0 && !connection.finished => {
                let length = connection.held.min(credit).min(WINDOW - connection.start);
                let at = index * WINDOW + connection.start;
                self.payload[..length].copy_from_slice(&self.windows[at..at + length]);
                let connection = &mut self.connections[index];
                connection.start = (connection.start + length) % WINDOW;
                connection.held -= length;
                connection.forwarded = connection.forwarded.wrapping_add(length as u32);
                return self.send(index, OP_RW, 0, length);
            }
            PORT_ECHO if connection.held == 0 && connection.ended && !connection.finished => {
                return self.finish(index);
            }
            PORT_SINK if connection.ended && !connection.finished && credit > 64 => {
                let mut text = Text { bytes: self.payload, used: 0 };
                use core::fmt::Write;
                let _ = writeln!(text, "{} {:016x}", connection.received, connection.sum);
                let length = text.used;
                self.send(index, OP_RW, 0, length);
                return self.finish(index);
            }
            PORT_SOURCE if connection.progress < SOURCE_BYTES && credit > 0 => {
                let length = credit.min((SOURCE_BYTES - connection.progress) as usize);
                pattern::fill(u64::from(PORT_SOURCE), connection.progress, &mut self.payload[..length]);
                self.connections[index].progress += length as u64;
                return self.send(index, OP_RW, 0, length);
            }
            PORT_SOURCE if connection.progress == SOURCE_BYTES && !connection.finished => {
                return self.finish(index);
            }
            _ => {}
        }
        // Nothing carried our count along: announce it before the host runs dry.
        if connection.forwarded.wrapping_sub(connection.announced) as usize >= WINDOW / 2 {
            self.send(index, OP_CREDIT_UPDATE, 0, 0);
        }
    }

    /// Our end of the stream. The host resets the connection when it has read all.
    fn finish(&mut self, index: usize) {
        self.connections[index].finished = true;
        self.send(index, OP_SHUTDOWN, SHUTDOWN_SEND | SHUTDOWN_RECEIVE, 0);
    }
}

struct Text<'a> {
    bytes: &'a mut [u8],
    used: usize,
}

impl core::fmt::Write for Text<'_> {
    fn write_str(&mut self, text: &str) -> core::fmt::Result {
        let end = self.used + text.len();
        self.bytes.get_mut(self.used..end).ok_or(core::fmt::Error)?.copy_from_slice(text.as_bytes());
        self.used = end;
        Ok(())
    }
}
