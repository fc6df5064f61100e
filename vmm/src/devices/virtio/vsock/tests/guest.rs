//! A guest's vsock driver, as far as tests need one.

use std::collections::VecDeque;
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use super::super::spec::{HEADER, HOST_CID, Header, RX, TX, op};
use super::super::{Vsock, VsockHandle};
use crate::devices::virtio::VirtioDevice;
use crate::devices::virtio::testing::{DATA, Driver, poll_readable, readable, writable};

pub(crate) const CID: u32 = 7;
/// The guest's window.
pub(crate) const WINDOW: u32 = 64 * 1024;
const RX_BUFFER: usize = 4096;
const RX_BASE: u64 = DATA;
const TX_BASE: u64 = DATA + 0x20_0000;
const DEADLINE: Duration = Duration::from_secs(20);

pub(crate) struct Guest {
    pub(crate) driver: Driver,
    pub(crate) handle: VsockHandle,
    fd: i32,
    path: std::path::PathBuf,
    _directory: tempfile::TempDir,
    pub(crate) incoming: Receiver<(u32, UnixStream)>,
    received: VecDeque<(Header, Vec<u8>)>,
    /// Consumed per connection, as the guest tells it: (guest port, host port) → bytes.
    pub(crate) window: u32,
    /// Give receive buffers back as they are used.
    pub(crate) refill: bool,
}

/// One connection as the guest sees it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Conn {
    pub(crate) guest_port: u32,
    pub(crate) host_port: u32,
    pub(crate) fwd_cnt: u32,
}

impl Guest {
    pub(crate) fn new() -> Self {
        Self::with(64, |_| {})
    }

