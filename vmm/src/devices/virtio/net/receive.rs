//! Frames from the tap to the guest (virtio 1.2, 5.1.6.3, 5.1.6.4).
//!
//! How long a frame is, is known when it has been read. So chains are gathered for the longest one, or
//! all that there are, the frame is read straight into them, and those that it did not reach
//! serve the next frame: a chain is popped once, also when it waits for long. Behind the last chain
//! stands a buffer of our own. What falls into it waits there until the guest gives more chains, and is the
//! one case in which bytes are copied; a driver without mergeable buffers, whose chain has to
//! hold a whole frame, loses the frame.

use std::collections::VecDeque;
use std::io;

use super::spec::{HEADER, MAX_FRAME, NUM_BUFFERS};
use super::turn::Turn;
use crate::backend::guest_buffers::{GuestBuffers, MAX_CALL};
use crate::devices::virtio::queue::{self, DeviceQueue};
use crate::devices::virtio::{DeviceError, RingPosition};
use crate::log::Limited;
use crate::memory::GuestRam;

/// Bytes of our own buffer: any frame, and one more, by which one too long is known.
const REST: usize = MAX_FRAME + 1;

/// Why no more frames are received now.
#[derive(Debug)]
pub(super) enum Stop {
    /// The tap has none.
    Empty,
    /// The guest has no room. It will tell when it has.
    NoBuffers,
    /// Not before this time.
    Rate(u64),
    /// Others' turn; the tap may have more.
    Budget,
    /// Others' turn; the guest may have more room.
    BudgetForRoom,
    /// The tap cannot be read.
    Broken(io::Error),
}

/// A chain that was popped and not used yet.
struct Held {
    head: u16,
    bytes: usize,
    /// Of the list of buffers.
    buffers: usize,
}

/// A frame that lies in all chains there are, and whose end waits for more.
struct Partial {
    len: usize,
    /// Bytes of it in chains.
    placed: usize,
    /// Bytes that were in chains when it was read: from there on it lies in `rest`.
    direct: usize,
}

/// One limiter for each kind of fault, so that a flood of one does not hide the others.
#[derive(Default)]
struct Warnings {
    chain: Limited,
    too_long: Limited,
}

pub(super) struct Receiver {
    queue: DeviceQueue,
    mergeable: bool,
    chains: VecDeque<Held>,
    /// The chains' buffers, in order.
    buffers: GuestBuffers,
    /// Their bytes.
    room: usize,
    rest: Vec<u8>,
    partial: Option<Partial>,
    /// What a frame's chains are returned with; kept to be used again.
    done: Vec<(u16, usize)>,
    warnings: Warnings,
}

impl Receiver {
    pub(super) fn new(queue: DeviceQueue, memory: &GuestRam, mergeable: bool) -> Self {
        Self {
            queue,
            mergeable,
            chains: VecDeque::new(),
            buffers: GuestBuffers::new(memory.clone()),
            room: 0,
            // Untouched, it costs no memory.
            rest: vec![0; REST],
            partial: None,
            done: Vec::new(),
            warnings: Warnings::default(),
        }
    }

    /// Without the chains that are held: a restored device takes them again. A frame that has arrived in part is lost to it.
    pub(super) fn position(&self) -> RingPosition {
        self.queue.position(self.chains.len())
    }

    /// Whether the driver wants an interrupt for what it was given.
    pub(super) fn needs_interrupt(&mut self, memory: &GuestRam) -> Result<bool, DeviceError> {
        self.queue.needs_interrupt(memory)
    }

    /// Delivers frames until there is a reason to stop.
    pub(super) fn run(&mut self, turn: &mut Turn<'_>) -> Result<Stop, DeviceError> {
        self.queue.disable_notification(turn.memory)?;
        loop {
            if let Some(stop) = self.complete_partial(turn)? {
                return Ok(stop);
            }
            if turn.budget.is_spent() {
                return Ok(Stop::Budget);
            }
            let Some(tap) = turn.tap else { return Ok(Stop::Empty) };
            if let Some(until) = turn.limiter.wait(turn.now) {
                turn.counters.throttled += 1;
                return Ok(Stop::Rate(until));
            }
            self.gather(turn)?;
            if self.chains.is_empty() {
                if turn.budget.is_spent() {
                    return Ok(Stop::BudgetForRoom);
                }
                if self.queue.enable_notification(turn.memory)? {
                    continue;
                }
                turn.counters.stalled += 1;
                return Ok(Stop::NoBuffers);
            }
            match tap.read(&mut self.buffers, &mut self.rest) {
                Ok(len) => self.receive(len, turn)?,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(Stop::Empty),
                Err(error) => return Ok(Stop::Broken(error)),
            }
        }
    }

