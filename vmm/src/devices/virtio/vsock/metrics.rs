//! Counters of the device, as `api::VsockMetrics` reports them, and what else the control plane
//! and the device tell each other; usable from any thread.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

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
    /// Of those, the ones that wait for host peers to take them.
    unsent: AtomicU64,
    /// When the VM was resumed last.
    resumed: Mutex<Option<Instant>>,
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

    pub(super) fn add_unsent(&self, bytes: usize) {
        self.unsent.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    pub(super) fn subtract_unsent(&self, bytes: usize) {
        self.unsent.fetch_sub(bytes as u64, Ordering::Relaxed);
    }

    pub(super) fn unsent(&self) -> u64 {
        self.unsent.load(Ordering::Relaxed)
    }

    pub(super) fn note_resumed(&self) {
        *self.resumed.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
    }

    pub(super) fn resumed(&self) -> Option<Instant> {
        *self.resumed.lock().unwrap_or_else(PoisonError::into_inner)
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
