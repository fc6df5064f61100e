//! A polling driver for virtio-mmio version 2 (virtio 1.2, section 4.2) and split
//! virtqueues (section 2.7).

pub mod balloon;
pub mod blk;
pub mod net;
pub mod rng;
pub mod vsock;

use core::sync::atomic::{Ordering, fence};

use crate::{cpu, memory};

const FIRST_SLOT: u64 = 0xd000_0000;
const SLOT_SIZE: u64 = 0x1000;
pub const SLOTS: u64 = 32;
const MAGIC: u32 = 0x7472_6976;

const FEATURES: u64 = 0x10;
const FEATURES_SELECT: u64 = 0x14;
const DRIVER_FEATURES: u64 = 0x20;
const DRIVER_FEATURES_SELECT: u64 = 0x24;
const QUEUE_SELECT: u64 = 0x30;
const QUEUE_SIZE_MAX: u64 = 0x34;
const QUEUE_SIZE: u64 = 0x38;
const QUEUE_READY: u64 = 0x44;
const QUEUE_NOTIFY: u64 = 0x50;
const INTERRUPT_STATUS: u64 = 0x60;
const INTERRUPT_ACK: u64 = 0x64;
const STATUS: u64 = 0x70;
const QUEUE_DESC: u64 = 0x80;
const QUEUE_DRIVER: u64 = 0x90;
const QUEUE_DEVICE: u64 = 0xa0;
const CONFIG_GENERATION: u64 = 0xfc;
const CONFIG: u64 = 0x100;

const VERSION_1: u64 = 1 << 32;

/// One slot of the bus.
#[derive(Clone, Copy)]
pub struct Device {
    pub base: u64,
    pub slot: u64,
}

/// The slots that hold a device of `kind` (0: any).
pub fn find(kind: u32) -> impl Iterator<Item = Device> {
    (0..SLOTS).map(|slot| Device { base: FIRST_SLOT + slot * SLOT_SIZE, slot }).filter(move |device| {
        device.read(0) == MAGIC && device.kind() != 0 && (kind == 0 || device.kind() == kind)
    })
}

impl Device {
    pub fn read(self, register: u64) -> u32 {
        cpu::mmio_read(self.base + register)
    }

    pub fn write(self, register: u64, value: u32) {
        cpu::mmio_write(self.base + register, value);
    }

    pub fn version(self) -> u32 {
        self.read(4)
    }

    pub fn kind(self) -> u32 {
        self.read(8)
    }

    pub fn gsi(self) -> u32 {
        6 + (self.slot % 18) as u32
    }

    pub fn config32(self, offset: u64) -> u32 {
        self.read(CONFIG + offset)
    }

    pub fn set_config32(self, offset: u64, value: u32) {
        self.write(CONFIG + offset, value);
    }

    /// Two halves under one generation (section 2.5.1).
    pub fn config64(self, offset: u64) -> u64 {
        loop {
            let before = self.read(CONFIG_GENERATION);
            let value = u64::from(self.config32(offset)) | u64::from(self.config32(offset + 4)) << 32;
            if self.read(CONFIG_GENERATION) == before {
                return value;
            }
        }
    }

    pub fn generation(self) -> u32 {
        self.read(CONFIG_GENERATION)
    }

    pub fn features(self) -> u64 {
        self.write(FEATURES_SELECT, 1);
        let high = u64::from(self.read(FEATURES));
        self.write(FEATURES_SELECT, 0);
        high << 32 | u64::from(self.read(FEATURES))
    }

    /// Interrupt causes, acknowledged.
    pub fn take_interrupts(self) -> u32 {
        let causes = self.read(INTERRUPT_STATUS);
        self.write(INTERRUPT_ACK, causes);
        causes
    }

    pub fn status(self) -> u32 {
        self.read(STATUS)
    }

    pub fn reset(self) {
        self.write(STATUS, 0);
        while self.status() != 0 {
            cpu::relax();
        }
    }

    /// Section 3.1.1 up to FEATURES_OK; `wanted` features are accepted where offered.
    pub fn negotiate(self, wanted: u64) -> Result<u64, &'static str> {
        self.reset();
        self.write(STATUS, 1);
        self.write(STATUS, 3);
        let offered = self.features();
        if offered & VERSION_1 == 0 {
            return Err("no VIRTIO_F_VERSION_1");
        }
        let accepted = offered & (wanted | VERSION_1);
        self.write(DRIVER_FEATURES_SELECT, 0);
        self.write(DRIVER_FEATURES, accepted as u32);
        self.write(DRIVER_FEATURES_SELECT, 1);
        self.write(DRIVER_FEATURES, (accepted >> 32) as u32);
        self.write(STATUS, 11);
        if self.status() & 8 == 0 {
            return Err("FEATURES_OK refused");
        }
        Ok(accepted)
    }

    pub fn start(self) {
        self.write(STATUS, 15);
    }

    /// Makes queue `index` with at most `SIZE` descriptors.
    pub fn queue(self, index: u32) -> Result<Queue, &'static str> {
        self.write(QUEUE_SELECT, index);
        let size = self.read(QUEUE_SIZE_MAX).min(SIZE as u32) as u16;
        if size == 0 {
            return Err("queue missing");
        }
        let ring = memory::allocate(3 * 4096);
        let base = ring.as_ptr() as u64;
        let queue = Queue {
            device: self,
            index,
            size,
            descriptors: base,
            available: base + 4096,
            used: base + 8192,
            next_available: 0,
            next_used: 0,
            free: [0; SIZE],
            free_count: 0,
        };
        self.write(QUEUE_SIZE, size.into());
        for (register, address) in
            [(QUEUE_DESC, queue.descriptors), (QUEUE_DRIVER, queue.available), (QUEUE_DEVICE, queue.used)]
        {
            self.write(register, address as u32);
            self.write(register + 4, (address >> 32) as u32);
        }
        self.write(QUEUE_READY, 1);
        if self.read(QUEUE_READY) != 1 {
            return Err("queue not ready");
        }
        Ok(queue.with_all_free())
    }
}

