//! The network device (section 5.1): frames numbered as the tests number theirs, polled.

use super::{Device, Queue, SIZE, find};
use crate::{cpu, memory};

const GUEST_CHECKSUM: u64 = 1 << 1;
const GUEST_TSO4: u64 = 1 << 7;
const MERGEABLE: u64 = 1 << 15;
const STATUS: u64 = 1 << 16;
const HEADER: usize = 12;
/// Bytes of a buffer, for frames of an ordinary MTU.
const ROOM: usize = 2048;
/// Where a frame's number is, behind addresses and type.
const NUMBER: usize = 14;
/// Frames that are given to the device, or taken from it, before its doorbell is thought of.
const BATCH: usize = 32;

pub struct Net {
    device: Device,
    rx: Queue,
    tx: Queue,
    /// A buffer for each descriptor of a queue.
    incoming: u64,
    outgoing: u64,
    /// Outgoing buffers that the device has.
    under_way: usize,
}

/// What was received.
#[derive(Default)]
pub struct Received {
    pub frames: u64,
    pub bytes: u64,
    /// Each number followed the one before.
    pub in_order: bool,
}

fn bytes(at: u64, len: usize) -> &'static [u8] {
    // SAFETY: `at` is in a buffer of ours that the device has returned.
    unsafe { core::slice::from_raw_parts(at as *const u8, len) }
}

fn bytes_mut(at: u64, len: usize) -> &'static mut [u8] {
    // SAFETY: `at` is in a buffer of ours that the device does not have; one CPU.
    unsafe { core::slice::from_raw_parts_mut(at as *mut u8, len) }
}

impl Net {
    /// The `nth` network device.
    pub fn open(nth: usize) -> Result<Self, &'static str> {
        let device = find(1).nth(nth).ok_or("no such network device")?;
        if device.negotiate(GUEST_CHECKSUM | GUEST_TSO4 | MERGEABLE | STATUS)? & MERGEABLE == 0 {
            return Err("no mergeable buffers");
        }
        let (rx, tx) = (device.queue(0)?, device.queue(1)?);
        rx.poll_only();
        tx.poll_only();
        let incoming = memory::allocate(SIZE * ROOM).as_ptr() as u64;
        let outgoing = memory::allocate(SIZE * ROOM).as_ptr() as u64;
        let mut net = Self { device, rx, tx, incoming, outgoing, under_way: 0 };
        net.give();
        device.start();
        net.rx.kick();
        Ok(net)
    }

    pub fn wait_link(&self, up: bool) {
        while (self.device.config32(4) >> 16 & 1 == 1) != up {
            cpu::relax();
        }
    }

    /// One received frame, if there is one: its first buffer's descriptor, and its length. Of its
    /// other buffers only the length is looked at.
    fn take(&mut self) -> Result<Option<(u16, usize)>, &'static str> {
        let Some((head, written)) = self.rx.pop() else { return Ok(None) };
        let at = self.incoming + (usize::from(head) * ROOM) as u64;
        let mut len = written as usize;
        if len < HEADER {
            return Err("a frame without a header");
        }
        let header = bytes(at, HEADER);
        for _ in 1..u16::from_le_bytes([header[10], header[11]]) {
            let (_, written) = self.rx.pop().ok_or("a part of a frame")?;
            len += written as usize;
        }
        Ok(Some((head, len - HEADER)))
    }

    /// Gives every buffer that was popped to the device again.
    fn give(&mut self) {
        while let Some(next) = self.rx.next_free() {
            self.rx.push(&[(self.incoming + (usize::from(next) * ROOM) as u64, ROOM as u32, true)]);
        }
    }

    /// Receives `count` frames.
    pub fn receive(&mut self, count: u64) -> Result<Received, &'static str> {
        let mut received = Received { in_order: true, ..Received::default() };
        let mut expected = None;
        while received.frames < count {
            let mut batch = 0;
            while batch < BATCH
                && received.frames < count
                && let Some((head, len)) = self.take()?
            {
                let at = self.incoming + (usize::from(head) * ROOM + HEADER) as u64;
                let frame = bytes(at, NUMBER + 4);
                let number = u32::from_be_bytes([frame[14], frame[15], frame[16], frame[17]]);
                received.in_order &= expected.is_none_or(|expected| expected == number);
                expected = Some(number.wrapping_add(1));
                received.frames += 1;
                received.bytes += len as u64;
                self.give();
                batch += 1;
            }
            match batch {
                0 => cpu::relax(),
                _ => self.rx.kick_if_wanted(),
            }
        }
        Ok(received)
    }

    /// Takes back what the device has sent; waits until at most `most` are under way.
    fn reclaim(&mut self, most: usize) {
        loop {
            while self.tx.pop().is_some() {
                self.under_way -= 1;
            }
            if self.under_way <= most {
                return;
            }
            cpu::relax();
        }
    }

    /// A buffer to be sent.
    fn outgoing(&mut self) -> u64 {
        let next = self.tx.next_free();
        self.outgoing + next.map_or(0, |next| (usize::from(next) * ROOM) as u64)
    }

    fn send_buffer(&mut self, at: u64, len: usize) {
        self.tx.push(&[(at, (HEADER + len) as u32, false)]);
        self.under_way += 1;
    }

    /// Sends `count` frames of `len` bytes, and waits until they are gone.
    pub fn send(&mut self, count: u64, len: usize) -> Result<(), &'static str> {
        if !(NUMBER + 4..=ROOM - HEADER).contains(&len) {
            return Err("length of a frame");
        }
        for number in 0..count {
            if self.under_way == SIZE {
                self.tx.kick_if_wanted();
                self.reclaim(SIZE - BATCH);
            }
            let at = self.outgoing();
            let whole = bytes_mut(at, HEADER + len);
            // Written once is written for ever, save the number.
            if whole[HEADER + 12] == 0 {
                whole[HEADER..HEADER + 14].copy_from_slice(&[2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 0x88, 0xb5]);
            }
            whole[HEADER + NUMBER..HEADER + NUMBER + 4].copy_from_slice(&(number as u32).to_be_bytes());
            self.send_buffer(at, len);
            if number % BATCH as u64 == 0 {
                self.tx.kick_if_wanted();
            }
        }
        self.tx.kick_if_wanted();
        self.reclaim(0);
        Ok(())
    }

    /// Sends `count` received frames back.
    pub fn echo(&mut self, count: u64) -> Result<(), &'static str> {
        let mut done = 0;
        while done < count {
            let Some((head, len)) = self.take()? else {
                cpu::relax();
                continue;
            };
            if HEADER + len > ROOM {
                return Err("a frame too large to be sent back");
            }
            self.reclaim(SIZE - 1);
            let (from, to) = (self.incoming + (usize::from(head) * ROOM) as u64, self.outgoing());
            let header = bytes_mut(to, HEADER + len);
            header.copy_from_slice(bytes(from, HEADER + len));
            header[..HEADER].fill(0);
            self.send_buffer(to, len);
            self.tx.kick_if_wanted();
            self.give();
            self.rx.kick_if_wanted();
            done += 1;
        }
        self.reclaim(0);
        Ok(())
    }
}
