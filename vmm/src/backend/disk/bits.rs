//! Which blocks a layer has, in memory, and which pages of that the file does not say yet.

use std::collections::BTreeSet;
use std::ops::Range;

use super::format::{Geometry, PAGE, PAGE_BLOCKS};

type Page = Box<[u8; PAGE]>;

/// The bitmap of the layer that is written. A page that was never touched takes no memory.
#[derive(Debug, Default)]
pub(super) struct Bits {
    pages: Vec<Option<Page>>,
    /// Pages with bits that are not in the file.
    dirty: BTreeSet<usize>,
}

impl Bits {
    pub(super) fn new(geometry: &Geometry) -> Self {
        Self { pages: (0..geometry.pages()).map(|_| None).collect(), dirty: BTreeSet::new() }
    }

    /// Takes a page as it is in the file.
    pub(super) fn load(&mut self, at: usize, bytes: &[u8; PAGE]) {
        if let Some(page) = self.pages.get_mut(at) {
            *page = Some(Box::new(*bytes));
        }
    }

    /// Sets the bits of `blocks`, which lie on the disk.
    pub(super) fn set(&mut self, blocks: Range<u64>) {
        let mut at = blocks.start;
        while at < blocks.end {
            let number = usize::try_from(at / PAGE_BLOCKS).unwrap_or(usize::MAX);
            let first = at - at % PAGE_BLOCKS;
            let end = blocks.end.min(first + PAGE_BLOCKS);
            let Some(page) = self.pages.get_mut(number) else { return };
            let page = page.get_or_insert_with(|| Box::new([0; PAGE]));
            if set(page, at - first..end - first) {
                self.dirty.insert(number);
            }
            at = end;
        }
    }

    /// Whether the file says all that is known here.
    pub(super) fn is_clean(&self) -> bool {
        self.dirty.is_empty()
    }

    /// The pages that the file lacks, by number.
    pub(super) fn dirty(&self) -> impl Iterator<Item = (usize, &[u8; PAGE])> {
        let page = |&at: &usize| Some((at, &**self.pages.get(at)?.as_ref()?));
        self.dirty.iter().filter_map(page)
    }

    /// The file has them now.
    pub(super) fn cleaned(&mut self) {
        self.dirty.clear();
    }
}

/// Sets bits of one page; whether that changed any.
#[allow(clippy::cast_possible_truncation)] // bits of one page: below 32768
fn set(page: &mut [u8; PAGE], bits: Range<u64>) -> bool {
    let mut changed = false;
    let (mut at, end) = (bits.start as usize, bits.end as usize);
    while at < end {
        let (byte, bit) = (at / 8, at % 8);
        let count = (8 - bit).min(end - at);
        let mask = (0xffu8 >> (8 - count)) << bit;
        changed |= page[byte] & mask != mask;
        page[byte] |= mask;
        at += count;
    }
    changed
}

/// The runs of set bits in a page, as blocks of the page.
pub(super) fn runs(page: &[u8; PAGE]) -> impl Iterator<Item = Range<u64>> + '_ {
    let bit = |at: u64| page[usize::try_from(at / 8).unwrap_or(0)] >> (at % 8) & 1 == 1;
    let mut at = 0;
    std::iter::from_fn(move || {
        while at < PAGE_BLOCKS && !bit(at) {
            // A whole byte of nothing, mostly.
            at = if at % 8 == 0 && page[usize::try_from(at / 8).unwrap_or(0)] == 0 { at + 8 } else { at + 1 };
        }
        let start = at;
        while at < PAGE_BLOCKS && bit(at) {
            at += 1;
        }
        (start < at).then_some(start..at)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[allow(clippy::single_range_in_vec_init)] // a list of runs, of which there is one
    fn runs_are_what_was_set_and_only_changes_are_dirty() {
        let geometry = Geometry::of(1 << 30).unwrap();
        let mut bits = Bits::new(&geometry);
        let edge = PAGE_BLOCKS;
        for blocks in [0..1, 3..4, 4..9, 15..17, edge - 3..edge + 2, 5..6] {
            bits.set(blocks);
        }
        let found: Vec<_> = bits.dirty().map(|(at, page)| (at, runs(page).collect::<Vec<_>>())).collect();
        assert_eq!(found, [(0, vec![0..1, 3..9, 15..17, edge - 3..edge]), (1, vec![0..2])]);
        bits.cleaned();
        bits.set(4..8);
        assert!(bits.is_clean(), "they were set before");
        bits.set(edge + 2..edge + 3);
        assert_eq!(bits.dirty().map(|(at, _)| at).collect::<Vec<_>>(), [1]);
    }
}
