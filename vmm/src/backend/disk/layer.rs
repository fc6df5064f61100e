//! A layer that is open: the raw one, or a delta with its header checked.
//!
//! A delta can be *void*: its maker did not live to write the header, or the power went before that was durable. Nothing
//! was flushed to it then, nor to any above it, so it has nothing. The uppermost is made anew; below it stands
//! for the one under it, whose id it has. A layer that is not void does not fit above one that became so.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};

use super::bits::{Bits, runs};
use super::file::DiskFile;
use super::format::{FormatError, Geometry, HEADER, Header, LayerId, PAGE, PAGE_BLOCKS, RAW, shown};
use super::{DiskError, SECTOR};
use crate::backend::entropy;

/// Why a layer is not durable.
pub(super) enum SettleError {
    /// For lack of room, say; nothing is lost, and it may be tried again.
    Again(io::Error),
    /// The kernel could not write data, has said so, and will not say it again.
    Lost(io::Error),
}

/// See the module.
#[derive(Debug)]
pub(super) struct Layer {
    file: DiskFile,
    id: LayerId,
    /// Bytes of the disk.
    size: u64,
    /// Where block 0 is in the file.
    data: u64,
    /// Something in the file may not be durable: what was written before it was opened, too.
    loose: AtomicBool,
}

impl Layer {
    /// The lowest layer, whatever is in it.
    pub(super) fn raw(file: DiskFile) -> Result<Self, DiskError> {
        let size = file.length();
        if size == 0 || !size.is_multiple_of(SECTOR) || i64::try_from(size).is_err() {
            return Err(DiskError::Size { size });
        }
        Ok(Self { file, id: RAW, size, data: 0, loose: AtomicBool::new(true) })
    }

    /// A delta that stands above `under`; `writable` if it is the uppermost of a disk that will be written.
    pub(super) fn delta(file: DiskFile, under: &Self, writable: bool) -> Result<Self, DiskError> {
        let geometry = Geometry::of(under.size)?;
        let mut bytes = [0; HEADER];
        if ![0, geometry.length].contains(&file.length()) && file.length() < HEADER as u64 {
            return Err(FormatError::Length { found: file.length(), expected: geometry.length }.into());
        }
        if file.length() > 0 {
            file.read_bytes(0, &mut bytes).map_err(FormatError::Read)?;
        }
        if is_void(&file, &geometry, &bytes)? {
            if writable {
                return Self::make(file, under.size, None, under.id);
            }
            let loose = AtomicBool::new(true);
            return Ok(Self { file, id: under.id, size: under.size, data: geometry.data, loose });
        }
        let header = Header::decode(&bytes)?;
        let Geometry { disk, data, length, .. } = header.geometry;
        if disk != under.size {
            return Err(FormatError::DiskSize { found: disk, expected: under.size }.into());
        }
        if header.parent != under.id {
            let (found, expected) = (shown(&header.parent), shown(&under.id));
            return Err(FormatError::Parent { found, expected }.into());
        }
        if file.length() != length {
            return Err(FormatError::Length { found: file.length(), expected: length }.into());
        }
        Ok(Self { file, id: header.id, size: disk, data, loose: AtomicBool::new(true) })
    }

    /// Makes an empty file a delta that has nothing, to stand above `under`. It need not be durable: it would be void.
    pub(super) fn create(file: File, under: &Self) -> Result<Self, DiskError> {
        let file = new(file)?;
        Self::make(file, under.size, None, under.id)
    }

    /// The same with an id that another layer has, whose place it will take.
    pub(super) fn create_as(file: File, size: u64, id: LayerId, parent: LayerId) -> Result<Self, DiskError> {
        Self::make(new(file)?, size, Some(id), parent)
    }

    fn make(mut file: DiskFile, size: u64, id: Option<LayerId>, parent: LayerId) -> Result<Self, DiskError> {
        let failed = |operation| move |source| DiskError::Create { operation, source };
        let geometry = Geometry::of(size)?;
        let mut new_id = id.unwrap_or(RAW);
        while new_id == RAW || new_id == parent {
            entropy::fill(&mut new_id).map_err(failed("choose an id"))?;
        }
        let header = Header { geometry, id: new_id, parent };
        file.extend(geometry.length).map_err(failed("make it as long as the disk"))?;
        file.write_bytes(0, &header.encode()).map_err(failed("write the header"))?;
        let loose = AtomicBool::new(true);
        Ok(Self { file, id: new_id, size: geometry.disk, data: geometry.data, loose })
    }

    pub(super) fn id(&self) -> LayerId {
        self.id
    }