    /// Chains for the longest frame, as far as there are any.
    fn gather(&mut self, turn: &mut Turn<'_>) -> Result<(), DeviceError> {
        if !self.mergeable {
            while self.chains.is_empty() && !turn.budget.is_spent() && self.take_chain(turn)? {}
            return Ok(());
        }
        // One call takes all, and the rest behind them.
        let most = MAX_CALL - 1 - usize::from(self.queue.size()).min(MAX_CALL / 2);
        while self.room < MAX_FRAME
            && self.buffers.len() < most
            && !turn.budget.is_spent()
            && self.take_chain(turn)?
        {}
        Ok(())
    }

    /// Takes one chain up, or returns it if it cannot hold anything; false when there is none.
    fn take_chain(&mut self, turn: &mut Turn<'_>) -> Result<bool, DeviceError> {
        let (before, buffers) = (self.buffers.len(), &mut self.buffers);
        let (mut bytes, mut readable) = (0usize, false);
        let head = self.queue.pop_each(turn.memory, |address, len, writable| {
            if writable {
                bytes += buffers.push(address, len).map_err(|error| queue::outside(address, len, &error))?;
            }
            readable |= !writable;
            Ok(())
        })?;
        let Some(head) = head else { return Ok(false) };
        if readable || bytes < HEADER {
            self.buffers.truncate(before);
            turn.counters.malformed += 1;
            let what =
                if readable { "is not the device's to write" } else { "cannot hold a header of 12 bytes" };
            self.warnings
                .chain
                .warn(turn.name, format_args!("a receive buffer {what}; it is returned empty"));
            turn.budget.spend(0);
            self.queue.complete(turn.memory, head, 0)?;
            return Ok(true);
        }
        self.chains.push_back(Held { head, bytes, buffers: self.buffers.len() - before });
        self.room += bytes;
        Ok(true)
    }

    /// A frame was read that has `len` bytes, header included.
    fn receive(&mut self, len: usize, turn: &mut Turn<'_>) -> Result<(), DeviceError> {
        turn.budget.spend(len);
        turn.limiter.pay(turn.now, len.saturating_sub(HEADER));
        if len > MAX_FRAME || (len > self.room && !self.mergeable) {
            self.drop_frame(len, turn);
            return Ok(());
        }
        if len > self.room {
            self.partial = Some(Partial { len, placed: self.room, direct: self.room });
            return Ok(());
        }
        self.deliver(len, turn)
    }

    /// Goes on with a frame that had too few chains; why, if it has to wait on.
    fn complete_partial(&mut self, turn: &mut Turn<'_>) -> Result<Option<Stop>, DeviceError> {
        while let Some(Partial { len, placed, direct }) = self.partial {
            if placed == len {
                self.partial = None;
                self.deliver(len, turn)?;
                break;
            }
            if turn.budget.is_spent() {
                return Ok(Some(Stop::BudgetForRoom));
            }
            let (before, room) = (self.buffers.len(), self.room);
            if self.take_chain(turn)? {
                let from = placed - direct;
                let to = (len - direct).min(from + self.room - room);
                self.buffers.write_at(before, 0, &self.rest[from..to]);
                self.partial = Some(Partial { len, placed: direct + to, direct });
            } else if self.buffers.len() >= self.queue.size().into() {
                // The driver has nothing left to give: the frame does not fit its queue.
                self.partial = None;
                self.drop_frame(len, turn);
                self.give_back();
            } else if !self.queue.enable_notification(turn.memory)? {
                turn.counters.stalled += 1;
                return Ok(Some(Stop::NoBuffers));
            }
        }
        Ok(None)
    }

    /// Makes as if the chains that are held had not been popped.
    fn give_back(&mut self) {
        self.chains.drain(..).for_each(|_| self.queue.undo_pop());
        self.buffers.clear();
        self.room = 0;
    }

    fn drop_frame(&self, len: usize, turn: &mut Turn<'_>) {
        turn.counters.dropped += 1;
        self.warnings.too_long.warn(
            turn.name,
            format_args!(
                "a frame of {len} bytes does not fit the guest's buffers, {} bytes; it is dropped",
                self.room
            ),
        );
    }

    /// Gives the guest the first `len` bytes that the chains hold.
    fn deliver(&mut self, len: usize, turn: &mut Turn<'_>) -> Result<(), DeviceError> {
        self.done.clear();
        let (mut left, mut buffers) = (len, 0);
        while left > 0
            && let Some(held) = self.chains.pop_front()
        {
            let written = left.min(held.bytes);
            left -= written;
            self.room -= held.bytes;
            buffers += held.buffers;
            self.done.push((held.head, written));
        }
        let count = u16::try_from(self.done.len()).unwrap_or(u16::MAX);
        self.buffers.write_at(0, NUM_BUFFERS, &count.to_le_bytes());
        self.buffers.drop_front(buffers);
        // At once: a driver that saw a part of the frame's chains would take the rest for lost.
        self.queue.complete_all(turn.memory, &self.done)?;
        turn.counters.frames += 1;
        turn.counters.bytes += (len - HEADER.min(len)) as u64;
        Ok(())
    }
}
