//! The file system device and the handle that the control plane holds.

use std::cell::Cell;
use std::io;
use std::os::fd::RawFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use virtio_queue::Queue;

use super::connection::{Connection, Orphan};
use super::spec::{self, HIGH_PRIORITY, IN_HEADER, MAX_MESSAGE, OUT_HEADER, REQUESTS};
use super::state::{self, FsStateV2};
use crate::api::FsMetrics;
use crate::backend::unix_socket::Stream;
use crate::devices::virtio::queue::{DeviceQueue, HeldChain};
use crate::devices::virtio::transport::{F_EVENT_IDX, F_INDIRECT_DESC};
use crate::devices::virtio::{ActiveContext, DeviceError, Pending, Saved, VirtioDevice, Watch, read_space};
use crate::log::{self, Limited};
use crate::snapshot::contract::{PartState, RestoreError, SaveError};

const DEVICE: &str = "fs";

/// Why a file server could not be attached. The device is as it was.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    #[error("attach a file server: the device has one already")]
    Occupied,
    #[error("attach a file server: prepare its sockets: {0}")]
    Host(#[from] io::Error),
}

/// What device and handle share.
#[derive(Default)]
struct Slot {
    attached: bool,
    /// The saved device had a server.
    expected: bool,
    /// Not taken over by the device yet.
    arrived: Vec<Stream>,
    held: bool,
    in_flight: usize,
    metrics: FsMetrics,
}

fn lock(slot: &Mutex<Slot>) -> MutexGuard<'_, Slot> {
    slot.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The control plane's end of the device; usable from any thread, at any time. Lock order:
/// transport → this.
#[derive(Clone)]
pub struct FsHandle(Arc<Mutex<Slot>>);

impl FsHandle {
    /// Gives the device its server: requests go out on these sockets, one at a time on each.
    pub fn attach(&self, sockets: Vec<UnixStream>) -> Result<(), AttachError> {
        let mut slot = lock(&self.0);
        if slot.attached {
            return Err(AttachError::Occupied);
        }
        slot.arrived = sockets.into_iter().map(Stream::new).collect::<io::Result<_>>()?;
        slot.attached = true;
        Ok(())
    }

    /// Whether the guest had a server before it was restored, and has none yet.
    pub fn awaits_server(&self) -> bool {
        let slot = lock(&self.0);
        slot.expected && !slot.attached
    }

    /// While held, requests stay in their queue; those under way are finished.
    pub fn hold(&self, held: bool) {
        lock(&self.0).held = held;
    }

    /// Requests that the server has not answered.
    pub fn in_flight(&self) -> usize {
        lock(&self.0).in_flight
    }

    pub fn metrics(&self) -> FsMetrics {
        lock(&self.0).metrics.clone()
    }
}

struct Active {
    context: ActiveContext,
    queues: [DeviceQueue; 2],
}

/// The file system device. Nothing of it outlives a reset: sockets on which a request is under
/// way are closed then.
pub struct Fs {
    tag: String,
    slot: Arc<Mutex<Slot>>,
    connections: Vec<Connection>,
    /// Broken ones, open until the event loop knows that they are not watched any more.
    closing: Vec<Connection>,
    /// Whether it has asked since.
    asked: Cell<bool>,
    active: Option<Active>,
    broken: Limited,
}

impl std::fmt::Debug for Fs {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Fs").field("tag", &self.tag).finish_non_exhaustive()
    }
}

impl Fs {
    /// `tag` is what the guest mounts by, at most 36 bytes.
    pub fn new(tag: String) -> Self {
        Self {
            tag,
            slot: Arc::default(),
            connections: Vec::new(),
            closing: Vec::new(),
            asked: Cell::new(false),
            active: None,
            broken: Limited::default(),
        }
    }

    pub fn handle(&self) -> FsHandle {
        FsHandle(self.slot.clone())
    }

