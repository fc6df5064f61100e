//! Memory-mapped registers.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex};

use super::range::{BusError, RangeMap};

/// A device with memory-mapped registers. Called from vCPU threads under the device's lock.
pub trait MmioDevice: Send {
    /// Fills all of `data` from the register at `offset` into the device's range.
    fn read(&mut self, offset: u64, data: &mut [u8]);
    /// Writes `data` to the register at `offset` into the device's range.
    fn write(&mut self, offset: u64, data: &[u8]);
}

/// A 32-bit register that is reached without its device's lock, for accesses that must not wait
/// for the device's work. What it does not answer, the device does.
pub trait MmioRegister: fmt::Debug + Send + Sync {
    fn read(&self) -> Option<u32>;
    /// False when the device shall have it.
    fn write(&self, value: u32) -> bool;
}

/// The memory outside RAM.
#[derive(Debug)]
pub struct MmioBus {
    devices: RangeMap<dyn MmioDevice>,
    registers: BTreeMap<u64, Arc<dyn MmioRegister>>,
}

impl Default for MmioBus {
    fn default() -> Self {
        Self { devices: RangeMap::new("MMIO"), registers: BTreeMap::new() }
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
        self.devices.insert(base, size, name, device)
    }

    /// Puts a register before the device that has its address.
    pub fn insert_register(&mut self, address: u64, register: Arc<dyn MmioRegister>) {
        self.registers.insert(address, register);
    }

    /// Reads; all ones, as on real buses, where nothing answers. False says that nothing did.
    pub fn read(&self, address: u64, data: &mut [u8]) -> bool {
        if let Ok(word) = <&mut [u8; 4]>::try_from(&mut *data)
            && let Some(value) = self.registers.get(&address).and_then(|register| register.read())
        {
            *word = value.to_le_bytes();
            return true;
        }
        match self.devices.find(address, data.len()) {
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
        if let Ok(word) = <[u8; 4]>::try_from(data)
            && let Some(register) = self.registers.get(&address)
            && register.write(u32::from_le_bytes(word))
        {
            return true;
        }
        let hit = self.devices.find(address, data.len());
        hit.map(|(offset, mut device)| device.write(offset, data)).is_some()
    }
}
