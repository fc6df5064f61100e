//! Counters of the device, as `api::VsockMetrics` reports them; read from any thread.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::api::VsockMetrics;

#[derive(Debug, Default)]
pub(super) struct Counters {
    /// Connections opened, from either side.
    connections: AtomicU64,
    /// RST packets, in either direction.
    resets: AtomicU64,
    /// Payload to the guest.
    rx_bytes: AtomicU64,
    /// Payload from the guest.
    tx_bytes: AtomicU64,
}

impl Counters {
    pub(super) fn connection(&self) {
        self.connections.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn reset(&self) {
        self.resets.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn sent_to_guest(&self, bytes: usize) {
        self.rx_bytes.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    pub(super) fn sent_by_guest(&self, bytes: usize) {
        self.tx_bytes.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    pub(super) fn snapshot(&self) -> VsockMetrics {
        VsockMetrics {
            connections: self.connections.load(Ordering::Relaxed),
            resets: self.resets.load(Ordering::Relaxed),
            rx_bytes: self.rx_bytes.load(Ordering::Relaxed),
            tx_bytes: self.tx_bytes.load(Ordering::Relaxed),
        }
    }
}
