//! The event loop's view of a virtio device: doorbells, the device's own watches, and the
//! wake-up that a vCPU thread gives when it activated or reset the device.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};

use super::Watch;
use super::transport::MmioTransport;
use crate::log;

/// Runs on the event-loop thread; takes the transport's lock for the length of one event.
#[derive(Debug, Clone)]
pub struct DeviceSubscriber(pub Arc<Mutex<MmioTransport>>);

impl DeviceSubscriber {
    pub fn new(transport: Arc<Mutex<MmioTransport>>) -> Self {
        Self(transport)
    }

    fn lock(&self) -> MutexGuard<'_, MmioTransport> {
        // A panic elsewhere ends the VMM; until then the state is as good as it was.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn events(watch: Watch) -> Events {
    let mut set = EventSet::empty();
    if watch.readable {
        set |= EventSet::IN;
    }
    if watch.writable {
        set |= EventSet::OUT;
    }
    Events::new_raw(watch.fd, set)
}

/// Brings the loop's registrations in line with what the device wants now.
fn update(transport: &mut MmioTransport, ops: &mut EventOps<'_>) {
    let wanted = transport.watches();
    if wanted == transport.registered {
        return;
    }
    let report = |what: &str, watch: Watch, error: event_manager::Error| {
        log::error(transport.name(), format_args!("{what} descriptor {}: {error:?}", watch.fd));
    };
    for &old in &transport.registered {
        if !wanted.iter().any(|new| new.fd == old.fd)
            && let Err(error) = ops.remove(events(old))
        {
            report("stop watching", old, error);
        }
    }
    for &new in &wanted {
        match transport.registered.iter().find(|old| old.fd == new.fd) {
            Some(&old) if old == new => {}
            Some(_) => {
                if let Err(error) = ops.modify(events(new)) {
                    report("change the watch on", new, error);
                }
            }
            None => {
                if let Err(error) = ops.add(events(new)) {
                    report("watch", new, error);
                }
            }
        }
    }
    transport.registered = wanted;
}

impl MutEventSubscriber for DeviceSubscriber {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        let mut transport = self.lock();
        for bell in transport.doorbells().iter().chain([transport.wake_fd()]) {
            if let Err(error) = ops.add(Events::new(bell, EventSet::IN)) {
                log::error(transport.name(), format_args!("watch a doorbell: {error:?}"));
            }
        }
        update(&mut transport, ops);
    }

    fn process(&mut self, event: Events, ops: &mut EventOps<'_>) {
        use std::os::fd::AsRawFd;
        let mut transport = self.lock();
        let fd = event.fd();
        let set = event.event_set();
        if let Some(index) = transport.queue_of(fd) {
            transport.process_queue(index);
        } else if fd == transport.wake_fd().as_raw_fd() {
            transport.woken();
        } else if transport.registered.iter().any(|watch| watch.fd == fd) {
            let closed = set.intersects(EventSet::ERROR | EventSet::HANG_UP);
            transport.process_backend(
                fd,
                closed || set.contains(EventSet::IN),
                closed || set.contains(EventSet::OUT),
            );
        }
        update(&mut transport, ops);
    }
}
