//! An epoll set of a backend's own. A device with many descriptors shows the event loop this
//! one descriptor, so that opening and closing connections costs the loop nothing.
//!
//! Streams are watched edge-triggered: an event says that a direction *became* ready, the
//! owner remembers it until the descriptor answers EAGAIN. No system call per transfer.

use std::io;
use std::os::fd::{AsRawFd, RawFd};

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

/// Events taken in one call.
pub const BATCH: usize = 64;

/// What happened to a watched descriptor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ready {
    /// As given to [`Poller::add_stream`] or [`Poller::add`].
    pub token: u64,
    pub readable: bool,
    pub writable: bool,
    /// Both directions are shut: the peer is gone.
    pub closed: bool,
}

/// See the module.
#[derive(Debug)]
pub struct Poller {
    epoll: Epoll,
    events: Vec<EpollEvent>,
}

impl Poller {
    pub fn new() -> io::Result<Self> {
        Ok(Self { epoll: Epoll::new()?, events: vec![EpollEvent::default(); BATCH] })
    }

    /// Watches a stream, both directions, edge-triggered.
    pub fn add_stream(&self, source: &impl AsRawFd, token: u64) -> io::Result<()> {
        let set = EventSet::IN | EventSet::OUT | EventSet::READ_HANG_UP | EventSet::EDGE_TRIGGERED;
        self.epoll.ctl(ControlOperation::Add, source.as_raw_fd(), EpollEvent::new(set, token))
    }

    /// Watches something that becomes readable, edge-triggered.
    pub fn add(&self, source: &impl AsRawFd, token: u64) -> io::Result<()> {
        let set = EventSet::IN | EventSet::EDGE_TRIGGERED;
        self.epoll.ctl(ControlOperation::Add, source.as_raw_fd(), EpollEvent::new(set, token))
    }

    /// Forgets a descriptor; to be called before it is closed.
    pub fn remove(&self, source: &impl AsRawFd) {
        // It fails only for a descriptor that is not watched, which is what is asked for.
        let _ = self.epoll.ctl(ControlOperation::Delete, source.as_raw_fd(), EpollEvent::default());
    }

    /// What is ready now, at most [`BATCH`] entries, without waiting; more may be left.
    pub fn poll(&mut self) -> io::Result<impl Iterator<Item = Ready> + '_> {
        let count = match self.epoll.wait(0, &mut self.events) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
            other => other?,
        };
        Ok(self.events[..count].iter().map(|event| {
            let set = event.event_set();
            let closed = set.intersects(EventSet::HANG_UP | EventSet::ERROR);
            Ready {
                token: event.data(),
                readable: closed || set.intersects(EventSet::IN | EventSet::READ_HANG_UP),
                writable: closed || set.contains(EventSet::OUT),
                closed,
            }
        }))
    }
}

impl AsRawFd for Poller {
    fn as_raw_fd(&self) -> RawFd {
        self.epoll.as_raw_fd()
    }
}
