//! Several layers made one, while the disk goes on above them.
//!
//! A disk that is captured again and again would have ever more layers. The one that takes the place of
//! some says that it is the uppermost of them and stands above what the lowest stood above, so
//! what is above and below it stays right. Those that it replaces are only read: snapshots that have them keep them.

use std::fs::File;
use std::io;
use std::ops::RangeInclusive;
use std::sync::Arc;

use super::bits::{Bits, runs};
use super::format::{BLOCK, Geometry, LayerId, PAGE_BLOCKS};
use super::layer::{Layer, SettleError};
use super::map::Map;
use super::stack::number;
use super::{Disk, DiskError, Frozen};

/// Bytes copied at once.
const CHUNK: usize = 1 << 20;

/// Why layers cannot be merged. The disk is as it was.
#[derive(Debug, thiserror::Error)]
pub enum MergeError {
    #[error(
        "layers {first} to {last}, counted from the raw one, 0; of this disk's {count} at least two can be merged, neither the lowest nor the uppermost"
    )]
    Range { first: usize, last: usize, count: usize },
    #[error("there is nothing in these layers")]
    Void,
    #[error("make the merged layer: {0}")]
    Create(#[from] DiskError),
    #[error("{operation}: {source}")]
    Copy { operation: &'static str, source: io::Error },
    #[error("meanwhile the layers have been merged otherwise")]
    Changed,
}

fn failed(operation: &'static str) -> impl FnOnce(io::Error) -> MergeError {
    move |source| MergeError::Copy { operation, source }
}

/// Layers about to be merged. It needs the disk no more, until that is done.
#[derive(Debug)]
pub struct Merge {
    layers: Vec<Arc<Layer>>,
    unsettled: Vec<Arc<Frozen>>,
    under: LayerId,
    file: File,
}

/// A layer that can take the place of others, complete and durable.
#[derive(Debug)]
pub struct Merged {
    replaced: Vec<Arc<Layer>>,
    layer: Layer,
}

impl Disk {
    /// Prepares to merge the layers of these numbers, counted from the raw one, 0, into `file`, which is new and empty.
    pub fn merge(&mut self, numbers: RangeInclusive<usize>, file: File) -> Result<Merge, MergeError> {
        let (first, last, count) = (*numbers.start(), *numbers.end(), self.layers.len());
        if first == 0 || first >= last || last >= count - 1 {
            return Err(MergeError::Range { first, last, count });
        }
        // A void one, which has the id of the one below and could not give it to others.
        if self.layers[last].id() == self.layers[first - 1].id() {
            return Err(MergeError::Void);
        }
        let unsettled = self.unsettled();
        Ok(Merge {
            layers: self.layers[numbers].to_vec(),
            unsettled,
            under: self.layers[first - 1].id(),
            file,
        })
    }

    /// Puts the merged layer in the place of those that it was made of. No input or output.
    pub fn replace(&mut self, merged: Merged) -> Result<(), MergeError> {
        let Merged { replaced, layer } = merged;
        let first = self.layers.iter().position(|layer| Arc::ptr_eq(layer, &replaced[0]));
        let first = first.ok_or(MergeError::Changed)?;
        let last = first + replaced.len() - 1;
        let there = self.layers.get(first..=last).ok_or(MergeError::Changed)?;
        let (Some(index), true) =
            (&mut self.index, there.iter().zip(&replaced).all(|(there, ours)| Arc::ptr_eq(there, ours)))
        else {
            return Err(MergeError::Changed);
        };
        let (low, high) = (number(first), number(last));
        index.map.renumber(|layer| match layer {
            layer if layer > high => layer - (high - low),
            layer => layer.min(low),
        });
        self.layers.splice(first..=last, [Arc::new(layer)]);
        Ok(())
    }
}

impl Merge {
    /// Does the work, on any thread.
    pub fn run(self) -> Result<Merged, MergeError> {
        let Self { layers, unsettled, under, file } = self;
        // All of the disk's: they are few, and none of these may be missed.
        unsettled.iter().try_for_each(|frozen| frozen.settle()).map_err(failed("settle the layers"))?;
        let top = &layers[layers.len() - 1];
        let geometry = Geometry::of(top.size()).map_err(DiskError::from)?;
        // Who has a block: 0 nobody, others are counted from 1.
        let (mut map, mut bits) = (Map::new(geometry.blocks), Bits::new(&geometry));
        for (at, layer) in layers.iter().enumerate() {
            let read = layer.pages(|page, bytes| {
                let first = page as u64 * PAGE_BLOCKS;
                for run in runs(bytes) {
                    map.set(number(at + 1), first + run.start..first + run.end);
                    bits.set(first + run.start..first + run.end);
                }
            });
            read.map_err(DiskError::from)?;
        }
        let merged = Layer::create_as(file, top.size(), top.id(), under)?;
        let mut buffer = vec![0; CHUNK];
        let mut block = 0;
        while block < geometry.blocks {
            let (from, end) = map.run(block..geometry.blocks);
            if let Some(from) = usize::from(from).checked_sub(1).and_then(|from| layers.get(from)) {
                let bytes = block * BLOCK..(end * BLOCK).min(geometry.disk);
                from.copy_to(&merged, bytes, &mut buffer).map_err(failed("copy blocks"))?;
            }
            block = end;
        }
        merged.settle(&mut bits).map_err(|error| {
            let (SettleError::Again(source) | SettleError::Lost(source)) = error;
            MergeError::Copy { operation: "make the merged layer durable", source }
        })?;
        Ok(Merged { replaced: layers, layer: merged })
    }
}
