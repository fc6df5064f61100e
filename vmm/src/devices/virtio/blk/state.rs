//! What a saved block device consists of, beside its queue. The disk's content is the peer's to keep.

use serde::{Deserialize, Serialize};

pub(super) const VERSION: u32 = 1;

#[derive(Debug, Serialize, Deserialize)]
pub(super) struct BlkStateV1 {
    /// Size of the disk in sectors of 512 bytes; none: the slot was free.
    pub(super) sectors: Option<u64>,
}
