//! What a saved balloon consists of, beside its queues. What the guest gave up is not in it: in the snapshot's memory
//! it is zero.

use serde::{Deserialize, Serialize};

pub(super) const VERSION: u32 = 1;

#[derive(Debug, Serialize, Deserialize)]
pub(super) struct BalloonStateV1 {
    /// Pages that the host wants the balloon to hold.
    pub(super) target_pages: u32,
    /// Pages that the driver says it holds.
    pub(super) actual_pages: u32,
}
