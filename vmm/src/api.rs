//! The control protocol between a VMM process and its one peer (the shim, or
//! `spore-vmm run` talking to itself).
//!
//! Transport: a `SOCK_SEQPACKET` Unix socket pair, one JSON document per packet,
//! at most [`MAX_MESSAGE`] bytes, with open descriptors attached by `SCM_RIGHTS`
//! (at most [`MAX_FDS`]). A message names an attached descriptor by its position
//! ([`FdIndex`]); every attached descriptor must be named exactly once. The VMM
//! opens nothing by path.
//!
//! The peer sends [`Request`]s and receives [`Message`]s: one [`Message::Response`]
//! for each request, in the order of the requests (save `Shutdown`, which is answered
//! when it was accepted), and [`Message::Event`]s at any time. When the peer closes the
//! socket the VMM exits; when the VMM closes it, the VM is gone.
//!
//! This module is shared with the shim and depends on nothing else of the crate.

use serde::{Deserialize, Serialize};

/// Version of this protocol. [`VmConfig::protocol`] must equal it.
pub const PROTOCOL_VERSION: u32 = 1;
/// Largest packet in bytes, either direction.
pub const MAX_MESSAGE: usize = 64 * 1024;
/// Most descriptors that one packet may carry.
pub const MAX_FDS: usize = 64;
/// Most vCPUs of one VM.
pub const MAX_VCPUS: u8 = 32;
/// Smallest guest memory in MiB, and what a balloon leaves. Less cannot hold a kernel and its initramfs.
pub const MIN_MEMORY_MIB: u64 = 64;
/// Largest guest memory in MiB.
pub const MAX_MEMORY_MIB: u64 = 1024 * 1024;

/// Most disk slots of one kind.
pub const MAX_DISK_SLOTS: u8 = 12;

/// Most bytes of a file system's tag.
pub const MAX_TAG: usize = 36;
/// Most sockets of a file server, each for one request at a time.
pub const MAX_SERVER_SOCKETS: usize = 16;

/// Position of a descriptor among those attached to the same packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct FdIndex(pub u32);

/// A numbered call.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Request {
    /// Chosen by the peer, echoed in the response.
    pub id: u64,
    pub call: Call,
}

/// What the peer can ask for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Call {
    /// Build the VM: memory, vCPUs, devices; load kernel and initramfs. Once, first.
    Configure(VmConfig),
    /// Let the vCPUs run. Once, after `Configure`.
    Boot,
    /// Put a disk into a free slot of the right kind, before or after `Boot`.
    AttachDisk(DiskConfig),
    /// Give the file system device its server, once, before or after `Boot`: connected Unix stream
    /// sockets, 1 ..= [`MAX_SERVER_SOCKETS`]. Each carries FUSE requests one at a time, as the
    /// guest wrote them but with the true length in the header; each request is answered by one
    /// FUSE reply, also those that FUSE leaves unanswered.
    AttachFilesystem { sockets: Vec<FdIndex> },
    /// Ask the guest to give `target_mib` MiB of its memory up to the host, or to take back what is
    /// beyond; 0 gives it all. At most the guest's memory less [`MIN_MEMORY_MIB`]. Answered at once:
    /// the guest follows in its own time and as far as it can, see [`Metrics::balloon`].
    SetBalloon { target_mib: u64 },
    /// Bring the VM to a quiescent point: vCPUs out of KVM_RUN, no request in flight. Until
    /// `Resume` no device does any work: requests, bytes for the guest and clients wait.
    Pause,
    /// Continue after `Pause`.
    Resume,
    /// Press the power button; after `deadline_ms` milliseconds end the VM by force. 0 ends it by
    /// force at once, in any state and without the button.
    Shutdown { deadline_ms: u64 },
    /// Report the life-cycle state.
    State,
    /// Report counters and boot times.
    Metrics,
}

/// A VM to build.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmConfig {
    /// [`PROTOCOL_VERSION`].
    pub protocol: u32,
    /// 1 ..= [`MAX_VCPUS`].
    pub vcpus: u8,
    /// [`MIN_MEMORY_MIB`] ..= [`MAX_MEMORY_MIB`].
    pub memory_mib: u64,
    /// An open `/dev/kvm`.
    pub kvm: FdIndex,
    /// A bzImage or an x86_64 ELF vmlinux, open for reading.
    pub kernel: FdIndex,
    /// The initramfs, open for reading.
    pub initrd: Option<FdIndex>,
    /// Kernel command line, ASCII without NUL, at most 2047 bytes.
    pub cmdline: String,
    /// Where the serial port's output goes. Without it, output is dropped.
    pub console: Option<ConsoleConfig>,
    pub vsock: Option<VsockConfig>,
    /// Slots that disks can be attached to, now or while the guest runs.
    #[serde(default)]
    pub disk_slots: DiskSlots,
    /// The tag of a file system device, 1 ..= [`MAX_TAG`] bytes of printable ASCII. None: there
    /// is no such device.
    #[serde(default)]
    pub filesystem: Option<String>,
    /// Disks attached from the start, each taking the next free slot of its kind.
    #[serde(default)]
    pub disks: Vec<DiskConfig>,
}

/// How many disks of each kind a VM can have, each 0 ..= [`MAX_DISK_SLOTS`] (the default). A
/// guest probes every slot as it boots, the empty ones too.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskSlots {
    pub read_only: u8,
    pub writable: u8,
}

impl Default for DiskSlots {
    fn default() -> Self {
        Self { read_only: MAX_DISK_SLOTS, writable: MAX_DISK_SLOTS }
    }
}

