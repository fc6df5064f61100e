//! One descriptor for all that a device waits for: an epoll set of its own, with a timer.
//!
//! The event loop watches the set, which is ready while any member is, level-triggered. What is
//! ready nobody asks: the device tries what it wants, so that a wake-up costs no system call more than
//! with the members watched directly, and a member can leave, and be closed, at any moment, also
//! while the loop does not run. It pays for devices with few members.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::time::Duration;

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::timerfd::TimerFd;

/// What of a member opens the gate. Its failure always does.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Interest {
    pub readable: bool,
    pub writable: bool,
}

/// See the module. Times are nanoseconds of [`crate::clock::monotonic_ns`].
#[derive(Debug)]
pub struct Gate {
    epoll: Epoll,
    timer: TimerFd,
    /// When the timer fires.
    due: Option<u64>,
}

fn event(interest: Interest) -> EpollEvent {
    let mut set = EventSet::empty();
    if interest.readable {
        set |= EventSet::IN;
    }
    if interest.writable {
        set |= EventSet::OUT;
    }
    EpollEvent::new(set, 0)
}

impl Gate {
    pub fn new() -> io::Result<Self> {
        let (epoll, timer) = (Epoll::new()?, TimerFd::new()?);
        epoll.ctl(ControlOperation::Add, timer.as_raw_fd(), EpollEvent::new(EventSet::IN, 0))?;
        Ok(Self { epoll, timer, due: None })
    }

    pub fn add(&self, member: &impl AsRawFd, interest: Interest) -> io::Result<()> {
        self.epoll.ctl(ControlOperation::Add, member.as_raw_fd(), event(interest))
    }

    pub fn change(&self, member: &impl AsRawFd, interest: Interest) -> io::Result<()> {
        self.epoll.ctl(ControlOperation::Modify, member.as_raw_fd(), event(interest))
    }

    /// To be called before the member is closed.
    pub fn remove(&self, member: &impl AsRawFd) {
        // It fails only for a descriptor that is no member, which is what is asked for.
        let _ = self.epoll.ctl(ControlOperation::Delete, member.as_raw_fd(), EpollEvent::default());
    }

    /// When the timer opens it.
    pub fn due(&self) -> Option<u64> {
        self.due
    }

    /// Opens the gate at `due`, which replaces an earlier call's time.
    pub fn open_at(&mut self, due: u64, now: u64) -> io::Result<()> {
        // A time of 0 would disarm the timer.
        let wait = Duration::from_nanos(due.saturating_sub(now).max(1));
        self.timer.reset(wait, None)?;
        self.due = Some(due);
        Ok(())
    }

    /// Opens the gate at once.
    pub fn open(&mut self) -> io::Result<()> {
        self.open_at(0, 0)
    }

    /// Whether the timer's time has come; it is off then. `clock` is looked at only if it is on.
    pub fn take_due(&mut self, clock: impl FnOnce() -> u64) -> bool {
        if self.due.is_none_or(|due| clock() < due) {
            return false;
        }
        self.due = None;
        // Off, it is not ready either. It fails for no timer.
        let _ = self.timer.clear();
        true
    }
}

impl AsRawFd for Gate {
    fn as_raw_fd(&self) -> RawFd {
        self.epoll.as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    use super::*;
    use crate::clock::monotonic_ns;

    fn is_open(gate: &Gate, milliseconds: i32) -> bool {
        let outer = Epoll::new().unwrap();
        let member = EpollEvent::new(EventSet::IN, 0);
        outer.ctl(ControlOperation::Add, gate.as_raw_fd(), member).unwrap();
        outer.wait(milliseconds, &mut [EpollEvent::default()]).unwrap() > 0
    }

    #[test]
    fn it_is_open_while_a_member_is_ready() {
        let gate = Gate::new().unwrap();
        let (mut ours, mut theirs) = UnixStream::pair().unwrap();
        gate.add(&ours, Interest { readable: true, writable: false }).unwrap();
        assert!(!is_open(&gate, 0));
        theirs.write_all(b"x").unwrap();
        assert!(is_open(&gate, 0) && is_open(&gate, 0), "until it is read");
        ours.read_exact(&mut [0]).unwrap();
        assert!(!is_open(&gate, 0));
        gate.change(&ours, Interest { readable: false, writable: true }).unwrap();
        assert!(is_open(&gate, 0));
        gate.change(&ours, Interest::default()).unwrap();
        theirs.write_all(b"x").unwrap();
        assert!(!is_open(&gate, 0));
        drop(theirs);
        assert!(is_open(&gate, 0), "a failure is told always");
        gate.remove(&ours);
        assert!(!is_open(&gate, 0));
    }

    #[test]
    fn the_timer_opens_it_once() {
        let mut gate = Gate::new().unwrap();
        assert!(!gate.take_due(|| panic!("the timer is off")));
        let now = monotonic_ns();
        gate.open_at(now + 60_000_000_000, now).unwrap();
        assert!(!is_open(&gate, 0) && !gate.take_due(|| now));
        gate.open_at(now + 1_000_000, now).unwrap();
        assert!(is_open(&gate, 10_000));
        assert!(gate.take_due(monotonic_ns));
        assert!(!is_open(&gate, 0) && !gate.take_due(monotonic_ns));
        gate.open().unwrap();
        assert!(is_open(&gate, 10_000) && gate.take_due(|| 0));
    }
}