    /// Copies bytes of the disk to another delta of it. Holes stay holes.
    pub(super) fn copy_to(&self, to: &Self, bytes: Range<u64>, buffer: &mut [u8]) -> io::Result<()> {
        let (mut at, end) = (self.at(bytes.start), self.at(bytes.end));
        while let Some(data) = self.file.next_data(at, end)? {
            at = data.start;
            while at < data.end {
                let count = usize::try_from(data.end - at).unwrap_or(buffer.len()).min(buffer.len());
                self.file.read_bytes(at, &mut buffer[..count])?;
                to.file.write_bytes(to.at(at - self.data), &buffer[..count])?;
                at += count as u64;
            }
        }
        Ok(())
    }

    pub(super) fn file(&self) -> &DiskFile {
        &self.file
    }

    #[cfg(test)]
    pub(super) fn file_mut(&mut self) -> &mut DiskFile {
        &mut self.file
    }

    /// Bytes of the disk.
    pub(super) fn size(&self) -> u64 {
        self.size
    }

    /// Where the disk's byte `offset` is in the file.
    pub(super) fn at(&self, offset: u64) -> u64 {
        self.data + offset
    }

    fn is_raw(&self) -> bool {
        self.id == RAW
    }

    /// Calls `found` for every page of the bitmap that is not empty. The raw layer has none.
    pub(super) fn pages(&self, found: impl FnMut(usize, &[u8; PAGE])) -> Result<(), FormatError> {
        if self.is_raw() {
            return Ok(());
        }
        pages(&self.file, &Geometry::of(self.size)?, found)
    }

    /// Whether something in the file may not be durable.
    pub(super) fn is_loose(&self) -> bool {
        self.loose.load(Ordering::Relaxed)
    }

    /// Makes all that is in the file durable, once after it was opened or made.
    pub(super) fn anchor(&self) -> io::Result<()> {
        if self.is_loose() {
            self.file.sync()?;
            self.loose.store(false, Ordering::Relaxed);
        }
        Ok(())
    }

    /// Makes all that was written durable, then what `bits` say of it.
    pub(super) fn settle(&self, bits: &mut Bits) -> Result<(), SettleError> {
        self.file.sync().map_err(SettleError::Lost)?;
        self.loose.store(false, Ordering::Relaxed);
        if bits.is_clean() {
            return Ok(());
        }
        for (page, bytes) in bits.dirty() {
            let at = HEADER as u64 + (page * PAGE) as u64;
            self.file.write_bytes(at, bytes).map_err(SettleError::Again)?;
        }
        self.file.sync().map_err(SettleError::Lost)?;
        bits.cleaned();
        Ok(())
    }
}

/// A file that is to become a delta.
fn new(file: File) -> Result<DiskFile, DiskError> {
    let regular = file.metadata().map_err(DiskError::Inspect)?.is_file();
    let file = DiskFile::new(file, true)?;
    if regular && file.length() == 0 {
        return Ok(file);
    }
    let found = if regular { format!("{} bytes long", file.length()) } else { "a block device".to_owned() };
    Err(DiskError::NotEmpty { found })
}

/// Calls `found` for every page of a delta's bitmap that may not be empty.
fn pages(
    file: &DiskFile,
    geometry: &Geometry,
    mut found: impl FnMut(usize, &[u8; PAGE]),
) -> Result<(), FormatError> {
    let (first, end) = (HEADER as u64, HEADER as u64 + geometry.bitmap);
    let (mut at, mut page) = (first, [0; PAGE]);
    while let Some(Range { start, end: hole }) = file.next_data(at, end)? {
        at = start - (start - first) % PAGE as u64;
        while at < hole {
            file.read_bytes(at, &mut page)?;
            let number = (at - first) / PAGE as u64;
            check(&page, number, geometry.blocks)?;
            found(usize::try_from(number).unwrap_or(usize::MAX), &page);
            at += PAGE as u64;
        }
    }
    Ok(())
}

/// Whether a file never became a delta: no header, no bits, and its length none or the right one.
fn is_void(file: &DiskFile, geometry: &Geometry, header: &[u8; HEADER]) -> Result<bool, FormatError> {
    if file.length() == 0 {
        return Ok(true);
    }
    if file.length() != geometry.length || header.iter().any(|&byte| byte != 0) {
        return Ok(false);
    }
    let mut empty = true;
    pages(file, geometry, |_, page| empty &= page.iter().all(|&byte| byte == 0))?;
    Ok(empty)
}

/// The bits behind the last block are to be zero.
fn check(page: &[u8; PAGE], number: u64, blocks: u64) -> Result<(), FormatError> {
    let first = number * PAGE_BLOCKS;
    if first + PAGE_BLOCKS <= blocks {
        return Ok(());
    }
    match runs(page).last() {
        Some(run) if first + run.end > blocks => Err(FormatError::Bitmap { last: blocks - 1 }),
        _ => Ok(()),
    }
}
