//! Bare-metal guests for the VMM's own tests.
//!
//! `guest/` holds one program for a machine without an operating system (see its
//! `main.rs`); this crate carries it as bytes, in the wrappings that kernels come in, and
//! what a test needs to agree with it on: the byte pattern, the checksum, port numbers.
//! Boundary: knows nothing of the VMM.

mod image;
pub mod pattern;

pub use image::{bzimage, pvh, with_segment};

/// The guest as a 64-bit ELF executable, entered by the Linux 64-bit boot protocol.
pub const ELF: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/guest.elf"));

/// The guest's vsock services, by port (`guest/services.rs`).
pub mod port {
    /// Accepts and resets.
    pub const RESET: u32 = 3;
    /// Sends back what it receives.
    pub const ECHO: u32 = 7;
    /// Reads to the end of the stream, then answers `<bytes> <checksum>\n`.
    pub const SINK: u32 = 9;
    /// Accepts and never reads.
    pub const STALL: u32 = 13;
    /// Sends [`super::SOURCE_BYTES`] of the pattern with seed 19.
    pub const SOURCE: u32 = 19;
    /// Powers the machine off.
    pub const POWER_OFF: u32 = 99;
    /// Nobody listens.
    pub const CLOSED: u32 = 12345;
}

/// What [`port::SOURCE`] sends.
pub const SOURCE_BYTES: usize = 1024 * 1024;
/// Seed of that pattern.
pub const SOURCE_SEED: u64 = 19;

/// FNV-1a, 64 bits, as the guest computes it.
#[must_use]
pub fn checksum(bytes: &[u8]) -> u64 {
    bytes
        .iter()
        .fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3))
}

/// `length` bytes of the pattern `seed` from `offset` on.
#[must_use]
pub fn pattern_bytes(seed: u64, offset: u64, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    pattern::fill(seed, offset, &mut bytes);
    bytes
}
