//! A disk: one raw file, or a stack of files of which only the uppermost is written.
//!
//! The lowest layer is a raw image, the others are deltas ([`format`]). Which is which their place in the
//! stack says, never their content: a raw image is the guest's to fill, also with what looks like a
//! delta. A block is read from the uppermost layer that has it; a write goes to the top, which
//! copies what of a block was not written. A disk of one raw file passes everything straight through.
//!
//! *Capture* takes two steps, so that the one in the pause does no input or output at all:
//! [`Disk::stage`] makes an empty file the next top; [`Disk::switch`] freezes the top, which nobody
//! writes to again, and goes on in the staged one. What the frozen layer still lacks on the host's disk its
//! [`Frozen::settle`] brings there, on any thread; the guest's next flush would as well.
//!
//! *Durability*: [`Disk::flush`] returns when all that was written before would survive a loss of power. Data of a
//! new block comes before the note that the layer has the block, so a stack that was not flushed falls
//! back to what it held at the last flush, never to what was never written. Who lists the files of a disk lists a new one
//! before the disk has it: an empty file in the highest place is a layer that has nothing. A flush that failed fails for ever: the
//! kernel forgets what it could not write.
//!
//! A process that was forked off must leave the disks that it inherits alone: what they know of
//! the files is out of date as soon as the parent goes on.
//!
//! Rooms: `file` one file and its system calls, `format` what a delta looks like, `layer` a delta that is open,
//! `bits` which blocks the top has, `map` who has each block, `stack` reads and writes over layers, `freeze`
//! capture and durability, `merge` fewer layers.

mod bits;
mod file;
pub mod format;
mod freeze;
mod layer;
mod map;
mod merge;
mod stack;
#[cfg(test)]
mod tape;
#[cfg(test)]
mod tests;

use std::collections::HashSet;
use std::fs::File;
use std::io;
use std::sync::Arc;

use vm_memory::VolatileSlice;

use self::file::DiskFile;
pub use self::format::FormatError;
pub use self::freeze::Frozen;
use self::freeze::{Staged, Stopped};
use self::layer::Layer;
pub use self::merge::{Merge, MergeError, Merged};
use self::stack::Index;

/// Unit of sizes and offsets, in bytes.
pub const SECTOR: u64 = 512;
/// Most layers of one disk, the raw one included. The map names a layer in one byte, and a message carries as
/// many descriptors.
pub const MAX_LAYERS: usize = crate::api::MAX_DISK_LAYERS;

/// Why files cannot serve as a disk.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    #[error("disk image: inspect the file: {0}")]
    Inspect(#[source] io::Error),
    #[error("disk image is a {found}; give a regular file or a block device")]
    Kind { found: &'static str },
    #[error("disk image is opened for {found}; the slot needs it opened for {needed}")]
    Access { found: &'static str, needed: &'static str },
    #[error(
        "disk image has {size} bytes; it must have at least 512 and a multiple of 512 (truncate -s %512)"
    )]
    Size { size: u64 },
    #[error("disk layer {at} of {count}, counted from the bottom: {source}")]
    Layer { at: usize, count: usize, source: Box<DiskError> },
    #[error("{0}")]
    Format(#[from] FormatError),
    #[error("it is the same file as another layer; a file can have one place in a stack")]
    Twice,
    #[error("{found} layers; at most {max} can be stacked: merge some of them")]
    TooMany { found: usize, max: usize },
    #[error("a new layer: the file is {found}; give an empty regular file")]
    NotEmpty { found: String },
    #[error("a new layer: {operation}: {source}")]
    Create { operation: &'static str, source: io::Error },
}

/// Whether an error says that the file system or device cannot do such a thing at all.
pub fn unsupported(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::ENOSYS))
}

