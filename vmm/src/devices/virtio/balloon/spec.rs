//! What the guest sees of a memory balloon (virtio 1.2, 5.5.2 - 5.5.4, 5.5.6).

use crate::devices::virtio::transport::{F_EVENT_IDX, F_INDIRECT_DESC};

pub(super) const DEVICE_TYPE: u32 = 5;

pub(super) const INFLATE: u16 = 0;
pub(super) const DEFLATE: u16 = 1;
/// The queues before it in the specification's list are those of features that are not offered:
/// they do not exist, and the ones behind them move up.
pub(super) const REPORTING: u16 = 2;
/// Linux reports 32 ranges at a time and refuses a device whose queue holds fewer.
pub(super) const QUEUE_SIZES: [u16; 3] = [32; 3];

const F_DEFLATE_ON_OOM: u64 = 1 << 2;
pub(super) const F_REPORTING: u64 = 1 << 5;
pub(super) const FEATURES: u64 = F_DEFLATE_ON_OOM | F_REPORTING | F_INDIRECT_DESC | F_EVENT_IDX;

/// Bytes of the pages that the driver counts in (5.5.6), whatever its own are.
pub(super) const PAGE: u64 = 4096;
/// Bytes of a page number in an inflate or deflate request.
pub(super) const PFN: usize = 4;
/// Most page numbers of one request that are served, 16 MiB of memory. Linux sends up to 256,
/// others 1024. What is beyond stays with the guest.
pub(super) const MAX_PFNS: usize = 4096;
/// Most bytes of one report that are served: 32 ranges of 4 MiB, Linux's largest free blocks.
pub(super) const MAX_REPORT: u64 = 128 << 20;

/// Where the driver writes how many pages the balloon holds.
pub(super) const ACTUAL: u64 = 4;
const CONFIG_SIZE: usize = 8;

/// The configuration space without the fields of features that are not offered: pages wanted,
/// pages held.
pub(super) fn config(target: u32, actual: u32) -> [u8; CONFIG_SIZE] {
    let mut config = [0; CONFIG_SIZE];
    config[..4].copy_from_slice(&target.to_le_bytes());
    config[4..].copy_from_slice(&actual.to_le_bytes());
    config
}
