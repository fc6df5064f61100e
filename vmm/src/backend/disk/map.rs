//! Which layer has each block of a disk.
//!
//! One byte a block where layers alternate, nothing where 16 MiB on end are one layer's: a 10 GiB disk costs
//! 10 KiB, and 2.5 MiB when every part of it is mixed. Looking a block up takes the same time
//! however many layers there are.

use std::ops::Range;

/// Blocks of a leaf.
const LEAF: usize = 4096;

#[derive(Debug)]
enum Leaf {
    One(u8),
    Mixed(Box<[u8; LEAF]>),
}

/// See the module. Layers are counted from the bottom, 0; in the beginning that has all.
#[derive(Debug)]
pub(super) struct Map {
    leaves: Vec<Leaf>,
}

/// The leaf of a block, and the block's place in it.
#[allow(clippy::cast_possible_truncation)] // blocks of a disk: far below 2^63, and usize is 64 bits wide
fn place(block: u64) -> (usize, usize) {
    ((block / LEAF as u64) as usize, (block % LEAF as u64) as usize)
}

impl Map {
    pub(super) fn new(blocks: u64) -> Self {
        let (leaves, rest) = place(blocks);
        let count = leaves + usize::from(rest > 0);
        Self { leaves: (0..count).map(|_| Leaf::One(0)).collect() }
    }

    /// The layer that has `block`; a block behind the end is the lowest's.
    pub(super) fn layer(&self, block: u64) -> u8 {
        let (leaf, at) = place(block);
        match self.leaves.get(leaf) {
            Some(Leaf::One(layer)) => *layer,
            Some(Leaf::Mixed(layers)) => layers[at],
            None => 0,
        }
    }

    /// The layer of the first of `blocks`, and how far it has them: at least that one.
    pub(super) fn run(&self, blocks: Range<u64>) -> (u8, u64) {
        let layer = self.layer(blocks.start);
        let mut end = blocks.start;
        while end < blocks.end {
            let (leaf, at) = place(end);
            match self.leaves.get(leaf) {
                Some(Leaf::Mixed(layers)) => {
                    let same = layers[at..].iter().take_while(|&&found| found == layer).count();
                    end += same as u64;
                    if at + same < LEAF {
                        break;
                    }
                }
                Some(Leaf::One(found)) if *found == layer => end += (LEAF - at) as u64,
                _ => break,
            }
        }
        (layer, end.clamp(blocks.start + 1, blocks.end.max(blocks.start + 1)))
    }

    /// Whether `layer` has all of `blocks`.
    pub(super) fn has(&self, layer: u8, blocks: Range<u64>) -> bool {
        self.run(blocks.clone()) == (layer, blocks.end)
    }

    /// Gives every block of a layer to the one that `new` names for it.
    pub(super) fn renumber(&mut self, new: impl Fn(u8) -> u8) {
        for leaf in &mut self.leaves {
            match leaf {
                Leaf::One(layer) => *layer = new(*layer),
                Leaf::Mixed(layers) => layers.iter_mut().for_each(|layer| *layer = new(*layer)),
            }
        }
    }

    /// Gives `blocks` to `layer`.
    pub(super) fn set(&mut self, layer: u8, blocks: Range<u64>) {
        let mut at = blocks.start;
        while at < blocks.end {
            let (number, first) = place(at);
            #[allow(clippy::cast_possible_truncation)] // at most LEAF
            let count = ((LEAF - first) as u64).min(blocks.end - at) as usize;
            let Some(leaf) = self.leaves.get_mut(number) else { return };
            match leaf {
                Leaf::One(found) if *found == layer => {}
                leaf if count == LEAF => *leaf = Leaf::One(layer),
                Leaf::One(found) => {
                    let mut layers = Box::new([*found; LEAF]);
                    layers[first..first + count].fill(layer);
                    *leaf = Leaf::Mixed(layers);
                }
                Leaf::Mixed(layers) => layers[first..first + count].fill(layer),
            }
            at += count as u64;
        }
    }
}

#[cfg(test)]
#[allow(clippy::cast_possible_truncation)] // small numbers
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn it_is_an_array_of_layers(
            sets in proptest::collection::vec((0u8..5, 0u64..20_000, 1u64..9000), 0..20),
            asked in proptest::collection::vec((0u64..20_000, 1u64..9000), 1..20),
        ) {
            const BLOCKS: u64 = 20_000;
            let (mut map, mut model) = (Map::new(BLOCKS), vec![0u8; BLOCKS as usize]);
            for (layer, start, count) in sets {
                let end = (start + count).min(BLOCKS);
                map.set(layer, start..end);
                model[start as usize..end as usize].fill(layer);
            }
            for (start, count) in asked {
                let end = (start + count).min(BLOCKS);
                let layer = model[start as usize];
                let same = model[start as usize..end as usize].iter().take_while(|&&found| found == layer).count();
                prop_assert_eq!(map.run(start..end), (layer, start + same as u64));
                prop_assert_eq!(map.has(layer, start..end), start + same as u64 == end);
            }
        }
    }
}
