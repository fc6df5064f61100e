//! Counters of one slot, as `api::BlkMetrics` reports them.

use super::spec::kind;
use crate::api::BlkMetrics;

/// Counts an answered request of type `kind` that moved `bytes`.
pub(super) fn count(metrics: &mut BlkMetrics, kind: u32, bytes: usize, ok: bool) {
    if !ok {
        metrics.errors += 1;
        return;
    }
    match kind {
        kind::IN => {
            metrics.reads += 1;
            metrics.read_bytes += bytes as u64;
        }
        kind::OUT => {
            metrics.writes += 1;
            metrics.written_bytes += bytes as u64;
        }
        kind::FLUSH => metrics.flushes += 1,
        kind::DISCARD | kind::WRITE_ZEROES => metrics.discards += 1,
        _ => {}
    }
}
