//! The block device (section 5.2): one request at a time, polled.

use super::{Buffer, Device, Queue, find};
use crate::{cpu, memory};

pub const READ_ONLY: u64 = 1 << 5;
const SEG_MAX: u64 = 1 << 2;
const FLUSH: u64 = 1 << 9;
const DISCARD: u64 = 1 << 13;
const WRITE_ZEROES: u64 = 1 << 14;

pub const SECTOR: usize = 512;
/// Largest data of one request of this driver.
pub const MAX_REQUEST: usize = 256 * 1024;
/// Data is split into pieces of this size, to exercise chains.
const PIECE: usize = 64 * 1024;

/// A request's kind and, after it, its outcome.
#[derive(Clone, Copy)]
pub enum Op {
    Read = 0,
    Write = 1,
    Flush = 4,
    GetId = 8,
    Discard = 11,
    WriteZeroes = 13,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Status {
    Ok,
    IoError,
    Unsupported,
    Other(u8),
}

pub struct Blk {
    pub device: Device,
    pub features: u64,
    queue: Queue,
    /// Header, status byte and the identifier's 20 bytes.
    scratch: &'static mut [u8],
    pub data: &'static mut [u8],
    serial: [u8; 20],
}

/// Every block device of the machine, in slot order.
pub fn devices() -> impl Iterator<Item = Device> {
    find(2)
}

pub fn capacity(device: Device) -> u64 {
    device.config64(0)
}

impl Blk {
    pub fn open(device: Device) -> Result<Self, &'static str> {
        let features = device.negotiate(READ_ONLY | SEG_MAX | FLUSH | DISCARD | WRITE_ZEROES)?;
        let queue = device.queue(0)?;
        device.start();
        let scratch = memory::allocate(4096);
        let data = memory::allocate(MAX_REQUEST);
        let mut blk = Self { device, features, queue, scratch, data, serial: [0; 20] };
        match blk.request(Op::GetId, 0, 20)? {
            Status::Ok => blk.serial.copy_from_slice(&blk.scratch[32..52]),
            _ => return Err("GET_ID failed"),
        }
        Ok(blk)
    }

    pub fn serial(&self) -> &str {
        let end = self.serial.iter().position(|byte| *byte == 0).unwrap_or(20);
        core::str::from_utf8(&self.serial[..end]).unwrap_or("?")
    }

    /// Runs one request on the first `length` bytes of `data` (or its own buffers).
    pub fn request(&mut self, op: Op, sector: u64, length: usize) -> Result<Status, &'static str> {
        let base = self.scratch.as_ptr() as u64;
        self.scratch[..4].copy_from_slice(&(op as u32).to_le_bytes());
        self.scratch[4..8].fill(0);
        self.scratch[8..16].copy_from_slice(&sector.to_le_bytes());
        self.scratch[16] = 0xff;
        let mut chain: [Buffer; 8] = [(0, 0, false); 8];
        chain[0] = (base, 16, false);
        let mut used = 1;
        match op {
            Op::Flush => {}
            Op::GetId => {
                chain[1] = (base + 32, 20, true);
                used = 2;
            }
            Op::Discard | Op::WriteZeroes => {
                self.scratch[64..72].copy_from_slice(&sector.to_le_bytes());
                self.scratch[72..76].copy_from_slice(&((length / SECTOR) as u32).to_le_bytes());
                self.scratch[76..80].fill(0);
                chain[1] = (base + 64, 16, false);
                used = 2;
            }
            Op::Read | Op::Write => {
                let data = self.data.as_ptr() as u64;
                let mut done = 0;
                while done < length {
                    let piece = PIECE.min(length - done);
                    chain[used] = (data + done as u64, piece as u32, matches!(op, Op::Read));
                    used += 1;
                    done += piece;
                }
            }
        }
        chain[used] = (base + 16, 1, true);
        self.queue.push(&chain[..=used]);
        self.queue.kick();
        self.queue.wait().ok_or("device needs reset")?;
        let status = &raw const self.scratch[16];
        // SAFETY: the device wrote this byte behind the compiler's back.
        Ok(match unsafe { status.read_volatile() } {
            0 => Status::Ok,
            1 => Status::IoError,
            2 => Status::Unsupported,
            other => Status::Other(other),
        })
    }

    /// Waits by polling until the capacity is `sectors`.
    pub fn wait_capacity(&self, sectors: u64) {
        while capacity(self.device) != sectors {
            cpu::relax();
        }
    }
}
