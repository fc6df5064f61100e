//! One block request, from its chain to its status byte (5.2.6).
//!
//! A request that is wrong in itself (a range beyond the disk, a length that is not whole
//! sectors) is answered with an error status. Only one that has nowhere to put a status is a
//! driver error.

use std::io;

use super::device::Slot;
use super::metrics;
use super::spec::{self, Status, kind};
use crate::backend::disk::{self, Disk, SECTOR};
use crate::devices::virtio::queue::{Buffers, Chain};
use crate::log::Limited;

/// A served request.
pub(super) struct Outcome {
    /// Bytes written to the chain's writable part from its start, the status included if there is
    /// no gap before it.
    pub(super) written: usize,
    /// Bytes that it cost to serve it, for the caller's budget.
    pub(super) moved: usize,
}

/// One limiter for each kind of fault, so that a flood of one does not hide the others.
#[derive(Default)]
pub(super) struct Warnings {
    bad: Limited,
    no_disk: Limited,
    host: Limited,
}

/// Why a request failed.
enum Fault {
    /// The guest asked for something that cannot be.
    Bad(&'static str),
    /// The slot is empty.
    NoDisk,
    /// The type or a flag is unknown, or the host's file cannot do it.
    Unsupported,
    Host(&'static str, io::Error),
}

/// Serves the request; `None` when there is no room for a status byte. What goes wrong is logged
/// in the name of `device`.
pub(super) fn serve(
    chain: &Chain<'_>,
    slot: &mut Slot,
    features: u64,
    device: &str,
    warnings: &Warnings,
) -> Option<Outcome> {
    let room = chain.writable.len().checked_sub(1)?;
    let mut header = [0; spec::HEADER];
    let complete = chain.readable.read_at(0, &mut header) == spec::HEADER;
    let [k0, k1, k2, k3, _, _, _, _, sector @ ..] = header;
    let kind = u32::from_le_bytes([k0, k1, k2, k3]);
    let request = Request {
        kind,
        sector: u64::from_le_bytes(sector),
        out: chain.readable.range(spec::HEADER, usize::MAX),
        into: chain.writable.range(0, room),
        features,
    };
    let result =
        if complete { request.run(slot) } else { Err(Fault::Bad("header is shorter than 16 bytes")) };
    let (status, moved) = match result {
        Ok(moved) => (Status::Ok, moved),
        Err(fault) => {
            let (sector, bytes) = (request.sector, request.out.len().max(room));
            let what = format_args!("request type {kind} at sector {sector}, {bytes} bytes");
            match &fault {
                Fault::Bad(why) => warnings.bad.warn(device, format_args!("{what}: {why}")),
                Fault::NoDisk => warnings.no_disk.warn(device, format_args!("{what}: no disk is attached")),
                Fault::Host(operation, error) => {
                    warnings.host.warn(device, format_args!("{what}: {operation}: {error}"));
                }
                Fault::Unsupported => {}
            }
            (if matches!(fault, Fault::Unsupported) { Status::Unsupported } else { Status::IoErr }, 0)
        }
    };
    metrics::count(&mut slot.metrics, kind, moved, status == Status::Ok);
    chain.writable.write_at(room, &[status as u8]);
    let filled = if matches!(kind, kind::IN | kind::GET_ID) { moved } else { 0 };
    // Only what was written without a gap from the start counts (2.7.8.2); the status is last.
    Some(Outcome { written: if filled == room { room + 1 } else { filled }, moved })
}

struct Request<'m> {
    kind: u32,
    sector: u64,
    /// Data from the guest, after the header.
    out: Buffers<'m>,
    /// Room for data to the guest, before the status.
    into: Buffers<'m>,
    features: u64,
}

/// Byte offset of a range of sectors that lies on the disk.
fn on_disk(disk: &Disk, sector: u64, sectors: u64) -> Result<u64, Fault> {
    match sector.checked_add(sectors) {
        Some(end) if end <= disk.sectors() => Ok(sector * SECTOR),
        _ => Err(Fault::Bad("range ends beyond the disk")),
    }
}

/// The same for a range of bytes, which must be whole sectors.
fn bytes_on_disk(disk: &Disk, sector: u64, bytes: usize) -> Result<u64, Fault> {
    let bytes = bytes as u64;
    if !bytes.is_multiple_of(SECTOR) {
        return Err(Fault::Bad("length is not a multiple of 512"));
    }
    if bytes > spec::MAX_REQUEST as u64 {
        return Err(Fault::Bad("request is larger than size_max times seg_max"));
    }
    on_disk(disk, sector, bytes / SECTOR)
}

impl Request<'_> {
    /// The number of bytes moved.
    fn run(&self, slot: &mut Slot) -> Result<usize, Fault> {
        if self.kind == kind::GET_ID {
            return self.get_id(&slot.serial);
        }
        let read_only = slot.read_only;
        let disk = slot.disk.as_mut().ok_or(Fault::NoDisk)?;
        let writable = || if read_only { Err(Fault::Bad("the disk is read-only")) } else { Ok(()) };
        match self.kind {
            kind::IN => {
                let offset = bytes_on_disk(disk, self.sector, self.into.len())?;
                disk.read(offset, self.into.slices()).map_err(|error| Fault::Host("read", error))
            }
            kind::OUT => {
                writable()?;
                let offset = bytes_on_disk(disk, self.sector, self.out.len())?;
                let moved =
                    disk.write(offset, self.out.slices()).map_err(|error| Fault::Host("write", error))?;
                self.write_through(disk)?;
                Ok(moved)
            }
            // A read-only disk has nothing to flush.
            kind::FLUSH if read_only => Ok(0),
            kind::FLUSH => disk.flush().map(|()| 0).map_err(|error| Fault::Host("flush", error)),
            kind::DISCARD | kind::WRITE_ZEROES => {
                writable()?;
                let cost = self.clear(disk)?;
                if self.kind == kind::WRITE_ZEROES {
                    self.write_through(disk)?;
                }
                Ok(cost)
            }
            _ => Err(Fault::Unsupported),
        }
    }