    /// Sends requests while there are requests and idle sockets; of each queue at most as many as
    /// it has entries, so that a guest that refills it leaves other devices their turn.
    fn pump(&mut self) -> Result<Pending, DeviceError> {
        if self.asked.get() {
            self.closing.clear();
        }
        let (arrived, held) = {
            let mut slot = lock(&self.slot);
            (std::mem::take(&mut slot.arrived), slot.held)
        };
        self.connections.extend(arrived.into_iter().map(Connection::new));
        if held {
            // The doorbells go on ringing, and are heard when the VM goes on.
            return Ok(Pending::queue(HIGH_PRIORITY).with(Pending::queue(REQUESTS)));
        }
        let mut pending = Pending::NONE;
        for queue in [HIGH_PRIORITY, REQUESTS] {
            let mut budget = spec::QUEUE_SIZES[usize::from(queue)];
            while let Some((chain, header, length)) = self.next(queue)? {
                budget -= 1;
                let idle = self.connections.iter_mut().find(|connection| connection.is_idle());
                match idle {
                    _ if length > MAX_MESSAGE => self.answer(queue, &chain, &header, libc::EIO)?,
                    None => self.answer(queue, &chain, &header, libc::ENOTCONN)?,
                    Some(connection) => {
                        connection.begin(queue, chain, header, length);
                        let fd = connection.fd();
                        self.advance(fd)?;
                    }
                }
                self.count_in_flight();
                if budget == 0 {
                    pending = pending.with(Pending::queue(queue));
                    break;
                }
            }
        }
        Ok(pending)
    }

    /// The next request of a queue, if it can be served now.
    fn next(&mut self, queue: u16) -> Result<Option<(HeldChain, [u8; IN_HEADER], usize)>, DeviceError> {
        let busy = !self.connections.is_empty() && !self.connections.iter().any(Connection::is_idle);
        let Some(active) = &mut self.active else { return Ok(None) };
        if busy {
            return Ok(None);
        }
        let Some(entry) = active.queues.get_mut(usize::from(queue)) else { return Ok(None) };
        let memory = &active.context.memory;
        let held = loop {
            if let Some(held) = entry.hold(memory)? {
                break held;
            }
            if !entry.enable_notification(memory)? {
                return Ok(None);
            }
        };
        let chain = held.resolve(memory);
        let mut header = [0; IN_HEADER];
        if chain.readable.read_at(0, &mut header) < IN_HEADER {
            return Err(entry.driver_error("request is shorter than its header of 40 bytes"));
        }
        let length = chain.readable.len();
        let mut slot = lock(&self.slot);
        slot.metrics.requests += 1;
        slot.metrics.sent_bytes += length as u64;
        drop(slot);
        Ok(Some((held, header, length)))
    }

    /// Lets the request on one socket go on.
    fn advance(&mut self, fd: RawFd) -> Result<(), DeviceError> {
        let Some(active) = &self.active else { return Ok(()) };
        let Some(at) = self.connections.iter().position(|connection| connection.fd() == fd) else {
            return Ok(());
        };
        match self.connections[at].progress(&active.context.memory) {
            Ok(None) => Ok(()),
            Ok(Some(done)) => {
                lock(&self.slot).metrics.received_bytes += done.written as u64;
                self.complete(done.queue, done.head, done.written)
            }
            Err(error) => {
                self.broken.warn(DEVICE, format_args!("a socket of the file server: {error}; it is closed"));
                let mut connection = self.connections.swap_remove(at);
                let orphan = connection.abandon();
                self.close(connection);
                if self.connections.is_empty() {
                    log::error(DEVICE, format_args!("the file server is gone; its files cannot be reached"));
                }
                match orphan {
                    Some(Orphan { queue, chain, header }) => self.answer(queue, &chain, &header, libc::EIO),
                    None => Ok(()),
                }
            }
        }
    }

    fn count_in_flight(&self) {
        let busy = self.connections.iter().filter(|connection| !connection.is_idle()).count();
        lock(&self.slot).in_flight = busy;
    }

