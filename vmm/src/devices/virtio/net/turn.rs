//! One call's turn in one direction: what it may use, and how much it may move.

use super::limiter::Limiter;
use super::spec;
use crate::api::NetCounters;
use crate::backend::tap::Tap;
use crate::memory::GuestRam;

/// What one call may move before other devices get their turn, and before the guest is told of
/// what is done.
pub(super) const BUDGET_FRAMES: usize = spec::QUEUE_SIZES[spec::TX as usize] as usize;
const BUDGET_BYTES: usize = 1 << 20;

/// What is left of a call's turn.
pub(super) struct Budget {
    frames: usize,
    bytes: usize,
}

impl Budget {
    pub(super) fn new() -> Self {
        Self { frames: BUDGET_FRAMES, bytes: BUDGET_BYTES }
    }

    pub(super) fn is_spent(&self) -> bool {
        self.frames == 0 || self.bytes == 0
    }

    pub(super) fn spend(&mut self, bytes: usize) {
        self.frames = self.frames.saturating_sub(1);
        self.bytes = self.bytes.saturating_sub(bytes);
    }
}

/// See the module.
pub(super) struct Turn<'a> {
    /// The device's, for logs.
    pub(super) name: &'a str,
    pub(super) memory: &'a GuestRam,
    /// None: the link is down.
    pub(super) tap: Option<&'a Tap>,
    pub(super) limiter: &'a mut Limiter,
    /// When it began; only a limiter asks.
    pub(super) now: u64,
    pub(super) counters: &'a mut NetCounters,
    pub(super) budget: Budget,
}
