//! Where RAM lies: from address 0, around the architecture's hole for devices.

use std::ops::Range;

use vm_memory::Address;

use super::Gpa;

/// A run of RAM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RamRange {
    pub start: Gpa,
    pub size: u64,
}

/// All RAM of a guest, in ascending order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RamLayout {
    ranges: Vec<RamRange>,
}

impl RamLayout {
    /// `size` bytes of RAM of which none lies in `hole`; what does not fit below continues
    /// right above.
    pub fn around(size: u64, hole: Range<u64>) -> Self {
        let below = size.min(hole.start);
        let mut ranges = vec![RamRange { start: Gpa::new(0), size: below }];
        if size > below {
            ranges.push(RamRange { start: Gpa::new(hole.end), size: size - below });
        }
        Self { ranges }
    }

    pub fn ranges(&self) -> &[RamRange] {
        &self.ranges
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;
    const HOLE: Range<u64> = 3 * GIB..4 * GIB;

    fn split(size: u64) -> Vec<(u64, u64)> {
        RamLayout::around(size, HOLE).ranges().iter().map(|r| (r.start.0, r.size)).collect()
    }

    #[test]
    fn splits_around_the_hole() {
        assert_eq!(split(128 << 20), [(0, 128 << 20)]);
        assert_eq!(split(3 * GIB), [(0, 3 * GIB)]);
        assert_eq!(split(3 * GIB + (1 << 20)), [(0, 3 * GIB), (4 * GIB, 1 << 20)]);
        assert_eq!(split(6 * GIB), [(0, 3 * GIB), (4 * GIB, 3 * GIB)]);
        assert_eq!(split(1024 * GIB), [(0, 3 * GIB), (4 * GIB, 1021 * GIB)]);
    }
}