    pub(crate) fn with(buffers: usize, configure: impl FnOnce(&mut Vsock)) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("vsock.sock");
        let listener = UnixListener::bind(&path).unwrap();
        let (sender, incoming) = channel();
        let on_connection = Box::new(move |port, stream| sender.send((port, stream)).unwrap());
        let mut device = Vsock::new(CID, listener, vec![1024, 1030], on_connection).unwrap();
        configure(&mut device);
        let handle = device.handle();
        let fd = device.watches()[0].fd;
        let mut guest = Self {
            driver: Driver::new(device),
            handle,
            fd,
            path,
            _directory: directory,
            incoming,
            received: VecDeque::new(),
            window: WINDOW,
            refill: true,
        };
        for _ in 0..buffers {
            guest.add_buffer();
        }
        guest.driver.kick(RX);
        guest
    }

    /// Gives the device one receive buffer; descriptor n owns the n-th piece of memory.
    pub(crate) fn add_buffer(&mut self) {
        // The head is known before it is filled in: add an empty chain's worth first.
        let head = self.driver.add(RX.into(), &[writable(RX_BASE, RX_BUFFER)]);
        let addr = RX_BASE + u64::from(head) * RX_BUFFER as u64;
        self.driver.descriptor(RX.into(), head, addr, RX_BUFFER as u32, 2, 0);
    }

    /// A host client that said `CONNECT <port>`.
    pub(crate) fn dial(&mut self, port: u32) -> UnixStream {
        let mut client = self.client();
        client.write_all(format!("CONNECT {port}\n").as_bytes()).unwrap();
        client
    }

    pub(crate) fn client(&self) -> UnixStream {
        let client = UnixStream::connect(&self.path).unwrap();
        client.set_read_timeout(Some(DEADLINE)).unwrap();
        client
    }

    /// Whether a socket or a deadline wants to be served, after waiting at most so long for it.
    pub(crate) fn ready(&self, milliseconds: i32) -> bool {
        poll_readable(self.fd, milliseconds)
    }

    /// Serves sockets once, waiting at most so long for one to become ready.
    pub(crate) fn serve(&mut self, milliseconds: i32) -> bool {
        let ready = self.ready(milliseconds);
        if ready {
            self.driver.transport.process_backend(self.fd, true, false);
            self.driver.settle();
        }
        ready
    }

    /// Serves sockets until `done`.
    pub(crate) fn serve_until(&mut self, what: &str, mut done: impl FnMut(&mut Self) -> bool) {
        let end = Instant::now() + DEADLINE;
        while !done(self) {
            assert!(Instant::now() < end, "{what}: not in time");
            self.serve(20);
        }
    }

    fn collect(&mut self) {
        let used = self.driver.used(RX.into());
        for &(head, len) in &used {
            let raw = self.driver.bytes(RX_BASE + u64::from(head) * RX_BUFFER as u64, len as usize);
            let header = Header::decode(raw[..HEADER].try_into().unwrap());
            assert_eq!(header.len as usize, raw.len() - HEADER);
            assert_eq!((header.src_cid, header.dst_cid, header.kind), (HOST_CID, CID.into(), 1));
            self.received.push_back((header, raw[HEADER..].to_vec()));
        }
        if self.refill && !used.is_empty() {
            for _ in used {
                self.add_buffer();
            }
            self.driver.kick(RX);
        }
    }

    /// The next packet, if one is there without waiting for sockets.
    pub(crate) fn try_recv(&mut self) -> Option<(Header, Vec<u8>)> {
        self.collect();
        self.received.pop_front()
    }

    /// The next packet.
    pub(crate) fn recv(&mut self) -> (Header, Vec<u8>) {
        let end = Instant::now() + DEADLINE;
        loop {
            if let Some(packet) = self.try_recv() {
                return packet;
            }
            assert!(Instant::now() < end, "no packet in time");
            self.serve(20);
        }
    }

    /// The next packet, which must be of this operation.
    pub(crate) fn expect(&mut self, op: u16) -> (Header, Vec<u8>) {
        let packet = self.recv();
        assert_eq!(packet.0.op, op, "{:?}", packet.0);
        packet
    }

    /// Nothing comes, though sockets are served until they are quiet.
    pub(crate) fn expect_silence(&mut self) {
        while self.serve(0) {}
        let packet = self.try_recv();
        assert!(packet.is_none(), "{:?}", packet.map(|packet| packet.0));
    }

    /// Sends any packet.
    pub(crate) fn send_raw(&mut self, header: &Header, data: &[u8]) {
        self.enqueue(header, data);
        self.driver.kick(TX);
        self.driver.used(TX.into());
    }

    /// Makes a packet available without ringing the doorbell.
    pub(crate) fn enqueue(&mut self, header: &Header, data: &[u8]) {
        self.driver.fill(TX_BASE, &header.encode());
        self.driver.fill(TX_BASE + 0x1000, data);
        let mut parts = vec![readable(TX_BASE, HEADER)];
        // Many descriptors, as Linux sends large payloads.
        let step = 16 * 1024;
        for (number, piece) in data.chunks(step).enumerate() {
            parts.push(readable(TX_BASE + 0x1000 + (number * step) as u64, piece.len()));
        }
        self.driver.add(TX.into(), &parts);
    }

    pub(crate) fn header(&self, conn: Conn, op: u16) -> Header {
        Header {
            src_cid: CID.into(),
            dst_cid: HOST_CID,
            src_port: conn.guest_port,
            dst_port: conn.host_port,
            len: 0,
            kind: 1,
            op,
            flags: 0,
            buf_alloc: self.window,
            fwd_cnt: conn.fwd_cnt,
        }
    }

    pub(crate) fn send(&mut self, conn: Conn, op: u16, data: &[u8]) {
        let header = Header { len: data.len() as u32, ..self.header(conn, op) };
        self.send_raw(&header, data);
    }

    pub(crate) fn shutdown(&mut self, conn: Conn, flags: u32) {
        let header = Header { flags, ..self.header(conn, op::SHUTDOWN) };
        self.send_raw(&header, &[]);
    }

    /// A host client and its connection, accepted by the guest.
    pub(crate) fn connected(&mut self, guest_port: u32) -> (UnixStream, Conn) {
        let mut client = self.dial(guest_port);
        let (request, _) = self.expect(op::REQUEST);
        assert_eq!(request.dst_port, guest_port);
        let conn = Conn { guest_port, host_port: request.src_port, fwd_cnt: 0 };
        self.send(conn, op::RESPONSE, &[]);
        let expected = format!("OK {}\n", conn.host_port);
        let mut line = vec![0; expected.len()];
        client.read_exact(&mut line).unwrap();
        assert_eq!(line, expected.as_bytes());
        (client, conn)
    }

    /// A connection that the guest opened, with the host's end.
    pub(crate) fn dial_host(&mut self, guest_port: u32, host_port: u32) -> (UnixStream, Conn) {
        let conn = Conn { guest_port, host_port, fwd_cnt: 0 };
        self.send(conn, op::REQUEST, &[]);
        self.expect(op::RESPONSE);
        let (port, stream) = self.incoming.try_recv().unwrap();
        assert_eq!(port, host_port);
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
        (stream, conn)
    }
}

/// Whether the peer closed: its end, after nothing else.
pub(crate) fn closed(stream: &mut UnixStream) -> bool {
    match stream.read(&mut [0; 1]) {
        Ok(count) => count == 0,
        Err(error) => error.kind() == std::io::ErrorKind::ConnectionReset,
    }
}
