//! A guest driver for tests: negotiates through the registers, keeps rings in guest memory.
//!
//! (`virtio-queue`'s own mock queue lets its available and used rings overlap.)
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::cast_possible_truncation)]

use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::VirtioDevice;
use super::transport::{F_EVENT_IDX, F_INDIRECT_DESC, F_VERSION_1, MmioTransport, status};
use crate::bus::MmioDevice;
use crate::memory::GuestRam;

pub(crate) const MEMORY: usize = 16 << 20;
/// Where tests may put buffers.
pub(crate) const DATA: u64 = 0x10_0000;

pub(crate) fn memory() -> GuestRam {
    GuestRam::from_ranges(&[(GuestAddress(0), MEMORY)]).unwrap()
}

/// One buffer of a chain.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Part {
    pub(crate) addr: u64,
    pub(crate) len: u32,
    pub(crate) writable: bool,
}

pub(crate) fn readable(addr: u64, len: usize) -> Part {
    Part { addr, len: len as u32, writable: false }
}

pub(crate) fn writable(addr: u64, len: usize) -> Part {
    Part { addr, len: len as u32, writable: true }
}

#[derive(Debug, Clone, Copy, Default)]
struct Ring {
    size: u16,
    base: u64,
    next_descriptor: u16,
    available: u16,
    used: u16,
}

pub(crate) struct Driver {
    pub(crate) transport: MmioTransport,
    pub(crate) memory: GuestRam,
    pub(crate) irq: EventFd,
    rings: Vec<Ring>,
}

impl Driver {
    /// Registers only; nothing negotiated.
    pub(crate) fn raw(device: impl VirtioDevice + 'static) -> Self {
        let memory = memory();
        let irq = EventFd::new(EFD_NONBLOCK).unwrap();
        let transport =
            MmioTransport::new(Box::new(device), memory.clone(), irq.try_clone().unwrap()).unwrap();
        Self { transport, memory, irq, rings: Vec::new() }
    }

    /// Activated with everything that is offered.
    pub(crate) fn new(device: impl VirtioDevice + 'static) -> Self {
        Self::with_features(device, !0)
    }

    pub(crate) fn with_features(device: impl VirtioDevice + 'static, mask: u64) -> Self {
        let mut driver = Self::raw(device);
        driver.negotiate(mask);
        driver.set_up_queues();
        driver.add_status(status::DRIVER_OK);
        driver
    }

    /// The same guest with another device, which takes up the state of this one. It has the same memory, so this one is to be left.
    pub(crate) fn restored(&self, device: impl VirtioDevice + 'static) -> Self {
        let irq = EventFd::new(EFD_NONBLOCK).unwrap();
        let (memory, rings) = (self.memory.clone(), self.rings.clone());
        let mut transport =
            MmioTransport::new(Box::new(device), memory.clone(), irq.try_clone().unwrap()).unwrap();
        transport.restore(&self.transport.save().unwrap()).unwrap();
        Self { transport, memory, irq, rings }
    }

    pub(crate) fn read(&mut self, offset: u64) -> u32 {
        let mut word = [0; 4];
        self.transport.read(offset, &mut word);
        u32::from_le_bytes(word)
    }

    pub(crate) fn write(&mut self, offset: u64, value: u32) {
        self.transport.write(offset, &value.to_le_bytes());
    }

    pub(crate) fn status(&mut self) -> u32 {
        self.read(0x70)
    }

    pub(crate) fn add_status(&mut self, bits: u32) {
        let old = self.status();
        self.write(0x70, old | bits);
    }

    pub(crate) fn offered(&mut self) -> u64 {
        self.write(0x14, 0);
        let low = u64::from(self.read(0x10));
        self.write(0x14, 1);
        low | u64::from(self.read(0x10)) << 32
    }

    pub(crate) fn negotiate(&mut self, mask: u64) {
        self.write(0x70, 0);
        self.add_status(status::ACKNOWLEDGE);
        self.add_status(status::DRIVER);
        let features = self.offered() & (mask | F_VERSION_1);
        for (select, word) in [(0, features as u32), (1, (features >> 32) as u32)] {
            self.write(0x24, select);
            self.write(0x20, word);
        }
        self.add_status(status::FEATURES_OK);
        assert_ne!(self.status() & status::FEATURES_OK, 0);
    }

    pub(crate) fn set_up_queues(&mut self) {
        self.rings.clear();
        for index in 0.. {
            self.write(0x30, index);
            let size = self.read(0x34);
            if size == 0 {
                break;
            }
            let base = 0x1_0000 * u64::from(index + 1);
            self.memory.write_slice(&[0; 0x1_0000], GuestAddress(base)).unwrap();
            self.write(0x38, size);
            for (register, offset) in [(0x80, 0), (0x90, 0x4000), (0xa0, 0x8000)] {
                self.write(register, (base + offset) as u32);
                self.write(register + 4, 0);
            }
            self.write(0x44, 1);
            assert_eq!(self.read(0x44), 1);
            self.rings.push(Ring { size: size as u16, base, ..Ring::default() });
        }
    }