/// Most descriptors of a queue: the descriptor table then fills a page.
pub const SIZE: usize = 256;

/// A buffer of a chain: address, length, written by the device.
pub type Buffer = (u64, u32, bool);

pub struct Queue {
    device: Device,
    index: u32,
    size: u16,
    descriptors: u64,
    available: u64,
    used: u64,
    next_available: u16,
    next_used: u16,
    free: [u16; SIZE],
    free_count: usize,
}

impl Queue {
    fn with_all_free(mut self) -> Self {
        for index in 0..self.size {
            self.free[usize::from(index)] = self.size - 1 - index;
        }
        self.free_count = self.size.into();
        self
    }

    fn store<T>(address: u64, value: T) {
        // SAFETY: callers pass addresses inside the queue's own three pages, aligned.
        unsafe { (address as *mut T).write_volatile(value) }
    }

    fn load<T>(address: u64) -> T {
        // SAFETY: as in `store`.
        unsafe { (address as *const T).read_volatile() }
    }

    /// Makes a chain available and returns its head. The drivers never have more
    /// descriptors under way than the queue has.
    pub fn push(&mut self, chain: &[Buffer]) -> u16 {
        let first = self.free[self.free_count - 1];
        for (position, (address, length, writable)) in chain.iter().enumerate() {
            self.free_count -= 1;
            let at = self.descriptors + 16 * u64::from(self.free[self.free_count]);
            let last = position + 1 == chain.len();
            let next = if last { 0 } else { self.free[self.free_count - 1] };
            Self::store(at, *address);
            Self::store(at + 8, *length);
            Self::store(at + 12, u16::from(!last) | u16::from(*writable) << 1);
            Self::store(at + 14, next);
        }
        let entry = u64::from(self.next_available % self.size);
        Self::store(self.available + 4 + 2 * entry, first);
        fence(Ordering::SeqCst);
        self.next_available = self.next_available.wrapping_add(1);
        Self::store(self.available + 2, self.next_available);
        fence(Ordering::SeqCst);
        first
    }

    /// The descriptor with which the next chain will begin.
    pub fn next_free(&self) -> Option<u16> {
        self.free_count.checked_sub(1).map(|last| self.free[last])
    }

    /// Tells the device that interrupts are not wanted.
    pub fn poll_only(&self) {
        Self::store(self.available, 1u16);
    }

    /// Rings the doorbell unless the device has said that it looks by itself.
    pub fn kick_if_wanted(&self) {
        fence(Ordering::SeqCst);
        if Self::load::<u16>(self.used) & 1 == 0 {
            self.kick();
        }
    }

    pub fn kick(&self) {
        self.device.write(QUEUE_NOTIFY, self.index);
    }

    /// The next finished chain: head and bytes that the device wrote.
    pub fn pop(&mut self) -> Option<(u16, u32)> {
        if Self::load::<u16>(self.used + 2) == self.next_used {
            return None;
        }
        fence(Ordering::SeqCst);
        let at = self.used + 4 + 8 * u64::from(self.next_used % self.size);
        let (head, written): (u32, u32) = (Self::load(at), Self::load(at + 4));
        self.next_used = self.next_used.wrapping_add(1);
        // Give the chain's descriptors back, last first, so that `push` sees them in order.
        let mut chain = [0u16; SIZE];
        let mut length = 0;
        let mut index = head as u16;
        loop {
            chain[length] = index;
            length += 1;
            let at = self.descriptors + 16 * u64::from(index);
            if Self::load::<u16>(at + 12) & 1 == 0 || length == SIZE {
                break;
            }
            index = Self::load(at + 14);
        }
        for index in chain[..length].iter().rev() {
            self.free[self.free_count] = *index;
            self.free_count += 1;
        }
        Some((head as u16, written))
    }

    /// Waits for the next finished chain; `None` when the device wants a reset instead.
    pub fn wait(&mut self) -> Option<(u16, u32)> {
        let mut spins = 0u32;
        loop {
            if let Some(done) = self.pop() {
                return Some(done);
            }
            spins += 1;
            if spins & 0xfffff == 0 && self.device.status() & 0x40 != 0 {
                return None;
            }
            cpu::relax();
        }
    }
}
