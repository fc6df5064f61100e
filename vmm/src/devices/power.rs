//! Power control: the registers by which a guest turns itself off or asks for a reset
//! (ACPI 6.5, 4.8.3.7 sleep control and status, 4.8.3.6 reset), and the command port of a PC's
//! keyboard controller, by which older software resets. Neither has state.

use std::sync::Arc;

use crate::api::EndReason;
use crate::bus::PioDevice;
use crate::end::EndLatch;
use crate::log;

/// Offsets of the one-byte registers.
pub const SLEEP_CONTROL: u16 = 0;
pub const SLEEP_STATUS: u16 = 1;
pub const RESET: u16 = 2;
/// What resets when written to [`RESET`].
pub const RESET_VALUE: u8 = 1;
/// The sleep type that means "soft off"; the DSDT's `_S5` says so to the guest.
pub const SLEEP_TYPE_S5: u8 = 5;
const SLEEP_ENABLE: u8 = 1 << 5;
const SLEEP_TYPE_SHIFT: u8 = 2;
const SLEEP_TYPE_MASK: u8 = 7;
/// The keyboard controller's "pulse the reset line".
const PULSE_RESET: u8 = 0xfe;

static ODD_SLEEP: log::Limited = log::Limited::new();

/// Sleep and reset registers.
#[derive(Debug)]
pub struct PowerControl(Arc<EndLatch>);

impl PowerControl {
    pub fn new(end: Arc<EndLatch>) -> Self {
        Self(end)
    }
}

impl PioDevice for PowerControl {
    fn read(&mut self, _offset: u16) -> u8 {
        0
    }

    fn write(&mut self, offset: u16, value: u8) {
        match offset {
            SLEEP_CONTROL if value & SLEEP_ENABLE != 0 => {
                let kind = value >> SLEEP_TYPE_SHIFT & SLEEP_TYPE_MASK;
                if kind == SLEEP_TYPE_S5 {
                    self.0.set(EndReason::Shutdown);
                } else {
                    ODD_SLEEP
                        .warn("power", format_args!("guest asked for unknown sleep type {kind}; ignored"));
                }
            }
            RESET if value == RESET_VALUE => self.0.set(EndReason::Reset),
            _ => {}
        }
    }
}

/// The keyboard controller's command port: always idle, knows one command.
#[derive(Debug)]
pub struct KeyboardReset(Arc<EndLatch>);

impl KeyboardReset {
    pub fn new(end: Arc<EndLatch>) -> Self {
        Self(end)
    }
}

impl PioDevice for KeyboardReset {
    fn read(&mut self, _offset: u16) -> u8 {
        0
    }

    fn write(&mut self, _offset: u16, value: u8) {
        if value == PULSE_RESET {
            self.0.set(EndReason::Reset);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn after(writes: &[(u16, u8)]) -> Option<EndReason> {
        let end = Arc::new(EndLatch::new().unwrap());
        let mut device = PowerControl::new(Arc::clone(&end));
        for (offset, value) in writes {
            device.write(*offset, *value);
        }
        end.reason()
    }

    #[test]
    fn s5_shuts_down_and_reset_resets() {
        assert_eq!(after(&[(SLEEP_CONTROL, SLEEP_TYPE_S5 << 2 | SLEEP_ENABLE)]), Some(EndReason::Shutdown));
        assert_eq!(after(&[(RESET, RESET_VALUE)]), Some(EndReason::Reset));
        assert_eq!(after(&[(SLEEP_CONTROL, SLEEP_TYPE_S5 << 2)]), None, "without the enable bit");
        assert_eq!(after(&[(SLEEP_CONTROL, 3 << 2 | SLEEP_ENABLE)]), None, "another sleep state");
        assert_eq!(after(&[(SLEEP_STATUS, 0x80), (RESET, 0)]), None);
    }

    #[test]
    fn keyboard_controller_pulses_reset() {
        let end = Arc::new(EndLatch::new().unwrap());
        let mut device = KeyboardReset::new(Arc::clone(&end));
        device.write(0, 0xd1);
        assert_eq!(end.reason(), None);
        device.write(0, PULSE_RESET);
        assert_eq!(end.reason(), Some(EndReason::Reset));
    }
}