    /// A driver that does not know FLUSH relies on every write being durable (5.2.6.2).
    fn write_through(&self, disk: &mut Disk) -> Result<(), Fault> {
        if self.features & spec::F_FLUSH != 0 {
            return Ok(());
        }
        disk.flush().map_err(|error| Fault::Host("flush after a write", error))
    }

    fn get_id(&self, serial: &str) -> Result<usize, Fault> {
        let mut id = [0; spec::ID_BYTES];
        let len = serial.len().min(id.len());
        id[..len].copy_from_slice(&serial.as_bytes()[..len]);
        if self.into.is_empty() {
            return Err(Fault::Bad("no room for the identifier"));
        }
        Ok(self.into.write_at(0, &id))
    }

    /// Discard and write-zeroes: all ranges are checked before the first is touched.
    fn clear(&self, disk: &mut Disk) -> Result<usize, Fault> {
        let discard = self.kind == kind::DISCARD;
        let (feature, max_sectors, max_ranges) = if discard {
            (spec::F_DISCARD, spec::MAX_DISCARD_SECTORS, spec::MAX_RANGES)
        } else {
            (spec::F_WRITE_ZEROES, spec::MAX_WRITE_ZEROES_SECTORS, spec::MAX_WRITE_ZEROES_RANGES)
        };
        if self.features & feature == 0 {
            return Err(Fault::Unsupported);
        }
        let len = self.out.len();
        if len == 0 || !len.is_multiple_of(spec::RANGE) || len > max_ranges as usize * spec::RANGE {
            return Err(Fault::Bad("ranges are not whole ones of 16 bytes, from 1 to the device's maximum"));
        }
        let mut raw = [0; spec::MAX_RANGES_LEN];
        self.out.read_at(0, &mut raw[..len]);
        let mut ranges = [(0, 0, false); spec::MAX_RANGES as usize];
        let count = len / spec::RANGE;
        for (range, bytes) in ranges.iter_mut().zip(raw[..len].chunks_exact(spec::RANGE)) {
            let word =
                |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
            let sector = u64::from(word(0)) | u64::from(word(4)) << 32;
            let (sectors, flags) = (word(8), word(12));
            // Reserved flags, and UNMAP in a discard, are not supported (5.2.6.2).
            if flags & !spec::RANGE_UNMAP != 0 || (discard && flags != 0) {
                return Err(Fault::Unsupported);
            }
            if sectors > max_sectors {
                return Err(Fault::Bad("range is larger than the device's maximum"));
            }
            let offset = on_disk(disk, sector, sectors.into())?;
            *range = (offset, u64::from(sectors) * SECTOR, flags & spec::RANGE_UNMAP != 0);
        }
        let mut cost = 0;
        for &(offset, len, unmap) in ranges[..count].iter().filter(|range| range.1 > 0) {
            let result =
                if discard { disk.discard(offset, len) } else { disk.write_zeroes(offset, len, unmap) };
            result.map_err(|error| {
                if disk::unsupported(&error) {
                    Fault::Unsupported
                } else {
                    Fault::Host("discard or zero", error)
                }
            })?;
            cost += usize::try_from(len).unwrap_or(usize::MAX) / 16;
        }
        Ok(cost)
    }
}
