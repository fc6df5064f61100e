//! Memory-mapped registers.

use std::sync::{Arc, Mutex};

use super::range::{BusError, RangeMap};

/// A device with memory-mapped registers. Called from vCPU threads under the device's lock.
pub trait MmioDevice: Send {
    /// Fills all of `data` from the register at `offset` into the device's range.
    fn read(&mut self, offset: u64, data: &mut [u8]);
    /// Writes `data` to the register at `offset` into the device's range.
    fn write(&mut self, offset: u64, data: &[u8]);
}

/// The memory outside RAM.
#[derive(Debug)]
pub struct MmioBus(RangeMap<dyn MmioDevice>);

impl Default for MmioBus {
    fn default() -> Self {
        Self(RangeMap::new("MMIO"))
    }
}

impl MmioBus {
    pub fn insert(
        &mut self,
        base: u64,
        size: u64,
        name: &str,
        device: Arc<Mutex<dyn MmioDevice>>,
    ) -> Result<(), BusError> {
        self.0.insert(base, size, name, device)
    }

    /// Reads; all ones, as on real buses, where nothing answers. False says that nothing did.
    pub fn read(&self, address: u64, data: &mut [u8]) -> bool {
        match self.0.find(address, data.len()) {
            Some((offset, mut device)) => {
                device.read(offset, data);
                true
            }
            None => {
                data.fill(0xff);
                false
            }
        }
    }

    /// Writes; false when nothing answers.
    pub fn write(&self, address: u64, data: &[u8]) -> bool {
        let hit = self.0.find(address, data.len());
        hit.map(|(offset, mut device)| device.write(offset, data)).is_some()
    }
}
