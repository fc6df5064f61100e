//! Virtqueues as devices use them (virtio 1.2, 2.7): `virtio-queue`'s ring walking, with
//! every way that a driver can get a chain wrong turned into a [`DeviceError`], and a chain's
//! buffers resolved to checked slices of guest memory before the device sees them.
//!
//! `virtio-queue` ends its iteration alike at the last descriptor and at a broken one; here
//! the difference is told. Framing is free, as the specification asks (2.7.4.1): a device
//! sees bytes, not descriptors.

use std::num::Wrapping;
use std::sync::atomic::{Ordering, fence};

use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemory, VolatileSlice};

use super::{DeviceError, RingPosition};
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
    /// Chains that were returned since [`Self::needs_interrupt`] was asked last.
    returned: Wrapping<u16>,
}

impl DeviceQueue {
    pub fn new(queue: Queue, index: u16, device: &'static str) -> Self {
        Self { queue, index, device, returned: Wrapping(0) }
    }

    /// An error of the driver on this queue.
    pub fn driver_error(&self, detail: impl std::fmt::Display) -> DeviceError {
        DeviceError::Driver { device: self.device, detail: format!("queue {}: {detail}", self.index) }
    }

    /// Where it stands, of the chains that were popped and not returned `held` counted as not popped.
    pub fn position(&self, held: usize) -> RingPosition {
        let held = Wrapping(u16::try_from(held).unwrap_or(0));
        RingPosition {
            next_available: (Wrapping(self.queue.next_avail()) - held).0,
            next_used: self.queue.next_used(),
        }
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
        let (mut readable, mut writable) = (Buffers::default(), Buffers::default());
        let head = self.pop_each(memory, |address, len, is_writable| {
            let part = if is_writable {
                &mut writable
            } else if writable.is_empty() {
                &mut readable
            } else {
                return Err("has a readable descriptor after a writable one".to_owned());
            };
            note(address, len, is_writable);
            for slice in memory.get_slices(address, len) {
                part.push(slice.map_err(|error| outside(address, len, &error))?);
            }
            Ok(())
        })?;
        Ok(head.map(|head| Chain { head, readable, writable }))
    }

    /// As [`Self::pop`], for a device that keeps the buffers in a form of its own: `each` gets the
    /// address and length of one after the other, unchecked and in any order of directions, and
    /// whether the device may write there. What `each` finds wrong is an error of the driver.
    pub fn pop_each(
        &mut self,
        memory: &GuestRam,
        mut each: impl FnMut(Gpa, usize, bool) -> Result<(), String>,
    ) -> Result<Option<u16>, DeviceError> {
        let next = match self.queue.iter(memory) {
            Ok(mut heads) => heads.next(),
            Err(error) => return Err(self.driver_error(error)),
        };
        let Some(mut descriptors) = next else { return Ok(None) };
        let head = descriptors.head_index();
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
            each(descriptor.addr(), descriptor.len() as usize, descriptor.is_write_only())
                .map_err(|what| self.driver_error(format_args!("chain {head} {what}")))?;
        }
        if more {
            // Nothing at all, or an end that announces another descriptor: a loop, an index
            // beyond the table, an unreadable or nested indirect table, more than 4 GiB.
            return Err(self.driver_error(format_args!("chain {head} is broken after {count} descriptors")));
        }
        Ok(Some(head))
    }

    /// Gives the chain that was popped last back, unused.
    pub fn undo_pop(&mut self) {
        self.queue.go_to_previous_position();
    }

    /// Returns a chain to the driver; `written` bytes of its writable part were filled.
    pub fn complete(&mut self, memory: &GuestRam, head: u16, written: usize) -> Result<(), DeviceError> {
        self.complete_all(memory, &[(head, written)])
    }

    /// Returns chains, heads and written bytes, which the driver sees all at once. No more of them
    /// than the queue has entries.
    pub fn complete_all(&mut self, memory: &GuestRam, chains: &[(u16, usize)]) -> Result<(), DeviceError> {
        let size = self.queue.size();
        let ring = self.queue.used_ring();
        let mut next = Wrapping(self.queue.next_used());
        for &(head, written) in chains {
            if head >= size {
                return Err(self.driver_error(format_args!("chain {head} is beyond the queue's {size}")));
            }
            // An entry is the head and the length, 32 bits each.
            let written = u64::from(u32::try_from(written).unwrap_or(u32::MAX));
            let entry = u64::from(head) | written << 32;
            let at = ring + 4 + 8 * u64::from(next.0 % size);
            memory.write_obj(entry.to_le(), GuestAddress(at)).map_err(|error| self.driver_error(error))?;
            next += 1;
            self.returned += 1;
        }
        self.queue.set_next_used(next.0);
        memory
            .store(next.0.to_le(), GuestAddress(ring + 2), Ordering::Release)
            .map_err(|error| self.driver_error(error))
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
        let returned = std::mem::take(&mut self.returned);
        if returned == Wrapping(0) {
            return Ok(false);
        }
        // What was returned is visible before the driver's wish is read (2.7.7.1): it writes the
        // wish, and looks for more after that.
        fence(Ordering::SeqCst);
        let ring = self.queue.avail_ring();
        let read = |at: u64| memory.load::<u16>(GuestAddress(at), Ordering::Relaxed).map(u16::from_le);
        if !self.queue.event_idx_enabled() {
            let flags = read(ring).map_err(|error| self.driver_error(error))?;
            return Ok(flags & 1 == 0);
        }
        let event = read(ring + 4 + 2 * u64::from(self.queue.size()));
        let event = Wrapping(event.map_err(|error| self.driver_error(error))?);
        let next = Wrapping(self.queue.next_used());
        Ok(next - event - Wrapping(1) < returned)
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
        if !memory.check_range(GuestAddress(base), len) {
            return Err(format!("its {name} at {base:#x}+{len:#x} is not wholly inside guest memory"));
        }
    }
    Ok(())
}

/// What is wrong with a buffer that is not wholly guest memory.
pub fn outside(address: Gpa, len: usize, error: &dyn std::fmt::Display) -> String {
    format!("has buffer {:#x}+{len:#x}, which is outside guest memory: {error}", address.0)
}
