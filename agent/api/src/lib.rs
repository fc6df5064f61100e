//! What the shim and the guest agent say to each other: ttrpc services (see
//! `proto/spore/agent/v1`) on vsock port [`RPC_PORT`], and raw byte streams for stdio on
//! [`STDIO_PORT`], each begun by a [`stream::Hello`].

// Generated code keeps its generator's habits.
#[allow(
    clippy::all,
    clippy::pedantic,
    clippy::unwrap_used,
    clippy::expect_used,
    rust_2018_idioms,
    unreachable_pub,
    missing_docs
)]
pub mod v1 {
    include!(concat!(env!("OUT_DIR"), "/mod.rs"));
}

pub mod changes;
pub mod files;
pub mod network;
pub mod stream;

/// Version of the API, reported by `Sandbox.Info`.
pub const API_VERSION: u32 = 1;
/// Guest vsock port of the ttrpc services.
pub const RPC_PORT: u32 = 1024;
/// Guest vsock port of stdio streams.
pub const STDIO_PORT: u32 = 1025;
/// Host vsock port (CID 2) that the agent connects to once both guest ports listen. The
/// connection carries no bytes; its arrival means "ready".
pub const READY_PORT: u32 = 1024;
/// Host vsock port (CID 2) that the agent connects to for each question of a container's to the
/// host's name server ([`network::NAME_SERVER`]).
pub const NAMES_PORT: u32 = 1025;
/// Largest OCI spec in bytes.
pub const MAX_SPEC: usize = 4 * 1024 * 1024;
/// Tag of the virtio-fs device that shows the host's directories and files.
pub const VOLUMES_TAG: &str = "spore-volumes";
/// Where the guest mounts it. In a spec that the shim sends, a bind mount's source is a decimal
/// number below this directory: the export's.
pub const VOLUMES_DIR: &str = "/run/spore/volumes";
/// File systems that a container may mount; each is the guest kernel's own. No devtmpfs: it
/// would show the guest's own disks, and a container's `/dev` is a tmpfs.
pub const MOUNT_TYPES: [&str; 8] =
    ["proc", "sysfs", "tmpfs", "devpts", "mqueue", "cgroup", "cgroup2", "ramfs"];
