//! What runs on the developer's machine: preparing a ground and running a job on it.
//!
//! [`cache`] keeps what is slow to make; [`rootfs`] makes the ground's root file system from
//! Debian packages, and [`applications`] an image for containers; [`qemu`] fetches the outer
//! machine's emulator; [`payload`] packs the binaries under test; [`machine`] and [`direct`]
//! run a job; [`run`] ties them together.

pub mod applications;
pub mod cache;
pub mod direct;
pub mod initramfs;
pub mod machine;
pub mod payload;
pub mod qemu;
pub mod relay;
pub mod rootfs;
pub mod run;
