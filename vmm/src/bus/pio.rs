//! Port I/O.

use std::sync::{Arc, Mutex};

use super::range::{BusError, RangeMap};

/// A device with byte-wide ports. Called from vCPU threads under the device's lock.
pub trait PioDevice: Send {
    fn read(&mut self, offset: u16) -> u8;
    fn write(&mut self, offset: u16, value: u8);
}

/// The port space.
#[derive(Debug)]
pub struct PioBus(RangeMap<dyn PioDevice>);

impl Default for PioBus {
    fn default() -> Self {
        Self(RangeMap::new("port"))
    }
}

impl PioBus {
    pub fn insert(
        &mut self,
        base: u16,
        size: u16,
        name: &str,
        device: Arc<Mutex<dyn PioDevice>>,
    ) -> Result<(), BusError> {
        self.0.insert(base.into(), size.into(), name, device)
    }

    /// Reads. Our devices are a byte wide, so wider accesses see one port and ones above it,
    /// and a string instruction's repetitions (KVM hands them over together) are the caller's
    /// to split. All ones where nothing answers.
    pub fn read(&self, port: u16, data: &mut [u8]) -> bool {
        data.fill(0xff);
        let (Some((offset, mut device)), Some(first)) = (self.0.find(port.into(), 1), data.first_mut())
        else {
            return false;
        };
        *first = device.read(u16::try_from(offset).unwrap_or_default());
        true
    }

    /// Writes the lowest byte; false when nothing answers.
    pub fn write(&self, port: u16, data: &[u8]) -> bool {
        let (Some((offset, mut device)), Some(first)) = (self.0.find(port.into(), 1), data.first()) else {
            return false;
        };
        device.write(u16::try_from(offset).unwrap_or_default(), *first);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Latch(u8);

    impl PioDevice for Latch {
        fn read(&mut self, offset: u16) -> u8 {
            self.0 + u8::try_from(offset).unwrap()
        }
        fn write(&mut self, _offset: u16, value: u8) {
            self.0 = value;
        }
    }

    #[test]
    fn wide_accesses_touch_one_port() {
        let mut bus = PioBus::default();
        bus.insert(0x80, 2, "latch", Arc::new(Mutex::new(Latch(1)))).unwrap();
        assert!(bus.write(0x80, &[7, 8, 9, 10]));
        let mut data = [0; 4];
        assert!(bus.read(0x81, &mut data));
        assert_eq!(data, [8, 0xff, 0xff, 0xff]);
        assert!(!bus.read(0x82, &mut data));
        assert_eq!(data, [0xff; 4]);
        assert!(!bus.write(0x7f, &[0]));
    }
}
