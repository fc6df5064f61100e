//! COM1: the guest's voice and ear.

use core::fmt;

use crate::cpu;

const DATA: u16 = 0x3f8;
const LINE_STATUS: u16 = 0x3fd;

pub struct Serial;

impl fmt::Write for Serial {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for byte in text.bytes() {
            cpu::out8(DATA, byte);
        }
        Ok(())
    }
}

/// Prints one line. It leaves in one piece: lines of different CPUs never mix, since
/// only the first CPU speaks.
#[macro_export]
macro_rules! say {
    ($($text:tt)*) => {{
        use core::fmt::Write;
        let _ = writeln!($crate::serial::Serial, $($text)*);
    }};
}

/// Prints by string output.
pub fn write_string(bytes: &[u8]) {
    cpu::out_bytes(DATA, bytes);
}

/// Reads one line from the receiver into `line`; what does not fit is dropped.
pub fn read_line(line: &mut [u8]) -> &str {
    let mut used = 0;
    loop {
        if cpu::in8(LINE_STATUS) & 1 == 0 {
            cpu::relax();
            continue;
        }
        match cpu::in8(DATA) {
            b'\n' => return core::str::from_utf8(&line[..used]).unwrap_or("?"),
            byte if used < line.len() => {
                line[used] = byte;
                used += 1;
            }
            _ => {}
        }
    }
}