    pub(crate) fn fill(&self, addr: u64, bytes: &[u8]) {
        self.memory.write_slice(bytes, GuestAddress(addr)).unwrap();
    }

    pub(crate) fn bytes(&self, addr: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory.read_slice(&mut bytes, GuestAddress(addr)).unwrap();
        bytes
    }

    /// Writes one raw descriptor of a queue's table.
    pub(crate) fn descriptor(&self, queue: usize, index: u16, addr: u64, len: u32, flags: u16, next: u16) {
        let mut raw = addr.to_le_bytes().to_vec();
        raw.extend(len.to_le_bytes());
        raw.extend(flags.to_le_bytes());
        raw.extend(next.to_le_bytes());
        self.fill(self.rings[queue].base + 16 * u64::from(index), &raw);
    }

    /// Makes a head available.
    pub(crate) fn offer(&mut self, queue: usize, head: u16) {
        let ring = &mut self.rings[queue];
        let avail = ring.base + 0x4000;
        let slot = avail + 4 + 2 * u64::from(ring.available % ring.size);
        ring.available = ring.available.wrapping_add(1);
        let available = ring.available;
        self.fill(slot, &head.to_le_bytes());
        self.fill(avail + 2, &available.to_le_bytes());
    }

    /// Makes a chain available; its head. Descriptors are used round-robin.
    pub(crate) fn add(&mut self, queue: usize, parts: &[Part]) -> u16 {
        let size = self.rings[queue].size;
        let head = self.rings[queue].next_descriptor;
        for (number, part) in parts.iter().enumerate() {
            let index = (head + number as u16) % size;
            let last = number + 1 == parts.len();
            let flags = u16::from(!last) | u16::from(part.writable) << 1;
            self.descriptor(queue, index, part.addr, part.len, flags, (index + 1) % size);
        }
        self.rings[queue].next_descriptor = (head + parts.len() as u16) % size;
        self.offer(queue, head);
        head
    }

    /// Rings the doorbell and lets the device work until it waits for the guest.
    pub(crate) fn kick(&mut self, queue: u16) {
        self.write(0x50, queue.into());
        self.settle();
    }

    /// Serves doorbells that are rung, as the event loop does.
    pub(crate) fn settle(&mut self) {
        use std::os::fd::AsRawFd;
        for _ in 0..10_000 {
            let mut quiet = true;
            for index in 0..self.transport.doorbells().len() {
                let fd = self.transport.doorbells()[index].as_raw_fd();
                if poll_readable(fd, 0) {
                    quiet = false;
                    self.transport.process_queue(index as u16);
                }
            }
            if quiet {
                return;
            }
        }
        panic!("doorbells never became quiet");
    }

    /// What the device completed since the last call: head and written length.
    pub(crate) fn used(&mut self, queue: usize) -> Vec<(u16, u32)> {
        let ring = self.rings[queue];
        let used = ring.base + 0x8000;
        let index: u16 = self.memory.read_obj(GuestAddress(used + 2)).unwrap();
        let mut list = Vec::new();
        let mut next = ring.used;
        while next != index {
            let at = used + 4 + 8 * u64::from(next % ring.size);
            let id: u32 = self.memory.read_obj(GuestAddress(at)).unwrap();
            let len: u32 = self.memory.read_obj(GuestAddress(at + 4)).unwrap();
            list.push((id as u16, len));
            next = next.wrapping_add(1);
        }
        self.rings[queue].used = next;
        // used_event: interrupt at the next one.
        self.fill(ring.base + 0x4000 + 4 + 2 * u64::from(ring.size), &next.to_le_bytes());
        list
    }

    /// Whether an interrupt came since the last call; acknowledges it and returns its status.
    pub(crate) fn interrupt(&mut self) -> Option<u32> {
        self.irq.read().ok()?;
        let status = self.read(0x60);
        self.write(0x64, status);
        Some(status)
    }

    pub(crate) fn needs_reset(&mut self) -> bool {
        self.status() & status::NEEDS_RESET != 0
    }
}

/// Waits for a descriptor to become readable.
pub(crate) fn poll_readable(fd: std::os::fd::RawFd, milliseconds: i32) -> bool {
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    use std::os::fd::BorrowedFd;
    #[allow(unsafe_code)]
    // SAFETY: the tests keep the descriptor open over the call.
    let fd = unsafe { BorrowedFd::borrow_raw(fd) };
    let mut set = [PollFd::new(fd, PollFlags::POLLIN)];
    poll(&mut set, PollTimeout::try_from(milliseconds).unwrap()).unwrap() > 0
}

/// Ring features, to leave out.
pub(crate) const RING_FEATURES: u64 = F_EVENT_IDX | F_INDIRECT_DESC;
