//! The buses that a vCPU's exits are dispatched on: [`MmioBus`] for memory accesses outside
//! RAM, [`PioBus`] for port accesses. A vCPU knows buses only; what sits on them is the
//! builder's business. Ranges are checked for overlap when a device is placed, and a bus does
//! not change once vCPUs run, so a lookup takes no lock but the device's own.

mod mmio;
mod pio;
mod range;

pub use mmio::{MmioBus, MmioDevice, MmioRegister};
pub use pio::{PioBus, PioDevice};
pub use range::BusError;