    fn close(&mut self, connection: Connection) {
        self.closing.push(connection);
        self.asked.set(false);
    }

    /// Answers a request with an error, if it has room for an answer.
    fn answer(
        &mut self,
        queue: u16,
        chain: &HeldChain,
        request: &[u8; IN_HEADER],
        errno: i32,
    ) -> Result<(), DeviceError> {
        let Some(active) = &self.active else { return Ok(()) };
        let room = chain.resolve(&active.context.memory).writable;
        let written =
            if room.len() < OUT_HEADER { 0 } else { room.write_at(0, &spec::error_reply(request, errno)) };
        lock(&self.slot).metrics.errors += 1;
        self.complete(queue, chain.head(), written)
    }

    fn complete(&mut self, queue: u16, head: u16, written: usize) -> Result<(), DeviceError> {
        let Some(active) = &mut self.active else { return Ok(()) };
        let Some(entry) = active.queues.get_mut(usize::from(queue)) else { return Ok(()) };
        let memory = &active.context.memory;
        entry.complete(memory, head, written)?;
        if entry.needs_interrupt(memory)? {
            active.context.interrupt.used();
        }
        Ok(())
    }
}

impl VirtioDevice for Fs {
    fn device_type(&self) -> u32 {
        spec::DEVICE_TYPE
    }

    fn name(&self) -> &str {
        DEVICE
    }

    fn features(&self) -> u64 {
        F_INDIRECT_DESC | F_EVENT_IDX
    }

    fn queue_sizes(&self) -> &[u16] {
        &spec::QUEUE_SIZES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let config = spec::config(&self.tag);
        read_space(&config, offset, data);
    }

    fn activate(&mut self, context: ActiveContext, queues: Vec<Queue>) -> Result<(), DeviceError> {
        let Ok([high_priority, requests]) = <[Queue; 2]>::try_from(queues) else {
            let detail = "activated without its two queues".into();
            return Err(DeviceError::Driver { device: DEVICE, detail });
        };
        let queues = [
            DeviceQueue::new(high_priority, HIGH_PRIORITY, DEVICE),
            DeviceQueue::new(requests, REQUESTS, DEVICE),
        ];
        self.active = Some(Active { context, queues });
        Ok(())
    }

    fn reset(&mut self) {
        self.active = None;
        let (idle, busy) = self.connections.drain(..).partition(Connection::is_idle);
        self.connections = idle;
        Vec::into_iter(busy).for_each(|connection| self.close(connection));
        self.count_in_flight();
    }

    fn save(&self) -> Result<Saved, SaveError> {
        let queues = self.active.iter().flat_map(|active| &active.queues);
        let positions = queues.map(|queue| queue.position(0)).collect();
        let slot = lock(&self.slot);
        if slot.in_flight > 0 {
            let detail = "requests are with the file server".to_owned();
            return Err(SaveError { part: DEVICE.to_owned(), detail });
        }
        let own = FsStateV2 { served: slot.attached || slot.expected };
        Ok(Saved { positions, own: PartState::new(DEVICE, state::VERSION, &own)? })
    }

    /// The server is another one, whose own state is its own.
    fn restore(&mut self, own: &PartState) -> Result<(), RestoreError> {
        own.check_version(DEVICE, state::VERSION)?;
        // Before version 2 nobody saved a guest that had one.
        let served = own.version > 1 && own.read::<FsStateV2>(DEVICE, state::VERSION)?.served;
        lock(&self.slot).expected = served;
        Ok(())
    }

    fn process_queue(&mut self, _index: u16) -> Result<Pending, DeviceError> {
        self.pump()
    }

    fn watches(&self) -> Vec<Watch> {
        self.asked.set(true);
        self.connections.iter().map(Connection::watch).collect()
    }

    fn process_backend(
        &mut self,
        fd: RawFd,
        _readable: bool,
        _writable: bool,
    ) -> Result<Pending, DeviceError> {
        self.advance(fd)?;
        self.count_in_flight();
        self.pump()
    }
}
