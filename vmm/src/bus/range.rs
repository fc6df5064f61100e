//! Address ranges that do not overlap, each with a device behind its own lock.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard};

/// Why a device cannot be placed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BusError {
    #[error("{bus} range {base:#x}+{size:#x} of `{name}` is empty or wraps")]
    Empty { bus: &'static str, name: String, base: u64, size: u64 },
    #[error("{bus} range {base:#x}+{size:#x} of `{name}` overlaps `{other}` at {other_base:#x}")]
    Overlap { bus: &'static str, name: String, base: u64, size: u64, other: String, other_base: u64 },
}

struct Entry<D: ?Sized> {
    base: u64,
    size: u64,
    name: String,
    device: Arc<Mutex<D>>,
}

/// Ranges sorted by base.
pub(super) struct RangeMap<D: ?Sized> {
    bus: &'static str,
    entries: Vec<Entry<D>>,
}

impl<D: ?Sized> RangeMap<D> {
    pub(super) fn new(bus: &'static str) -> Self {
        Self { bus, entries: Vec::new() }
    }

    pub(super) fn insert(
        &mut self,
        base: u64,
        size: u64,
        name: &str,
        device: Arc<Mutex<D>>,
    ) -> Result<(), BusError> {
        let name = name.to_owned();
        if size == 0 || base.checked_add(size).is_none() {
            return Err(BusError::Empty { bus: self.bus, name, base, size });
        }
        let at = self.entries.partition_point(|e| e.base < base);
        let before = at.checked_sub(1).and_then(|i| self.entries.get(i));
        let clash = before
            .filter(|e| e.base + e.size > base)
            .or_else(|| self.entries.get(at).filter(|e| e.base < base + size));
        if let Some(e) = clash {
            return Err(BusError::Overlap {
                bus: self.bus,
                name,
                base,
                size,
                other: e.name.clone(),
                other_base: e.base,
            });
        }
        self.entries.insert(at, Entry { base, size, name, device });
        Ok(())
    }

    /// The device that owns all of `address .. address + len`, locked, with the offset into it.
    pub(super) fn find(&self, address: u64, len: usize) -> Option<(u64, MutexGuard<'_, D>)> {
        let at = self.entries.partition_point(|e| e.base <= address).checked_sub(1)?;
        let entry = self.entries.get(at)?;
        let offset = address - entry.base;
        if offset.checked_add(len as u64)? > entry.size {
            return None;
        }
        // A poisoned lock means that a device panicked on another thread; that thread reports
        // the VM's end, and until it has, this one may go on with the device as it is.
        let guard = entry.device.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        Some((offset, guard))
    }
}

impl<D: ?Sized> fmt::Debug for RangeMap<D> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_map().entries(self.entries.iter().map(|e| (e.base, &e.name))).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(ranges: &[(u64, u64)]) -> Result<RangeMap<u32>, BusError> {
        let mut map = RangeMap::new("test");
        for (i, (base, size)) in ranges.iter().enumerate() {
            let value = u32::try_from(i).unwrap();
            map.insert(*base, *size, &format!("d{i}"), Arc::new(Mutex::new(value)))?;
        }
        Ok(map)
    }

    #[test]
    fn finds_the_owner_of_an_address() {
        let map = map(&[(0x3000, 0x1000), (0x1000, 0x1000), (0x2000, 0x10)]).unwrap();
        let hit = |a, l| map.find(a, l).map(|(offset, d)| (offset, *d));
        assert_eq!(hit(0x1000, 4), Some((0, 1)));
        assert_eq!(hit(0x1ffc, 4), Some((0xffc, 1)));
        assert_eq!(hit(0x1ffd, 4), None, "straddles two devices");
        assert_eq!(hit(0x200f, 1), Some((0xf, 2)));
        assert_eq!(hit(0x2010, 1), None);
        assert_eq!(hit(0xfff, 1), None);
        assert_eq!(hit(u64::MAX, 8), None);
    }

    #[test]
    fn refuses_overlap_and_empty_ranges() {
        for clash in [[(0x1000, 0x10), (0x100f, 1)], [(0x1000, 0x10), (0xff0, 0x11)], [(0, 1), (0, 1)]] {
            assert!(matches!(map(&clash), Err(BusError::Overlap { .. })), "{clash:x?}");
        }
        assert!(map(&[(0x1000, 0x10), (0x1010, 1), (0xff0, 0x10)]).is_ok());
        assert!(matches!(map(&[(0, 0)]), Err(BusError::Empty { .. })));
        assert!(matches!(map(&[(u64::MAX, 2)]), Err(BusError::Empty { .. })));
    }
}
