//! Reads and writes over several layers.

use std::io;
use std::ops::Range;
use std::sync::Arc;

use vm_memory::VolatileSlice;

use super::DiskError;
use super::bits::{Bits, runs};
use super::file::DiskFile;
use super::format::{BLOCK, BLOCK_BYTES, Geometry, PAGE_BLOCKS};
use super::layer::Layer;
use super::map::Map;

/// What is known of the blocks of a disk with deltas.
#[derive(Debug)]
pub(super) struct Index {
    /// Bytes of the disk.
    size: u64,
    pub(super) map: Map,
    /// Of the top.
    pub(super) bits: Bits,
}

/// A layer's number in the map.
pub(super) fn number(at: usize) -> u8 {
    // At most MAX_LAYERS of them.
    u8::try_from(at).unwrap_or(u8::MAX)
}

/// `count` bytes of the slices from byte `skip` on.
fn window<'a>(
    slices: &[VolatileSlice<'a>],
    mut skip: usize,
    mut count: usize,
) -> io::Result<Vec<VolatileSlice<'a>>> {
    let mut list = Vec::new();
    for slice in slices {
        if count == 0 {
            break;
        }
        if skip >= slice.len() {
            skip -= slice.len();
            continue;
        }
        let part = count.min(slice.len() - skip);
        list.push(slice.subslice(skip, part).map_err(io::Error::other)?);
        (skip, count) = (0, count - part);
    }
    Ok(list)
}

