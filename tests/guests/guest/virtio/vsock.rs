//! The socket device (section 5.10): the packets and the queues. What the guest does
//! with connections is in `services.rs`.

use super::{Queue, find};
use crate::{cpu, memory};

pub const HEADER: usize = 44;
/// Receive buffers: odd ones are a single descriptor, even ones split after the header.
const RX_BUFFERS: usize = 32;
const RX_SIZE: usize = HEADER + 4096;
/// Largest payload that this driver sends in one packet.
pub const TX_PAYLOAD: usize = 32 * 1024;

pub const OP_REQUEST: u16 = 1;
pub const OP_RESPONSE: u16 = 2;
pub const OP_RST: u16 = 3;
pub const OP_SHUTDOWN: u16 = 4;
pub const OP_RW: u16 = 5;
pub const OP_CREDIT_UPDATE: u16 = 6;
pub const OP_CREDIT_REQUEST: u16 = 7;

pub const SHUTDOWN_RECEIVE: u32 = 1;
pub const SHUTDOWN_SEND: u32 = 2;
pub const HOST: u64 = 2;

#[derive(Clone, Copy, Default, Debug)]
pub struct Header {
    pub src_cid: u64,
    pub dst_cid: u64,
    pub src_port: u32,
    pub dst_port: u32,
    pub len: u32,
    pub kind: u16,
    pub op: u16,
    pub flags: u32,
    pub buf_alloc: u32,
    pub fwd_cnt: u32,
}

impl Header {
    fn decode(bytes: &[u8]) -> Self {
        let u32_at = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        let u64_at = |at: usize| u64::from(u32_at(at)) | u64::from(u32_at(at + 4)) << 32;
        Self {
            src_cid: u64_at(0),
            dst_cid: u64_at(8),
            src_port: u32_at(16),
            dst_port: u32_at(20),
            len: u32_at(24),
            kind: u32_at(28) as u16,
            op: (u32_at(28) >> 16) as u16,
            flags: u32_at(32),
            buf_alloc: u32_at(36),
            fwd_cnt: u32_at(40),
        }
    }

    fn encode(&self, bytes: &mut [u8]) {
        bytes[0..8].copy_from_slice(&self.src_cid.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.dst_cid.to_le_bytes());
        bytes[16..20].copy_from_slice(&self.src_port.to_le_bytes());
        bytes[20..24].copy_from_slice(&self.dst_port.to_le_bytes());
        bytes[24..28].copy_from_slice(&self.len.to_le_bytes());
        bytes[28..30].copy_from_slice(&self.kind.to_le_bytes());
        bytes[30..32].copy_from_slice(&self.op.to_le_bytes());
        bytes[32..36].copy_from_slice(&self.flags.to_le_bytes());
        bytes[36..40].copy_from_slice(&self.buf_alloc.to_le_bytes());
        bytes[40..44].copy_from_slice(&self.fwd_cnt.to_le_bytes());
    }
}

pub struct Vsock {
    pub cid: u64,
    rx: Queue,
    tx: Queue,
    events: Queue,
    event: &'static mut [u8],
    rx_memory: &'static mut [u8],
    tx_memory: &'static mut [u8],
    /// Receive buffer of each chain head.
    rx_of_head: [usize; super::SIZE],
}

impl Vsock {
    pub fn open() -> Result<Self, &'static str> {
        let device = find(19).next().ok_or("no vsock device")?;
        device.negotiate(0)?;
        let (rx, tx, mut events) = (device.queue(0)?, device.queue(1)?, device.queue(2)?);
        let event = memory::allocate(64);
        events.push(&[(event.as_ptr() as u64, 8, true)]);
        let cid = device.config64(0);
        let mut vsock = Self {
            cid,
            rx,
            tx,
            events,
            event,
            rx_memory: memory::allocate(RX_BUFFERS * 8192),
            tx_memory: memory::allocate(HEADER + TX_PAYLOAD),
            rx_of_head: [0; super::SIZE],
        };
        for buffer in 0..RX_BUFFERS {
            vsock.post(buffer);
        }
        device.start();
        vsock.rx.kick();
        Ok(vsock)
    }

    fn post(&mut self, buffer: usize) {
        let at = self.rx_memory.as_ptr() as u64 + 8192 * buffer as u64;
        let head = if buffer % 2 == 0 {
            self.rx.push(&[(at, HEADER as u32, true), (at + HEADER as u64, (RX_SIZE - HEADER) as u32, true)])
        } else {
            self.rx.push(&[(at, RX_SIZE as u32, true)])
        };
        self.rx_of_head[usize::from(head)] = buffer;
    }

    /// The next event's number.
    pub fn event(&mut self) -> Option<u32> {
        self.events.pop()?;
        // SAFETY: the device has written it.
        let number = unsafe { self.event.as_ptr().cast::<u32>().read_volatile() };
        self.events.push(&[(self.event.as_ptr() as u64, 8, true)]);
        self.events.kick();
        Some(number)
    }

    /// The next packet, copied into `payload`.
    pub fn receive(&mut self, payload: &mut [u8]) -> Option<Header> {
        let (head, written) = self.rx.pop()?;
        let buffer = self.rx_of_head[usize::from(head)];
        let bytes = &self.rx_memory[8192 * buffer..8192 * buffer + RX_SIZE];
        let header = Header::decode(bytes);
        let length = header.len as usize;
        if (written as usize) < HEADER + length || length > payload.len() {
            crate::say!("vsock: bad packet: {header:?} in {written} bytes");
            cpu::triple_fault();
        }
        payload[..length].copy_from_slice(&bytes[HEADER..HEADER + length]);
        self.post(buffer);
        self.rx.kick();
        Some(header)
    }

    /// Sends one packet and waits until the device has taken it.
    pub fn send(&mut self, header: &Header, payload: &[u8]) {
        header.encode(&mut self.tx_memory[..HEADER]);
        self.tx_memory[HEADER..HEADER + payload.len()].copy_from_slice(payload);
        let at = self.tx_memory.as_ptr() as u64;
        if payload.is_empty() {
            self.tx.push(&[(at, HEADER as u32, false)]);
        } else {
            self.tx.push(&[(at, HEADER as u32, false), (at + HEADER as u64, payload.len() as u32, false)]);
        }
        self.tx.kick();
        if self.tx.wait().is_none() {
            crate::say!("vsock: the device needs a reset");
            cpu::triple_fault();
        }
    }
}