/// See the module. All offsets are in bytes; the caller keeps them inside [`Disk::sectors`].
#[derive(Debug)]
pub struct Disk {
    sectors: u64,
    /// From the bottom up; never empty. Only the last is written.
    layers: Vec<Arc<Layer>>,
    /// None while there is the raw layer only.
    index: Option<Index>,
    /// Layers below the top that may not be durable yet, from the bottom up.
    unsettled: Vec<Arc<Frozen>>,
    staged: Option<Staged>,
    /// Why the top cannot be made durable any more.
    stopped: Option<Stopped>,
}

impl Disk {
    /// A disk of one raw file, as it is open; `writable` says what the disk will be used for.
    pub fn new(file: File, writable: bool) -> Result<Self, DiskError> {
        Self::open(file, Vec::new(), writable)
    }

    /// The disk that `top` and the layers `below` it, from the bottom up, are together. Those below are
    /// only read.
    pub fn open(top: File, below: Vec<File>, writable: bool) -> Result<Self, DiskError> {
        let count = below.len() + 1;
        if count > MAX_LAYERS {
            return Err(DiskError::TooMany { found: count, max: MAX_LAYERS });
        }
        let mut seen = HashSet::new();
        let mut layers: Vec<Arc<Layer>> = Vec::with_capacity(count);
        for (at, file) in below.into_iter().chain([top]).enumerate() {
            let place = |source: DiskError| match count {
                1 => source,
                _ => DiskError::Layer { at, count, source: Box::new(source) },
            };
            let file = DiskFile::new(file, writable && at == count - 1).map_err(place)?;
            if !seen.insert(file.identity().map_err(DiskError::Inspect).map_err(place)?) {
                return Err(place(DiskError::Twice));
            }
            let layer = match layers.last() {
                None => Layer::raw(file).map_err(place)?,
                Some(under) => Layer::delta(file, under, writable && at == count - 1).map_err(place)?,
            };
            layers.push(Arc::new(layer));
        }
        let sectors = layers.first().map_or(0, |layer| layer.size() / SECTOR);
        let index = if count == 1 { None } else { Some(Index::load(&layers)?) };
        Ok(Self { sectors, layers, index, unsettled: Vec::new(), staged: None, stopped: None })
    }

    /// Capacity in sectors of 512 bytes, at least 1.
    pub fn sectors(&self) -> u64 {
        self.sectors
    }

    /// Number of layers, at least 1.
    pub fn depth(&self) -> usize {
        self.layers.len()
    }

    fn top(&self) -> &Arc<Layer> {
        // `open` makes at least one, and none is ever taken away.
        &self.layers[self.layers.len() - 1]
    }

    /// Fills all of `slices`. A file that has shrunk gives `UnexpectedEof`.
    pub fn read(&self, offset: u64, slices: &[VolatileSlice<'_>]) -> io::Result<usize> {
        match &self.index {
            None => self.top().file().read(offset, slices),
            Some(index) => index.read(&self.layers, offset, slices),
        }
    }

    /// Writes all of `slices`.
    pub fn write(&mut self, offset: u64, slices: &[VolatileSlice<'_>]) -> io::Result<usize> {
        match &mut self.index {
            None => self.top().file().write(offset, slices),
            Some(index) => index.write(&self.layers, offset, slices),
        }
    }

    /// Gives the range's storage back; it reads as zeroes after. Where the file
    /// system cannot, [`unsupported`] holds for the error.
    pub fn discard(&mut self, offset: u64, len: u64) -> io::Result<()> {
        match &mut self.index {
            None => self.top().file().discard(offset, len),
            Some(index) => index.clear(&self.layers, offset, len, &DiskFile::discard),
        }
    }

    /// Zeroes the range, giving its storage back if `unmap` says so and that is possible.
    pub fn write_zeroes(&mut self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        match &mut self.index {
            None => self.top().file().write_zeroes(offset, len, unmap),
            Some(index) => {
                index.clear(&self.layers, offset, len, &|file, at, len| file.write_zeroes(at, len, unmap))
            }
        }
    }
}
