//! The socket device: its queues, and the packets between them and the muxer.

use std::io;
use std::os::fd::RawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use virtio_queue::Queue;

use super::metrics::Counters;
use super::muxer::Muxer;
use super::spec::{self, EVENT, HEADER, Header, RX, TX};
use crate::api::VsockMetrics;
use crate::devices::virtio::queue::DeviceQueue;
use crate::devices::virtio::transport::{F_EVENT_IDX, F_INDIRECT_DESC};
use crate::devices::virtio::{ActiveContext, DeviceError, Pending, Saved, VirtioDevice, Watch, read_space};
use crate::snapshot::contract::{PartState, RestoreError, SaveError};

const DEVICE: &str = "vsock";
/// Packets per call and direction before other devices get their turn. One call sees a whole
/// queue, which [`Vsock::expire`] counts on.
const BUDGET: usize = spec::QUEUE_SIZES[TX as usize] as usize;

/// Why a socket device could not be made.
#[derive(Debug, thiserror::Error)]
pub enum VsockError {
    #[error("vsock: guest cid {cid} is reserved; give one from 3 to 4294967294")]
    Cid { cid: u32 },
    #[error("vsock: prepare the listener: {0}")]
    Host(#[from] io::Error),
}

struct Active {
    context: ActiveContext,
    rx: DeviceQueue,
    tx: DeviceQueue,
    event: DeviceQueue,
}

/// The socket device.
pub struct Vsock {
    guest_cid: u32,
    muxer: Muxer,
    active: Option<Active>,
    counters: Arc<Counters>,
    /// Packets of the guest wait until it has taken answers.
    tx_stalled: bool,
    /// The guest is to hear that all connections are gone.
    reset_due: bool,
}

/// The control plane's end of the device.
#[derive(Debug, Clone)]
pub struct VsockHandle(Arc<Counters>);

impl VsockHandle {
    /// Counters: `rx` is towards the guest, `tx` from it.
    pub fn metrics(&self) -> VsockMetrics {
        self.0.snapshot()
    }

    /// The VM goes on after a pause: handshakes under way get their whole time anew.
    pub fn resumed(&self) {
        self.0.note_resumed();
    }

    /// Bytes of the guest that wait for host peers to take them.
    pub fn unsent(&self) -> u64 {
        self.0.unsent()
    }
}

impl std::fmt::Debug for Vsock {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Vsock")
            .field("guest_cid", &self.guest_cid)
            .field("connections", &self.muxer.connections())
            .finish_non_exhaustive()
    }
}

impl Vsock {
    /// `listener` takes host clients; `on_connection` gets the port and the host's end of
    /// each connection that the guest opens to one of `host_ports`. It runs on the
    /// event-loop thread, under the device's lock.
    pub fn new(
        guest_cid: u32,
        listener: UnixListener,
        host_ports: Vec<u32>,
        on_connection: Box<dyn FnMut(u32, UnixStream) + Send>,
    ) -> Result<Self, VsockError> {
        if guest_cid <= 2 || guest_cid == u32::MAX {
            return Err(VsockError::Cid { cid: guest_cid });
        }
        let counters = Arc::new(Counters::default());
        let muxer = Muxer::new(guest_cid, listener, host_ports, on_connection, counters.clone())?;
        Ok(Self { guest_cid, muxer, active: None, counters, tx_stalled: false, reset_due: false })
    }

    pub fn handle(&self) -> VsockHandle {
        VsockHandle(self.counters.clone())
    }

    /// How long a host client may take to say where to (10 s unless set), and the guest to
    /// answer (60 s).
    pub fn set_handshake_timeouts(&mut self, greeting: Duration, connecting: Duration) {
        self.muxer.set_patience(greeting, connecting);
    }

    /// Connections that are open or being opened.
    pub fn connections(&self) -> usize {
        self.muxer.connections()
    }

    /// Ends every connection and tells the guest so (TRANSPORT_RESET), as a restore must.
    pub fn transport_reset(&mut self) -> Result<(), DeviceError> {
        self.muxer.set_active(self.active.is_some());
        self.tx_stalled = false;
        self.reset_due = true;
        self.process_event()
    }

    fn process_event(&mut self) -> Result<(), DeviceError> {
        let Some(active) = &mut self.active else { return Ok(()) };
        if !self.reset_due {
            return Ok(());
        }
        let memory = &active.context.memory;
        // Without a buffer the event waits for the guest to give one.
        let Some(chain) = active.event.pop(memory)? else { return Ok(()) };
        let event = spec::EVENT_TRANSPORT_RESET.to_le_bytes();
        let written = chain.writable.write_at(0, &event);
        if written < event.len() {
            return Err(active.event.driver_error("event buffer is shorter than 4 bytes"));
        }
        active.event.complete(memory, chain.head, written)?;
        self.reset_due = false;
        if active.event.needs_interrupt(memory)? {
            active.context.interrupt.used();
        }
        Ok(())
    }

