//! What the guest sees of a socket device (virtio 1.2, 5.10.2 - 5.10.6).

pub(super) const DEVICE_TYPE: u32 = 19;
/// Receive, transmit, event.
pub(super) const QUEUE_SIZES: [u16; 3] = [256, 256, 16];
pub(super) const RX: u16 = 0;
pub(super) const TX: u16 = 1;
pub(super) const EVENT: u16 = 2;

/// The host's context id.
pub(super) const HOST_CID: u64 = 2;
/// The one socket type offered: a byte stream.
pub(super) const TYPE_STREAM: u16 = 1;
/// Event: every connection is gone (5.10.6.7).
pub(super) const EVENT_TRANSPORT_RESET: u32 = 0;

/// Bytes that the guest may have in flight to one connection; also the most that is buffered
/// for a host peer that does not read.
pub(super) const BUF_ALLOC: u32 = 256 * 1024;
/// Consumed bytes after which the guest is told, so that its window does not close.
pub(super) const CREDIT_STEP: u32 = BUF_ALLOC / 4;
/// Most payload of one packet to the guest.
pub(super) const MAX_PAYLOAD: usize = 64 * 1024;

/// Packet operations.
pub(super) mod op {
    pub(crate) const REQUEST: u16 = 1;
    pub(crate) const RESPONSE: u16 = 2;
    pub(crate) const RST: u16 = 3;
    pub(crate) const SHUTDOWN: u16 = 4;
    pub(crate) const RW: u16 = 5;
    pub(crate) const CREDIT_UPDATE: u16 = 6;
    pub(crate) const CREDIT_REQUEST: u16 = 7;
}

/// Flag of SHUTDOWN: the sender receives no more.
pub(super) const SHUTDOWN_RCV: u32 = 1;
/// Flag of SHUTDOWN: the sender sends no more.
pub(super) const SHUTDOWN_SEND: u32 = 2;

/// Length of a packet's header in bytes.
pub(super) const HEADER: usize = 44;

/// struct virtio_vsock_hdr.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) src_cid: u64,
    pub(super) dst_cid: u64,
    pub(super) src_port: u32,
    pub(super) dst_port: u32,
    pub(super) len: u32,
    pub(super) kind: u16,
    pub(super) op: u16,
    pub(super) flags: u32,
    pub(super) buf_alloc: u32,
    pub(super) fwd_cnt: u32,
}

impl Header {
    pub(super) fn decode(raw: &[u8; HEADER]) -> Self {
        let u16_at = |at: usize| u16::from_le_bytes([raw[at], raw[at + 1]]);
        let u32_at = |at: usize| u32::from(u16_at(at)) | u32::from(u16_at(at + 2)) << 16;
        let u64_at = |at: usize| u64::from(u32_at(at)) | u64::from(u32_at(at + 4)) << 32;
        Self {
            src_cid: u64_at(0),
            dst_cid: u64_at(8),
            src_port: u32_at(16),
            dst_port: u32_at(20),
            len: u32_at(24),
            kind: u16_at(28),
            op: u16_at(30),
            flags: u32_at(32),
            buf_alloc: u32_at(36),
            fwd_cnt: u32_at(40),
        }
    }

    pub(super) fn encode(&self) -> [u8; HEADER] {
        let mut raw = [0; HEADER];
        let mut put = |at: usize, bytes: &[u8]| raw[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &self.src_cid.to_le_bytes());
        put(8, &self.dst_cid.to_le_bytes());
        put(16, &self.src_port.to_le_bytes());
        put(20, &self.dst_port.to_le_bytes());
        put(24, &self.len.to_le_bytes());
        put(28, &self.kind.to_le_bytes());
        put(30, &self.op.to_le_bytes());
        put(32, &self.flags.to_le_bytes());
        put(36, &self.buf_alloc.to_le_bytes());
        put(40, &self.fwd_cnt.to_le_bytes());
        raw
    }

    /// The RST that answers a packet of the guest.
    pub(super) fn reset_reply(&self) -> Self {
        Self {
            src_cid: self.dst_cid,
            dst_cid: self.src_cid,
            src_port: self.dst_port,
            dst_port: self.src_port,
            kind: TYPE_STREAM,
            op: op::RST,
            ..Self::default()
        }
    }
}
