//! Frames from the guest to the tap (virtio 1.2, 5.1.6.1, 5.1.6.2).

use std::io;

use super::spec::{HEADER, MAX_FRAME};
use super::turn::Turn;
use crate::backend::guest_buffers::GuestBuffers;
use crate::backend::tap;
use crate::devices::virtio::queue::{self, DeviceQueue};
use crate::devices::virtio::{DeviceError, RingPosition};
use crate::log::Limited;
use crate::memory::GuestRam;

/// Why no more frames are sent now.
#[derive(Debug)]
pub(super) enum Stop {
    /// The guest has none. It will tell when it has.
    Empty,
    /// The tap takes no more.
    Full,
    /// Not before this time.
    Rate(u64),
    /// Others' turn.
    Budget,
    /// The tap is gone.
    Broken(io::Error),
}

/// One limiter for each kind of fault, so that a flood of one does not hide the others.
#[derive(Default)]
struct Warnings {
    direction: Limited,
    length: Limited,
    refused: Limited,
    host: Limited,
}

pub(super) struct Transmitter {
    queue: DeviceQueue,
    /// The frame's buffers; kept to be used again.
    buffers: GuestBuffers,
    warnings: Warnings,
}

/// What became of a frame.
enum Fate {
    Sent,
    Malformed,
    Dropped,
    /// The tap takes no more: it stays with the guest.
    Kept,
    Broken(io::Error),
}

impl Transmitter {
    pub(super) fn new(queue: DeviceQueue, memory: &GuestRam) -> Self {
        Self { queue, buffers: GuestBuffers::new(memory.clone()), warnings: Warnings::default() }
    }

    pub(super) fn position(&self) -> RingPosition {
        self.queue.position(0)
    }

    /// Whether the driver wants an interrupt for what it got back.
    pub(super) fn needs_interrupt(&mut self, memory: &GuestRam) -> Result<bool, DeviceError> {
        self.queue.needs_interrupt(memory)
    }

    /// Sends frames until there is a reason to stop.
    pub(super) fn run(&mut self, turn: &mut Turn<'_>) -> Result<Stop, DeviceError> {
        self.queue.disable_notification(turn.memory)?;
        loop {
            if turn.budget.is_spent() {
                return Ok(Stop::Budget);
            }
            if let Some(until) = turn.limiter.wait(turn.now) {
                turn.counters.throttled += 1;
                return Ok(Stop::Rate(until));
            }
            self.buffers.clear();
            let (mut len, mut writable) = (0usize, false);
            let buffers = &mut self.buffers;
            let head = self.queue.pop_each(turn.memory, |address, part, is_writable| {
                if !is_writable {
                    len +=
                        buffers.push(address, part).map_err(|error| queue::outside(address, part, &error))?;
                }
                writable |= is_writable;
                Ok(())
            })?;
            let Some(head) = head else {
                if self.queue.enable_notification(turn.memory)? {
                    continue;
                }
                return Ok(Stop::Empty);
            };
            let fate = if self.is_well_formed(len, writable, turn.name) {
                self.send(len, turn)
            } else {
                Fate::Malformed
            };
            let counters = &mut *turn.counters;
            match fate {
                Fate::Kept => {
                    counters.stalled += 1;
                    self.queue.undo_pop();
                    return Ok(Stop::Full);
                }
                Fate::Sent => {
                    let bytes = len - HEADER;
                    counters.frames += 1;
                    counters.bytes += bytes as u64;
                    turn.limiter.pay(turn.now, bytes);
                }
                Fate::Malformed => counters.malformed += 1,
                Fate::Dropped | Fate::Broken(_) => counters.dropped += 1,
            }
            turn.budget.spend(len);
            self.queue.complete(turn.memory, head, 0)?;
            if let Fate::Broken(error) = fate {
                return Ok(Stop::Broken(error));
            }
        }
    }

    fn is_well_formed(&self, len: usize, writable: bool, name: &str) -> bool {
        if writable {
            self.warnings.direction.warn(
                name,
                format_args!("a frame has a buffer that the device shall write; the frame is dropped"),
            );
            return false;
        }
        if !(HEADER..=MAX_FRAME).contains(&len) {
            self.warnings.length.warn(
                name,
                format_args!(
                    "a frame of {len} bytes with its header; {HEADER} to {MAX_FRAME} are allowed; it is dropped"
                ),
            );
            return false;
        }
        true
    }

    fn send(&self, len: usize, turn: &Turn<'_>) -> Fate {
        // With the link down a frame goes nowhere.
        let Some(tap) = turn.tap else { return Fate::Dropped };
        match tap.write(&self.buffers) {
            Ok(_) => Fate::Sent,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Fate::Kept,
            Err(error) if error.kind() == io::ErrorKind::InvalidInput => {
                let what = "a header or frame that the kernel refuses";
                self.warnings
                    .refused
                    .warn(turn.name, format_args!("{what}, {len} bytes: {error}; it is dropped"));
                Fate::Malformed
            }
            Err(error) if tap::says_gone(&error) => Fate::Broken(error),
            // The interface is down, or the host short of memory.
            Err(error) => {
                let what = "the tap did not take a frame";
                self.warnings
                    .host
                    .warn(turn.name, format_args!("{what} of {len} bytes: {error}; it is dropped"));
                Fate::Dropped
            }
        }
    }
}
