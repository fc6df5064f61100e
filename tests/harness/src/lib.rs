//! The ground that Spore's tests, benchmarks and demo stand on.
//!
//! Containers in microVMs need a KVM that boots stock kernels. Where the host has one the
//! programs run directly on it ([`host::direct`]), in namespaces of their own over the test
//! bed's root file system; elsewhere they run in an *outer machine* ([`host::machine`]): QEMU
//! with an emulated or nested virtualising CPU over the same file system. [`ground`] decides.
//!
//! * [`host`] runs on the developer's machine: builds and caches the root file system from
//!   Debian packages, packs the binaries under test, starts the ground, streams output back.
//! * [`inside`] runs on the ground: PID 1 of the outer machine, installation of the binaries,
//!   the job, collection of logs.
//! * [`image`], [`containerd`], [`api`], [`docker`], [`network`], [`leftovers`], [`processes`] and [`wait`] serve the programs that run on the
//!   ground (`tests/e2e`, `tests/bench`, the demo): images made without a registry, private
//!   containerd instances, lists of everything a run could leave behind, deadlines.
//!
//! Nothing outside `tests/` imports this crate.

pub mod api;
pub mod archive;
pub mod bed;
pub mod call;
pub mod containerd;
pub mod demo;
pub mod docker;
pub mod ground;
pub mod host;
pub mod image;
pub mod inside;
pub mod job;
pub mod leftovers;
pub mod network;
pub mod processes;
pub mod shard;
pub mod wait;
