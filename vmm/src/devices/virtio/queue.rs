//! Virtqueues as devices use them (virtio 1.2, 2.7): `virtio-queue`'s ring walking, with
//! every way that a driver can get a chain wrong turned into a [`DeviceError`], and a chain's
//! buffers resolved to checked slices of guest memory before the device sees them.
//!
//! `virtio-queue` ends its iteration alike at the last descriptor and at a broken one; here
//! the difference is told. Framing is free, as the specification asks (2.7.4.1): a device
//! sees bytes, not descriptors.

use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestMemory, VolatileSlice};

use super::DeviceError;
use crate::memory::{Gpa, GuestRam};

/// The buffers of one direction of a chain, in order.
#[derive(Debug, Default)]
pub struct Buffers<'m> {
    slices: Vec<VolatileSlice<'m>>,
    len: usize,
}

impl<'m> Buffers<'m> {
    fn push(&mut self, slice: VolatileSlice<'m>) {
        if !slice.is_empty() {
            self.len += slice.len();
            self.slices.push(slice);
        }
    }

    /// Bytes in all.
    pub fn len(&self) -> usize {
        self.len
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    pub fn slices(&self) -> &[VolatileSlice<'m>] {
        &self.slices
    }

    /// The part of at most `len` bytes from `offset`, shorter where the buffers end.
    pub fn range(&self, offset: usize, len: usize) -> Self {
        let (mut skip, mut left) = (offset, len);
        let mut part = Self::default();
        for slice in &self.slices {
            if left == 0 {
                break;
            }
            if skip >= slice.len() {
                skip -= slice.len();
                continue;
            }
            let take = left.min(slice.len() - skip);
            // In bounds by the lines above; an error would only shorten the part.
            if let Ok(piece) = slice.subslice(skip, take) {
                part.push(piece);
            }
            skip = 0;
            left -= take;
        }
        part
    }

    /// Copies from `offset` on into `data`; the number of bytes that there were.
    pub fn read_at(&self, offset: usize, data: &mut [u8]) -> usize {
        let mut done = 0;
        for slice in self.range(offset, data.len()).slices {
            done += slice.copy_to(&mut data[done..]);
        }
        done
    }

    /// Copies `data` to `offset`; the number of bytes that there was room for.
    pub fn write_at(&self, offset: usize, data: &[u8]) -> usize {
        let mut done = 0;
        for slice in self.range(offset, data.len()).slices {
            let len = slice.len();
            slice.copy_from(&data[done..done + len]);
            done += len;
        }
        done
    }
}

/// A descriptor chain that the driver made available.
#[derive(Debug)]
pub struct Chain<'m> {
    pub head: u16,
    /// What the driver wrote for the device.
    pub readable: Buffers<'m>,
    /// Where the device may write.
    pub writable: Buffers<'m>,
}

/// A chain that is answered later: where its buffers are. A driver that changes its descriptors
/// meanwhile changes nothing here.
#[derive(Debug, Clone)]
pub struct HeldChain {
    head: u16,
    /// Address, length, and whether the device may write there.
    parts: Vec<(Gpa, usize, bool)>,
}

impl HeldChain {
    pub fn head(&self) -> u16 {
        self.head
    }

    /// Where the buffers are, for a device that is told of memory itself.
    pub fn parts(&self) -> &[(Gpa, usize, bool)] {
        &self.parts
    }

    /// The chain's buffers. Every range was found inside `memory` when the chain was taken.
    pub fn resolve<'m>(&self, memory: &'m GuestRam) -> Chain<'m> {
        let mut chain = Chain { head: self.head, readable: Buffers::default(), writable: Buffers::default() };
        for &(address, len, writable) in &self.parts {
            let part = if writable { &mut chain.writable } else { &mut chain.readable };
            memory.get_slices(address, len).flatten().for_each(|slice| part.push(slice));
        }
        chain
    }
}

/// An active queue of one device.
#[derive(Debug)]
pub struct DeviceQueue {
    queue: Queue,
    index: u16,
    device: &'static str,
}

impl DeviceQueue {
    pub fn new(queue: Queue, index: u16, device: &'static str) -> Self {
        Self { queue, index, device }
    }

    /// An error of the driver on this queue.
    pub fn driver_error(&self, detail: impl std::fmt::Display) -> DeviceError {
        DeviceError::Driver { device: self.device, detail: format!("queue {}: {detail}", self.index) }
    }

    pub fn size(&self) -> u16 {
        self.queue.size()
    }

