//! Why the guest ended, said once. vCPU threads and the power device set the latch; the event
//! loop watches its descriptor and tells the peer.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::api::EndReason;

/// Set at most once; later reasons are consequences of the first and are dropped.
#[derive(Debug)]
pub struct EndLatch {
    is_set: AtomicBool,
    reason: Mutex<Option<EndReason>>,
    event: EventFd,
}

impl EndLatch {
    pub fn new() -> io::Result<Self> {
        let event = EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?;
        Ok(Self { is_set: AtomicBool::new(false), reason: Mutex::new(None), event })
    }

    pub fn set(&self, reason: EndReason) {
        let mut slot = self.reason.lock().unwrap_or_else(PoisonError::into_inner);
        if slot.is_none() {
            *slot = Some(reason);
            self.is_set.store(true, Ordering::Release);
            // Fails only when the counter is full, and then the loop is awake already.
            let _ = self.event.write(1);
        }
    }

    /// Cheap enough to ask after every exit of a vCPU.
    pub fn is_set(&self) -> bool {
        self.is_set.load(Ordering::Acquire)
    }

    pub fn reason(&self) -> Option<EndReason> {
        self.reason.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl AsRawFd for EndLatch {
    fn as_raw_fd(&self) -> RawFd {
        self.event.as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn first_reason_wins() {
        let latch = EndLatch::new().unwrap();
        assert!(!latch.is_set());
        latch.set(EndReason::Reset);
        latch.set(EndReason::Shutdown);
        assert_eq!(latch.reason(), Some(EndReason::Reset));
        assert_eq!(latch.event.read().unwrap(), 1);
    }
}