fn total(slices: &[VolatileSlice<'_>]) -> usize {
    slices.iter().map(VolatileSlice::len).sum()
}

#[allow(clippy::cast_possible_truncation)] // usize is 64 bits wide wherever KVM is x86_64's
fn length(bytes: u64) -> usize {
    bytes as usize
}

impl Index {
    /// Of a raw layer alone, above which a delta will stand.
    pub(super) fn new(geometry: &Geometry) -> Self {
        Self { size: geometry.disk, map: Map::new(geometry.blocks), bits: Bits::new(geometry) }
    }

    /// Reads what each layer has, from the bottom up.
    pub(super) fn load(layers: &[Arc<Layer>]) -> Result<Self, DiskError> {
        let size = layers.first().map_or(0, |layer| layer.size());
        let mut index = Self::new(&Geometry::of(size)?);
        let Self { map, bits, .. } = &mut index;
        for (at, layer) in layers.iter().enumerate() {
            let top = at + 1 == layers.len();
            let read = layer.pages(|page, bytes| {
                let first = page as u64 * PAGE_BLOCKS;
                runs(bytes).for_each(|run| map.set(number(at), first + run.start..first + run.end));
                if top {
                    bits.load(page, bytes);
                }
            });
            read.map_err(|error| DiskError::Layer {
                at,
                count: layers.len(),
                source: Box::new(error.into()),
            })?;
        }
        Ok(index)
    }

    /// The blocks that the bytes touch.
    fn blocks(bytes: &Range<u64>) -> Range<u64> {
        bytes.start / BLOCK..bytes.end.div_ceil(BLOCK)
    }

    pub(super) fn read(
        &self,
        layers: &[Arc<Layer>],
        offset: u64,
        slices: &[VolatileSlice<'_>],
    ) -> io::Result<usize> {
        let count = total(slices);
        let end = offset + count as u64;
        let mut at = offset;
        while at < end {
            let (layer, last) = self.map.run(Self::blocks(&(at..end)));
            let stop = (last * BLOCK).min(end);
            let layer = layers.get(usize::from(layer)).ok_or(io::ErrorKind::NotFound)?;
            if at == offset && stop == end {
                return layer.file().read(layer.at(at), slices);
            }
            let part = window(slices, length(at - offset), length(stop - at))?;
            layer.file().read(layer.at(at), &part)?;
            at = stop;
        }
        Ok(count)
    }

    pub(super) fn write(
        &mut self,
        layers: &[Arc<Layer>],
        offset: u64,
        slices: &[VolatileSlice<'_>],
    ) -> io::Result<usize> {
        let count = total(slices);
        let bytes = offset..offset + count as u64;
        let (top, file) = top(layers)?;
        let whole = self.whole(top, &bytes);
        if whole == bytes {
            file.file().write(file.at(offset), slices)?;
        } else {
            for edge in edges(&bytes, &whole) {
                let part = window(slices, length(edge.start - offset), length(edge.end - edge.start))?;
                self.copy_up(layers, &edge, |block| {
                    let mut at = 0;
                    for slice in &part {
                        at += slice.copy_to(&mut block[at..]);
                    }
                })?;
            }
            if !whole.is_empty() {
                let inside = length(whole.start - offset);
                let part = window(slices, inside, length(whole.end - whole.start))?;
                file.file().write(file.at(whole.start), &part)?;
            }
        }
        self.note(top, &whole);
        Ok(count)
    }

    /// Makes the bytes zeroes, by `zero` where that is whole blocks or the top's own.
    pub(super) fn clear(
        &mut self,
        layers: &[Arc<Layer>],
        offset: u64,
        len: u64,
        zero: &dyn Fn(&DiskFile, u64, u64) -> io::Result<()>,
    ) -> io::Result<()> {
        let bytes = offset..offset + len;
        let (top, file) = top(layers)?;
        let whole = self.whole(top, &bytes);
        // First, so that an error which says "unsupported" says it before anything was done.
        if !whole.is_empty() {
            zero(file.file(), file.at(whole.start), whole.end - whole.start)?;
        }
        for edge in edges(&bytes, &whole) {
            self.copy_up(layers, &edge, |block| block.fill(0))?;
        }
        self.note(top, &whole);
        Ok(())
    }

    /// The part of `bytes` that may go to the top as it is: whole blocks, and parts of blocks that it has. What
    /// is left is at most a piece of the first block and one of the last.
    fn whole(&self, top: u8, bytes: &Range<u64>) -> Range<u64> {
        let Range { mut start, mut end } = *bytes;
        if !start.is_multiple_of(BLOCK) && self.map.layer(start / BLOCK) != top {
            start = start.next_multiple_of(BLOCK).min(end);
        }
        if end < self.size && !end.is_multiple_of(BLOCK) && start < end && self.map.layer(end / BLOCK) != top
        {
            end = (end - end % BLOCK).max(start);
        }
        start..end
    }

    /// Writes the block that `edge` is a part of to the top, as it is below but for that part.
    fn copy_up(
        &mut self,
        layers: &[Arc<Layer>],
        edge: &Range<u64>,
        change: impl FnOnce(&mut [u8]),
    ) -> io::Result<()> {
        let (top, file) = top(layers)?;
        let block = edge.start / BLOCK;
        let start = block * BLOCK;
        let mut bytes = [0; BLOCK_BYTES];
        // The disk may end inside its last block.
        let bytes = &mut bytes[..length((start + BLOCK).min(self.size) - start)];
        let from = layers.get(usize::from(self.map.layer(block))).ok_or(io::ErrorKind::NotFound)?;
        from.file().read_bytes(from.at(start), bytes)?;
        change(&mut bytes[length(edge.start - start)..length(edge.end - start)]);
        file.file().write_bytes(file.at(start), bytes)?;
        self.note(top, &(start..start + 1));
        Ok(())
    }

    /// The top has all blocks of `bytes` now.
    fn note(&mut self, top: u8, bytes: &Range<u64>) {
        if bytes.is_empty() {
            return;
        }
        let blocks = Self::blocks(bytes);
        if !self.map.has(top, blocks.clone()) {
            self.map.set(top, blocks.clone());
            self.bits.set(blocks);
        }
    }
}

fn top(layers: &[Arc<Layer>]) -> io::Result<(u8, &Layer)> {
    let file = layers.last().ok_or(io::ErrorKind::NotFound)?;
    Ok((number(layers.len() - 1), file))
}

/// What of `bytes` is before and behind `whole`.
fn edges(bytes: &Range<u64>, whole: &Range<u64>) -> impl Iterator<Item = Range<u64>> + use<> {
    [bytes.start..whole.start, whole.end..bytes.end].into_iter().filter(|edge| !edge.is_empty())
}