/// The serial console (COM1).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ConsoleConfig {
    /// Open for writing; a file, a pipe or a terminal.
    pub output: FdIndex,
    /// Fed to the guest's receiver when given (`spore-vmm run --console`).
    pub input: Option<FdIndex>,
    /// Output stops after this many bytes, with one line that says so. 0: no cap.
    pub cap_bytes: u64,
}

/// The vsock device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VsockConfig {
    /// The guest's context id, 3 ..= 0xffff_fffe.
    pub guest_cid: u32,
    /// A listening Unix stream socket. Each connection to it says `CONNECT <port>\n`
    /// and is answered `OK <host port>\n` when the guest accepts; it is closed when the
    /// guest refuses.
    pub listener: FdIndex,
    /// Host ports (CID 2) that the guest may connect to. Each accepted connection
    /// reaches the peer as [`Event::GuestConnection`]; all other ports are reset.
    #[serde(default)]
    pub host_ports: Vec<u32>,
}

/// One disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskConfig {
    /// A raw image: a regular file or block device, opened as `read_only` says.
    pub file: FdIndex,
    /// Chooses the kind of slot; the guest sees VIRTIO_BLK_F_RO there.
    pub read_only: bool,
}

/// What the VMM sends.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Message {
    Response { id: u64, result: Result<Reply, Failure> },
    Event(Event),
}

/// A successful answer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reply {
    Done,
    /// `Configure` succeeded: the slots that the VM has, and where each disk of the
    /// configuration went, in its order.
    Configured {
        disk_slots: DiskSlots,
        disks: Vec<AttachedDisk>,
    },
    Attached(AttachedDisk),
    State(VmState),
    Metrics(Metrics),
}

/// Where a disk went.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AttachedDisk {
    /// What the guest reads by VIRTIO_BLK_T_GET_ID, in Linux
    /// `/sys/block/*/serial`: `ro0`, `ro1`, …, `rw0`, ….
    pub serial: String,
}

/// A refusal or a fault. The VM is as it was before the call, unless `code` is
/// [`FailureCode::Ended`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct Failure {
    pub code: FailureCode,
    /// Object, operation, cause and, where there is one, the mend.
    pub message: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FailureCode {
    /// The message or a value in it is not acceptable.
    InvalidArgument,
    /// The call does not fit the VM's state.
    WrongState,
    /// No free slot.
    Exhausted,
    /// The host lacks something (KVM, memory, a capability).
    HostUnfit,
    /// The kernel or initramfs cannot be booted.
    BadImage,
    /// The guest has ended already; the reason follows as [`Event::Ended`].
    Ended,
}

/// The life cycle of a VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum VmState {
    /// Not configured yet.
    Empty,
    /// Configured, not booted.
    Configured,
    Running,
    Paused,
    /// The power button was pressed.
    ShuttingDown,
    Ended,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Event {
    /// The guest connected to a host port; the packet carries one descriptor, a
    /// connected Unix stream socket.
    GuestConnection { port: u32 },
    /// The guest ended. The last message: the VMM exits after it.
    Ended(EndReason),
}

/// Why a guest ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EndReason {
    /// The guest powered itself off (ACPI S5).
    Shutdown,
    /// The guest asked for a reset, which Spore never performs.
    Reset,
    /// A vCPU faulted beyond recovery.
    TripleFault { vcpu: u8, registers: String },
    /// KVM or the VMM failed.
    InternalError { vcpu: Option<u8>, detail: String, registers: Option<String> },
    /// The guest ignored the power button until the deadline, or the deadline was 0.
    Forced,
}

/// Counters since `Configure`. Times are `CLOCK_MONOTONIC` nanoseconds of the host.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Metrics {
    pub boot: BootTimes,
    /// KVM exits by kind, summed over vCPUs.
    pub exits: Exits,
    pub blk: Vec<BlkMetrics>,
    pub vsock: VsockMetrics,
    #[serde(default)]
    pub filesystem: FsMetrics,
    #[serde(default)]
    pub balloon: BalloonMetrics,
    pub console_bytes: u64,
    /// Bytes of console output that were dropped: beyond the cap, or because what they go to took
    /// nothing for too long.
    pub console_dropped: u64,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BootTimes {
    pub process_start_ns: u64,
    pub configured_ns: u64,
    /// First entry of vCPU 0 into the guest.
    pub entered_ns: u64,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exits {
    pub mmio: u64,
    pub pio: u64,
    pub hlt: u64,
    pub interrupted: u64,
    pub other: u64,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlkMetrics {
    pub serial: String,
    pub reads: u64,
    pub writes: u64,
    pub flushes: u64,
    pub discards: u64,
    pub read_bytes: u64,
    pub written_bytes: u64,
    /// Requests answered with an error status.
    pub errors: u64,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VsockMetrics {
    pub connections: u64,
    pub resets: u64,
    pub rx_bytes: u64,
    pub tx_bytes: u64,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FsMetrics {
    pub requests: u64,
    /// Bytes of requests to the server, and of its answers.
    pub sent_bytes: u64,
    pub received_bytes: u64,
    /// Requests that the server did not answer.
    pub errors: u64,
}

/// Memory that the guest gave to the host.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BalloonMetrics {
    /// What the balloon shall hold (`SetBalloon`).
    pub target_bytes: u64,
    /// What the guest says that it holds.
    pub actual_bytes: u64,
    /// Given back by the balloon, in all; the guest may have taken it again.
    pub inflated_bytes: u64,
    /// Given back by free page reporting, in all; the guest may have taken it again.
    pub reported_bytes: u64,
}
