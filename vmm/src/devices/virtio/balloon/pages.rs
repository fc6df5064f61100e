//! From the page numbers of a request to ranges of guest addresses.

use std::ops::Range;

use super::spec::{MAX_PFNS, PAGE, PFN};
use crate::devices::virtio::queue::Buffers;

/// The page numbers of a request, ascending, each once, and the bytes that were left out
/// because they are too many or no whole number.
pub(super) fn numbers(request: &Buffers<'_>) -> (Vec<u32>, usize) {
    let mut bytes = vec![0; request.len().min(MAX_PFNS * PFN)];
    let read = request.read_at(0, &mut bytes);
    let whole = bytes[..read].chunks_exact(PFN);
    let mut numbers: Vec<u32> =
        whole.map(|number| u32::from_le_bytes([number[0], number[1], number[2], number[3]])).collect();
    let left_out = request.len() - numbers.len() * PFN;
    numbers.sort_unstable();
    numbers.dedup();
    (numbers, left_out)
}

/// The ranges that ascending page numbers make. Neighbours are one range: fewer calls, and a
/// huge page goes in one piece.
pub(super) fn ranges(numbers: &[u32]) -> impl Iterator<Item = Range<u64>> {
    numbers.chunk_by(|one, next| one.checked_add(1) == Some(*next)).map(|run| {
        let start = run.first().map_or(0, |first| u64::from(*first) * PAGE);
        start..start + run.len() as u64 * PAGE
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_make_one_range() {
        let made: Vec<_> = ranges(&[0, 1, 2, 7, 9, 10, u32::MAX]).collect();
        let last = u64::from(u32::MAX) * PAGE;
        assert_eq!(made, [0..3 * PAGE, 7 * PAGE..8 * PAGE, 9 * PAGE..11 * PAGE, last..last + PAGE]);
        assert_eq!(ranges(&[]).count(), 0);
    }
}
