//! What a saved file system device consists of, beside its queues. What the server knows of files is the peer's to keep.

use serde::{Deserialize, Serialize};

/// Version 1 had nothing.
pub(super) const VERSION: u32 = 2;

#[derive(Debug, Serialize, Deserialize)]
pub(super) struct FsStateV2 {
    /// The guest had a server, and needs one to go on.
    pub(super) served: bool,
}