    /// Packets of the guest.
    fn process_tx(&mut self) -> Result<Pending, DeviceError> {
        let Some(active) = &mut self.active else { return Ok(Pending::NONE) };
        let memory = &active.context.memory;
        let queue = &mut active.tx;
        queue.disable_notification(memory)?;
        let mut completed = false;
        let mut budget = BUDGET;
        let pending = loop {
            self.tx_stalled = self.muxer.congested();
            if self.tx_stalled {
                break Pending::NONE;
            }
            if budget == 0 {
                break Pending::queue(TX);
            }
            budget -= 1;
            let Some(chain) = queue.pop(memory)? else {
                if queue.enable_notification(memory)? {
                    continue;
                }
                break Pending::NONE;
            };
            let mut raw = [0; HEADER];
            if chain.readable.read_at(0, &mut raw) < HEADER || !chain.writable.is_empty() {
                return Err(queue.driver_error("packet must be readable only and have a header of 44 bytes"));
            }
            self.muxer.receive(&Header::decode(&raw), &chain.readable.range(HEADER, usize::MAX));
            queue.complete(memory, chain.head, 0)?;
            completed = true;
        };
        if completed && queue.needs_interrupt(memory)? {
            active.context.interrupt.used();
        }
        Ok(pending)
    }

    /// Packets for the guest, as far as it has buffers.
    fn pump_rx(&mut self) -> Result<Pending, DeviceError> {
        let Some(active) = &mut self.active else { return Ok(Pending::NONE) };
        let memory = &active.context.memory;
        let queue = &mut active.rx;
        let mut completed = false;
        let mut budget = BUDGET;
        let mut pending = Pending::NONE;
        while self.muxer.has_output() {
            if budget == 0 {
                pending = Pending::queue(RX);
                break;
            }
            let Some(chain) = queue.pop(memory)? else {
                if queue.enable_notification(memory)? {
                    continue;
                }
                break;
            };
            if chain.writable.len() <= HEADER || !chain.readable.is_empty() {
                return Err(
                    queue.driver_error("receive buffer must be writable only and longer than 44 bytes")
                );
            }
            let Some(header) = self.muxer.produce(&chain.writable.range(HEADER, usize::MAX)) else {
                queue.undo_pop();
                break;
            };
            chain.writable.write_at(0, &header.encode());
            queue.complete(memory, chain.head, HEADER + header.len as usize)?;
            completed = true;
            budget -= 1;
        }
        if completed && queue.needs_interrupt(memory)? {
            active.context.interrupt.used();
        }
        Ok(pending)
    }

    /// Ends late handshakes. The answers that the guest has already given are taken up before, so
    /// that time which this process did not get is not held against the guest.
    fn expire(&mut self) -> Result<Pending, DeviceError> {
        let mut pending = Pending::NONE;
        if self.tx_stalled {
            pending = pending.with(self.pump_rx()?);
        }
        pending = pending.with(self.process_tx()?);
        self.muxer.expire(Instant::now());
        Ok(pending)
    }

    /// Delivers what there is; lets stalled packets of the guest go on.
    fn pump(&mut self, pending: Pending) -> Result<Pending, DeviceError> {
        let pending = pending.with(self.pump_rx()?);
        if self.tx_stalled && !self.muxer.congested() {
            return Ok(pending.with(Pending::queue(TX)));
        }
        Ok(pending)
    }
}

impl VirtioDevice for Vsock {
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
        let config = u64::from(self.guest_cid).to_le_bytes();
        read_space(&config, offset, data);
    }

    fn activate(&mut self, context: ActiveContext, queues: Vec<Queue>) -> Result<(), DeviceError> {
        let Ok([rx, tx, event]) = <[Queue; 3]>::try_from(queues) else {
            return Err(DeviceError::Driver {
                device: DEVICE,
                detail: "activated without its three queues".into(),
            });
        };
        let mut rx = DeviceQueue::new(rx, RX, DEVICE);
        // New receive buffers matter only when something waits for them.
        rx.disable_notification(&context.memory)?;
        self.active = Some(Active {
            context,
            rx,
            tx: DeviceQueue::new(tx, TX, DEVICE),
            event: DeviceQueue::new(event, EVENT, DEVICE),
        });
        self.muxer.set_active(true);
        self.tx_stalled = false;
        Ok(())
    }

    fn reset(&mut self) {
        self.active = None;
        self.muxer.set_active(false);
        self.tx_stalled = false;
        self.reset_due = false;
    }

    /// Connections are left out: they end with the restore.
    fn save(&self) -> Result<Saved, SaveError> {
        let queues = self.active.iter().flat_map(|active| [&active.rx, &active.tx, &active.event]);
        let positions = queues.map(|queue| queue.position(0)).collect();
        Ok(Saved { positions, own: PartState::none() })
    }

    /// Has the guest told that its connections are gone, as soon as it runs and has a buffer for that.
    fn restore(&mut self, own: &PartState) -> Result<(), RestoreError> {
        own.check_version(DEVICE, 1)?;
        self.reset_due = true;
        Ok(())
    }

    fn process_queue(&mut self, index: u16) -> Result<Pending, DeviceError> {
        match index {
            RX => {
                if let Some(active) = &mut self.active {
                    active.rx.disable_notification(&active.context.memory)?;
                }
                self.pump(Pending::NONE)
            }
            TX => {
                let pending = self.process_tx()?;
                self.pump(pending)
            }
            _ => self.process_event().map(|()| Pending::NONE),
        }
    }

    fn watches(&self) -> Vec<Watch> {
        vec![Watch { fd: self.muxer.fd(), readable: true, writable: false }]
    }

    fn process_backend(
        &mut self,
        _fd: RawFd,
        _readable: bool,
        _writable: bool,
    ) -> Result<Pending, DeviceError> {
        self.muxer.poll().map_err(|source| DeviceError::Host {
            device: DEVICE,
            detail: "poll sockets".into(),
            source,
        })?;
        let pending = if self.muxer.timer_fired() { self.expire()? } else { Pending::NONE };
        self.pump(pending)
    }
}