    /// The next available chain, readable part first as 2.7.4.2 requires, at most as many
    /// descriptors as the queue has entries (2.7.5.3.1).
    pub fn pop<'m>(&mut self, memory: &'m GuestRam) -> Result<Option<Chain<'m>>, DeviceError> {
        self.pop_noting(memory, |_, _, _| {})
    }

    /// As [`Self::pop`], for a device that answers later.
    pub fn hold(&mut self, memory: &GuestRam) -> Result<Option<HeldChain>, DeviceError> {
        let mut parts = Vec::new();
        let chain = self.pop_noting(memory, |address, len, writable| parts.push((address, len, writable)))?;
        Ok(chain.map(|chain| HeldChain { head: chain.head, parts }))
    }

    fn pop_noting<'m>(
        &mut self,
        memory: &'m GuestRam,
        mut note: impl FnMut(Gpa, usize, bool),
    ) -> Result<Option<Chain<'m>>, DeviceError> {
        let next = match self.queue.iter(memory) {
            Ok(mut heads) => heads.next(),
            Err(error) => return Err(self.driver_error(error)),
        };
        let Some(mut descriptors) = next else { return Ok(None) };
        let head = descriptors.head_index();
        let mut chain = Chain { head, readable: Buffers::default(), writable: Buffers::default() };
        let (mut count, mut more) = (0u16, true);
        for descriptor in descriptors.by_ref() {
            count += 1;
            if count > self.queue.size() {
                return Err(self.driver_error(format_args!(
                    "chain {head} has more descriptors than the queue's {}",
                    self.queue.size()
                )));
            }
            more = descriptor.has_next();
            let part = if descriptor.is_write_only() {
                &mut chain.writable
            } else if chain.writable.is_empty() {
                &mut chain.readable
            } else {
                return Err(self.driver_error(format_args!(
                    "chain {head} has a readable descriptor after a writable one"
                )));
            };
            note(descriptor.addr(), descriptor.len() as usize, descriptor.is_write_only());
            for slice in memory.get_slices(descriptor.addr(), descriptor.len() as usize) {
                match slice {
                    Ok(slice) => part.push(slice),
                    Err(error) => {
                        return Err(self.driver_error(format_args!(
                            "chain {head}: buffer {:#x}+{:#x} is outside guest memory: {error}",
                            descriptor.addr().0,
                            descriptor.len()
                        )));
                    }
                }
            }
        }
        if more {
            // Nothing at all, or an end that announces another descriptor: a loop, an index
            // beyond the table, an unreadable or nested indirect table, more than 4 GiB.
            return Err(self.driver_error(format_args!("chain {head} is broken after {count} descriptors")));
        }
        Ok(Some(chain))
    }

    /// Gives the chain that was popped last back, unused.
    pub fn undo_pop(&mut self) {
        self.queue.go_to_previous_position();
    }

    /// Returns a chain to the driver; `written` bytes of its writable part were filled.
    pub fn complete(&mut self, memory: &GuestRam, head: u16, written: usize) -> Result<(), DeviceError> {
        let written = u32::try_from(written).unwrap_or(u32::MAX);
        self.queue.add_used(memory, head, written).map_err(|error| self.driver_error(error))
    }

    /// Tells the driver that notifications are not needed for now.
    pub fn disable_notification(&mut self, memory: &GuestRam) -> Result<(), DeviceError> {
        self.queue.disable_notification(memory).map_err(|error| self.driver_error(error))
    }

    /// Asks for notifications again; true when chains came in meanwhile.
    pub fn enable_notification(&mut self, memory: &GuestRam) -> Result<bool, DeviceError> {
        self.queue.enable_notification(memory).map_err(|error| self.driver_error(error))
    }

    /// Whether the driver wants an interrupt for what was completed since the last call.
    pub fn needs_interrupt(&mut self, memory: &GuestRam) -> Result<bool, DeviceError> {
        // `virtio-queue` leaves VRING_AVAIL_F_NO_INTERRUPT to the caller.
        if !self.queue.event_idx_enabled() {
            let flags: u16 = memory
                .read_obj(vm_memory::GuestAddress(self.queue.avail_ring()))
                .map_err(|error| self.driver_error(error))?;
            return Ok(u16::from_le(flags) & 1 == 0);
        }
        self.queue.needs_notification(memory).map_err(|error| self.driver_error(error))
    }
}

/// Checks what a driver configured for a queue before it becomes ready: power-of-two size
/// within the maximum, aligned rings, each wholly inside one guest's memory.
pub fn validate(queue: &Queue, memory: &GuestRam) -> Result<(), String> {
    if !queue.is_valid(memory) {
        return Err("its rings are not wholly inside guest memory".into());
    }
    let size = usize::from(queue.size());
    let rings = [
        ("descriptor table", queue.desc_table(), 16 * size),
        ("available ring", queue.avail_ring(), 6 + 2 * size),
        ("used ring", queue.used_ring(), 6 + 8 * size),
    ];
    for (name, base, len) in rings {
        if base == 0 {
            return Err(format!("its {name} has address 0"));
        }
        if !memory.check_range(vm_memory::GuestAddress(base), len) {
            return Err(format!("its {name} at {base:#x}+{len:#x} is not wholly inside guest memory"));
        }
    }
    Ok(())
}
