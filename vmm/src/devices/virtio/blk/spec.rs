//! What the guest sees of a block device (virtio 1.2, 5.2.2 - 5.2.6).

use crate::devices::virtio::transport::{F_EVENT_IDX, F_INDIRECT_DESC};

pub(super) const DEVICE_TYPE: u32 = 2;
/// One queue. Larger ones cost guest memory for every slot, used or not.
pub(super) const QUEUE_SIZES: [u16; 1] = [128];

const F_SIZE_MAX: u64 = 1 << 1;
const F_SEG_MAX: u64 = 1 << 2;
const F_RO: u64 = 1 << 5;
const F_BLK_SIZE: u64 = 1 << 6;
pub(super) const F_FLUSH: u64 = 1 << 9;
pub(super) const F_DISCARD: u64 = 1 << 13;
pub(super) const F_WRITE_ZEROES: u64 = 1 << 14;

/// Features of a slot.
pub(super) fn features(read_only: bool) -> u64 {
    let common = F_SIZE_MAX | F_SEG_MAX | F_BLK_SIZE | F_INDIRECT_DESC | F_EVENT_IDX;
    common | if read_only { F_RO } else { F_FLUSH | F_DISCARD | F_WRITE_ZEROES }
}

/// Data descriptors of one request: the queue's size less header and status.
const SEG_MAX: u32 = QUEUE_SIZES[0] as u32 - 2;
/// Bytes of one data descriptor.
const SIZE_MAX: u32 = 256 * 1024;
/// Most data of one request: what a driver that keeps to both can ask for. Other devices wait
/// while it is moved.
pub(super) const MAX_REQUEST: usize = SEG_MAX as usize * SIZE_MAX as usize;
/// Logical block size in bytes.
const BLK_SIZE: u32 = 512;
/// Most sectors of one discard: 1 GiB.
pub(super) const MAX_DISCARD_SECTORS: u32 = 1 << 21;
/// Most sectors of one write-zeroes, 16 MiB: where the file cannot zero a range by itself,
/// the zeroes are written while other devices wait.
pub(super) const MAX_WRITE_ZEROES_SECTORS: u32 = 1 << 15;
/// Most ranges in one write-zeroes request: its total is bounded, not just its parts.
pub(super) const MAX_WRITE_ZEROES_RANGES: u32 = 1;
/// Most ranges in one discard request.
pub(super) const MAX_RANGES: u32 = 16;
/// The same, in bytes.
pub(super) const MAX_RANGES_LEN: usize = MAX_RANGES as usize * RANGE;

/// Length of the configuration space read by drivers of virtio 1.2.
const CONFIG_SIZE: usize = 60;

/// The configuration space (5.2.4).
pub(super) fn config(capacity: u64, read_only: bool) -> [u8; CONFIG_SIZE] {
    let mut config = [0; CONFIG_SIZE];
    let mut put = |offset: usize, bytes: &[u8]| config[offset..offset + bytes.len()].copy_from_slice(bytes);
    put(0, &capacity.to_le_bytes());
    put(8, &SIZE_MAX.to_le_bytes());
    put(12, &SEG_MAX.to_le_bytes());
    put(20, &BLK_SIZE.to_le_bytes());
    if !read_only {
        put(36, &MAX_DISCARD_SECTORS.to_le_bytes());
        put(40, &MAX_RANGES.to_le_bytes());
        // Discard alignment: one logical block.
        put(44, &1u32.to_le_bytes());
        put(48, &MAX_WRITE_ZEROES_SECTORS.to_le_bytes());
        put(52, &MAX_WRITE_ZEROES_RANGES.to_le_bytes());
        // write_zeroes_may_unmap.
        put(56, &[1]);
    }
    config
}

/// Length of a request's header: type, reserved, sector.
pub(super) const HEADER: usize = 16;
/// Length of a range in discard and write-zeroes: sector, count, flags.
pub(super) const RANGE: usize = 16;
/// Flag of a range: its storage may be given back.
pub(super) const RANGE_UNMAP: u32 = 1;
/// Length of the answer to GET_ID.
pub(super) const ID_BYTES: usize = 20;

/// Request types.
pub(super) mod kind {
    pub(crate) const IN: u32 = 0;
    pub(crate) const OUT: u32 = 1;
    pub(crate) const FLUSH: u32 = 4;
    pub(crate) const GET_ID: u32 = 8;
    pub(crate) const DISCARD: u32 = 11;
    pub(crate) const WRITE_ZEROES: u32 = 13;
}

/// A request's status byte.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Status {
    Ok = 0,
    IoErr = 1,
    Unsupported = 2,
}
