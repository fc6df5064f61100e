//! The memory balloon (section 5.5): gives pages to the host, polled.

use super::{Buffer, Device, Queue, find};
use crate::{cpu, memory};

const REPORTING: u64 = 1 << 5;
const WANTED: u64 = 0;
const ACTUAL: u64 = 4;
const PAGE: u64 = 4096;
/// Page numbers of one request.
const BATCH: usize = 256;

pub struct Balloon {
    device: Device,
    inflate: Queue,
    deflate: Queue,
    reporting: Queue,
    numbers: &'static mut [u8],
}

impl Balloon {
    pub fn open() -> Result<Self, &'static str> {
        let device = find(5).next().ok_or("no balloon")?;
        if device.negotiate(REPORTING)? & REPORTING == 0 {
            return Err("no free page reporting");
        }
        let (inflate, deflate, reporting) = (device.queue(0)?, device.queue(1)?, device.queue(2)?);
        device.start();
        Ok(Self { device, inflate, deflate, reporting, numbers: memory::allocate(4 * BATCH) })
    }

    /// Waits until the host wants pages, and returns how many.
    pub fn wanted(&self) -> u64 {
        loop {
            match self.device.config32(WANTED) {
                0 => cpu::relax(),
                pages => return pages.into(),
            }
        }
    }

    /// Tells how many pages the balloon holds.
    pub fn holds(&self, pages: u64) {
        self.device.set_config32(ACTUAL, pages as u32);
    }

    /// Moves `pages` pages from `start` into the balloon, or out of it.
    pub fn transfer(&mut self, inflate: bool, start: u64, pages: u64) -> Result<(), &'static str> {
        let mut done = 0;
        while done < pages {
            let count = BATCH.min((pages - done) as usize);
            for (number, place) in self.numbers.chunks_exact_mut(4).take(count).enumerate() {
                // Backwards, as Linux mostly has them.
                let page = start / PAGE + done + (count - 1 - number) as u64;
                place.copy_from_slice(&(page as u32).to_le_bytes());
            }
            let queue = if inflate { &mut self.inflate } else { &mut self.deflate };
            queue.push(&[(self.numbers.as_ptr() as u64, 4 * count as u32, false)]);
            queue.kick();
            queue.wait().ok_or("device needs reset")?;
            done += count as u64;
        }
        Ok(())
    }

    /// Reports `bytes` from `start` as free, in pieces of 2 MiB.
    pub fn report(&mut self, start: u64, bytes: u64) -> Result<(), &'static str> {
        const PIECE: u64 = 2 << 20;
        const PIECES: usize = 32;
        let mut at = start;
        while at < start + bytes {
            let mut chain: [Buffer; PIECES] = [(0, 0, true); PIECES];
            let mut used = 0;
            while used < PIECES && at < start + bytes {
                let length = PIECE.min(start + bytes - at);
                chain[used] = (at, length as u32, true);
                used += 1;
                at += length;
            }
            self.reporting.push(&chain[..used]);
            self.reporting.kick();
            self.reporting.wait().ok_or("device needs reset")?;
        }
        Ok(())
    }
}
