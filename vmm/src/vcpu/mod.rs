//! Virtual processors: one thread each ([`handle`] is the outside, `run_loop` the thread,
//! `exit` what it does with KVM's exits). A vCPU knows the buses, the latch that ends the VM
//! and its counters; it knows no device.

mod exit;
mod handle;
mod run_loop;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

pub(crate) use handle::stop_all;
pub use handle::{VcpuError, VcpuHandle, install_kick};

use crate::api::Exits;
use crate::arch::SaveList;
use crate::bus::{MmioBus, PioBus};
use crate::end::EndLatch;

/// What every vCPU of one VM shares.
#[derive(Debug, Clone)]
pub struct Shared {
    pub pio: Arc<PioBus>,
    pub mmio: Arc<MmioBus>,
    pub end: Arc<EndLatch>,
    pub counters: Arc<ExitCounters>,
    /// What there is to save of each.
    pub list: Arc<SaveList>,
}

/// KVM exits by kind, and the moment of the first entry. Written by all vCPU threads.
#[derive(Debug, Default)]
pub struct ExitCounters {
    mmio: AtomicU64,
    pio: AtomicU64,
    hlt: AtomicU64,
    interrupted: AtomicU64,
    other: AtomicU64,
    /// `CLOCK_MONOTONIC` nanoseconds; 0 before.
    entered_ns: AtomicU64,
}

impl ExitCounters {
    fn count(counter: &AtomicU64) {
        counter.fetch_add(1, Ordering::Relaxed);
    }

    pub fn exits(&self) -> Exits {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Exits {
            mmio: get(&self.mmio),
            pio: get(&self.pio),
            hlt: get(&self.hlt),
            interrupted: get(&self.interrupted),
            other: get(&self.other),
        }
    }

    pub fn entered_ns(&self) -> u64 {
        self.entered_ns.load(Ordering::Relaxed)
    }
}
