//! The entropy device (section 5.4).

use super::{Queue, find};
use crate::memory;

pub struct Rng(Queue);

impl Rng {
    pub fn open() -> Result<Self, &'static str> {
        let device = find(4).next().ok_or("no rng device")?;
        device.negotiate(0)?;
        let queue = device.queue(0)?;
        device.start();
        Ok(Self(queue))
    }

    /// Fills one buffer and returns what the device wrote.
    pub fn read(&mut self, length: usize) -> Result<&'static [u8], &'static str> {
        let buffer = memory::allocate(length);
        self.0.push(&[(buffer.as_ptr() as u64, length as u32, true)]);
        self.0.kick();
        let (_, written) = self.0.wait().ok_or("device needs reset")?;
        buffer.get(..written as usize).ok_or("device wrote more than the buffer holds")
    }
}
