//! What the guest sees of a file system device (virtio 1.2, 5.11), and what the device reads
//! of FUSE messages (Linux, include/uapi/linux/fuse.h).

pub(super) const DEVICE_TYPE: u32 = 26;
/// FORGET and INTERRUPT, which must not wait behind other requests (5.11.2).
pub(super) const HIGH_PRIORITY: u16 = 0;
pub(super) const REQUESTS: u16 = 1;
/// Linux lets a request have as many pages as the queue has descriptors, less four: 1 MiB.
pub(super) const QUEUE_SIZES: [u16; 2] = [64, 256];

/// Bytes of the tag in the configuration space.
pub(super) const TAG: usize = 36;

/// The configuration space (5.11.4): tag, padded with zeroes, and the number of request queues.
pub(super) fn config(tag: &str) -> [u8; TAG + 4] {
    let mut config = [0; TAG + 4];
    let len = tag.len().min(TAG);
    config[..len].copy_from_slice(&tag.as_bytes()[..len]);
    config[TAG..].copy_from_slice(&1u32.to_le_bytes());
    config
}

/// `struct fuse_in_header`: length, opcode, unique, node, uid, gid, pid, extension length.
pub(super) const IN_HEADER: usize = 40;
/// `struct fuse_out_header`: length, error, unique.
pub(super) const OUT_HEADER: usize = 16;
/// Most bytes of a message: what Linux sends and takes at most, and its headers.
pub(super) const MAX_MESSAGE: usize = (1 << 20) + 4096;

/// The header of a request with its true length.
pub(super) fn with_length(mut header: [u8; IN_HEADER], length: usize) -> [u8; IN_HEADER] {
    let length = u32::try_from(length).unwrap_or(u32::MAX);
    header[..4].copy_from_slice(&length.to_le_bytes());
    header
}

/// A reply that is an error and nothing else.
pub(super) fn error_reply(request: &[u8; IN_HEADER], errno: i32) -> [u8; OUT_HEADER] {
    let mut reply = [0; OUT_HEADER];
    reply[..4].copy_from_slice(&16u32.to_le_bytes());
    reply[4..8].copy_from_slice(&errno.wrapping_neg().to_le_bytes());
    reply[8..].copy_from_slice(&request[8..16]);
    reply
}

/// The length that a reply says it has.
pub(super) fn reply_length(header: &[u8; OUT_HEADER]) -> usize {
    let [a, b, c, d, ..] = *header;
    u32::from_le_bytes([a, b, c, d]) as usize
}
