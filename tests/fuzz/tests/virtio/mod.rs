//! What the virtio property tests share: a guest's view of one device, raw.
#![allow(dead_code, clippy::unwrap_used, clippy::cast_possible_truncation)]

use std::os::fd::AsRawFd;

use spore_vmm::bus::MmioDevice;
use spore_vmm::devices::virtio::VirtioDevice;
use spore_vmm::devices::virtio::transport::{F_VERSION_1, MmioTransport, status};
use spore_vmm::memory::GuestRam;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// Two regions with a hole between, so that buffers can straddle it.
pub(crate) const LOW: usize = 0x40_0000;
pub(crate) const HIGH_BASE: u64 = 0x50_0000;
pub(crate) const HIGH: usize = 0x1_0000;

pub(crate) const TABLE: u64 = 0;
pub(crate) const AVAILABLE: u64 = 0x4000;
pub(crate) const USED: u64 = 0x8000;

const DEVICE: u64 = u64::MAX;

pub(crate) struct Machine {
    pub(crate) transport: MmioTransport,
    pub(crate) memory: GuestRam,
    pub(crate) sizes: Vec<u16>,
    epoll: Epoll,
    device_fd: Option<i32>,
    _irq: EventFd,
}

impl Machine {
    pub(crate) fn new(device: Box<dyn VirtioDevice>) -> Self {
        let memory =
            GuestRam::from_ranges(&[(GuestAddress(0), LOW), (GuestAddress(HIGH_BASE), HIGH)]).unwrap();
        let irq = EventFd::new(EFD_NONBLOCK).unwrap();
        let sizes = device.queue_sizes().to_vec();
        let device_fd = device.watches().first().map(|watch| watch.fd);
        let transport = MmioTransport::new(device, memory.clone(), irq.try_clone().unwrap()).unwrap();
        let epoll = Epoll::new().unwrap();
        let bells = transport.doorbells().iter().map(AsRawFd::as_raw_fd);
        for (fd, token) in bells.zip(0..).chain(device_fd.map(|fd| (fd, DEVICE))) {
            epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(EventSet::IN, token)).unwrap();
        }
        Self { transport, memory, sizes, epoll, device_fd, _irq: irq }
    }

    pub(crate) fn write(&mut self, offset: u64, value: u32) {
        self.transport.write(offset, &value.to_le_bytes());
    }

    pub(crate) fn read(&mut self, offset: u64) -> u32 {
        let mut word = [0; 4];
        self.transport.read(offset, &mut word);
        u32::from_le_bytes(word)
    }

    /// Where the rings of a queue are.
    pub(crate) fn ring(queue: usize) -> u64 {
        0x1_0000 * (queue as u64 + 1)
    }

    /// Resets, negotiates, clears the rings, sets DRIVER_OK.
    pub(crate) fn start(&mut self, features: u64) {
        self.write(0x70, 0);
        self.write(0x70, status::ACKNOWLEDGE);
        self.write(0x70, status::ACKNOWLEDGE | status::DRIVER);
        let mut offered = 0;
        for half in [0, 1] {
            self.write(0x14, half);
            offered |= u64::from(self.read(0x10)) << (32 * half);
        }
        let accepted = offered & (features | F_VERSION_1);
        for (half, word) in [(0, accepted as u32), (1, (accepted >> 32) as u32)] {
            self.write(0x24, half);
            self.write(0x20, word);
        }
        let negotiated = status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK;
        self.write(0x70, negotiated);
        for queue in 0..self.sizes.len() {
            let base = Self::ring(queue);
            self.put(base, &[0; 0x1_0000]);
            self.write(0x30, queue as u32);
            self.write(0x38, self.sizes[queue].into());
            for (register, at) in [(0x80, TABLE), (0x90, AVAILABLE), (0xa0, USED)] {
                self.write(register, (base + at) as u32);
                self.write(register + 4, 0);
            }
            self.write(0x44, 1);
        }
        self.write(0x70, negotiated | status::DRIVER_OK);
        assert_eq!(self.read(0x70), negotiated | status::DRIVER_OK);
    }

    pub(crate) fn put(&self, at: u64, bytes: &[u8]) {
        self.memory.write_slice(bytes, GuestAddress(at)).unwrap();
    }

    pub(crate) fn get(&self, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory.read_slice(&mut bytes, GuestAddress(at)).unwrap();
        bytes
    }

    pub(crate) fn u16_at(&self, at: u64) -> u16 {
        self.memory.read_obj(GuestAddress(at)).unwrap()
    }

    pub(crate) fn used_index(&self, queue: usize) -> u16 {
        self.u16_at(Self::ring(queue) + USED + 2)
    }

    pub(crate) fn needs_reset(&mut self) -> bool {
        self.read(0x70) & status::NEEDS_RESET != 0
    }

    /// Serves doorbells and sockets, as the event loop does, until all is quiet; false when
    /// it never becomes so.
    pub(crate) fn settle(&mut self) -> bool {
        for _ in 0..200 {
            let mut events = [EpollEvent::default(); 8];
            let count = self.epoll.wait(0, &mut events).unwrap();
            if count == 0 {
                return true;
            }
            for event in &events[..count] {
                if event.data() == DEVICE {
                    self.transport.process_backend(self.device_fd.unwrap(), true, false);
                } else {
                    self.transport.process_queue(event.data() as u16);
                }
            }
        }
        false
    }
}
