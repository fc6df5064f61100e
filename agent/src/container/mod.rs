//! Containers: the registry and each one's life, Creating → Created → Running → Stopped.
//!
//! * [`spec`]: what of the OCI spec the guest accepts, and how it is rewritten.
//! * [`disks`], [`rootfs`]: block devices by serial, joined by overlayfs.
//! * [`cgroup`]: everything that belongs to a container, by its cgroup.
//! * [`devices`]: which device nodes it may use.
//! * [`registry`]: the requests.

pub mod cgroup;
pub mod devices;
pub mod disks;
pub mod registry;
pub mod rootfs;
pub mod spec;
