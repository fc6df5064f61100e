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
/// Most descriptors that one packet may carry. Linux takes 253 (SCM_MAX_FD).
pub const MAX_FDS: usize = 250;
/// Most vCPUs of one VM.
pub const MAX_VCPUS: u8 = 32;
/// Smallest guest memory in MiB, and what a balloon leaves. Less cannot hold a kernel and its initramfs.
pub const MIN_MEMORY_MIB: u64 = 64;
/// Largest guest memory in MiB.
pub const MAX_MEMORY_MIB: u64 = 1024 * 1024;

/// Most disk slots of one kind.
pub const MAX_DISK_SLOTS: u8 = 12;
/// Most layers of one disk, the lowest included.
pub const MAX_DISK_LAYERS: usize = 60;

/// Most bytes of a file system's tag.
pub const MAX_TAG: usize = 36;
/// Most sockets of a file server, each for one request at a time.
pub const MAX_SERVER_SOCKETS: usize = 16;

/// Most network slots.
pub const MAX_NETWORK_SLOTS: u8 = 4;

/// The address that the device of a network slot has from the factory, so to say: by it the guest
/// tells the slots apart, whatever address the interface is given later. Locally administered, "spor".
#[must_use]
pub const fn network_mac(slot: u8) -> [u8; 6] {
    [0x02, b's', b'p', b'o', b'r', slot]
}

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
    /// Make one layer of several of a writable disk, `first` to `last`, counted from the lowest, 0: neither that nor the
    /// uppermost may be among them. It goes to a new and empty regular file, while the guest goes on. Answered
    /// when that has begun; an [`Event::DiskMerged`] follows. The file takes their place then, also among the layers
    /// `below` when the disk is attached again.
    MergeDisk { serial: String, first: u32, last: u32, file: FdIndex },
    /// Give the file system device its server, once, before or after `Boot`: connected Unix stream
    /// sockets, 1 ..= [`MAX_SERVER_SOCKETS`]. Each carries FUSE requests one at a time, as the
    /// guest wrote them but with the true length in the header; each request is answered by one
    /// FUSE reply, also those that FUSE leaves unanswered.
    AttachFilesystem { sockets: Vec<FdIndex> },
    /// Give a free network slot its tap, before or after `Boot`: the link goes up. The frames that
    /// its interface sends are the guest's to receive.
    AttachNetwork(NetworkConfig),
    /// Close a slot's tap: the link goes down, and the slot is free for another. Frames that wait in
    /// the tap are lost.
    DetachNetwork { slot: u8 },
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
    /// Write a snapshot of a running or paused VM. Answered as soon as the VM goes on (or, if it was
    /// paused, stays paused) and before anything is written: a child process writes, and reports on its own.
    ///
    /// The writable disks are captured at the same instant, without input or output: what each holds is frozen,
    /// and it goes on in a new file ([`SnapshotConfig::disks`]). All of them, or the call fails and none: each goes on in the file that it had. The file
    /// that was a disk's uppermost is the captured one, over those below as they were; it is complete when
    /// the [`Event::DisksSettled`] says so that follows if any disk was captured.
    Snapshot(SnapshotConfig),
    /// Fork a zygote of a running or paused VM: a process that has its memory and its state as they are now, and writes nothing. It
    /// is called by its own control socket, and takes [`Call::Fork`] alone. Answered, as `Snapshot` is, when the VM goes on;
    /// the writable disks are captured as there.
    Zygote(ZygoteConfig),
    /// Of a zygote: fork a VMM that has its memory and state and is called by a control socket of its own; `Restore` without files makes
    /// it the VM that the zygote was forked off. Answered with [`Reply::Forked`].
    Fork(ForkConfig),
    /// Build the VM of a snapshot, in place of `Configure`. It is paused then: attach what else it
    /// shall have, and `Resume`. One that had a file server needs one before that.
    Restore(RestoreConfig),
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
    /// Ask the host's kernel for transparent huge pages (MADV_HUGEPAGE) where guest memory is nobody's file: forks, and so
    /// snapshots, are shorter; the host gives memory in steps of 2 MiB.
    #[serde(default)]
    pub huge_pages: bool,
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
    /// Slots that networks can be attached to, 0 ..= [`MAX_NETWORK_SLOTS`] (the default). A guest
    /// probes every slot as it boots, the empty ones too.
    #[serde(default = "all_network_slots")]
    pub network_slots: u8,
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
    /// A regular file or block device, opened as `read_only` says: a raw image or, with layers `below`, a delta
    /// (`backend::disk::format`).
    pub file: FdIndex,
    /// For a writable disk: the layers below the file, from the bottom up, open for reading. The lowest is a raw
    /// image, all others are deltas that a VMM made. Above them an empty regular file is a delta that has nothing: so
    /// copies of a captured disk begin. At most [`MAX_DISK_LAYERS`] with the file. They must stay as
    /// they are for as long as the VM lives.
    #[serde(default)]
    pub below: Vec<FdIndex>,
    /// Chooses the kind of slot; the guest sees VIRTIO_BLK_F_RO there.
    pub read_only: bool,
}

/// A snapshot to write. The VMM's child writes to the descriptors given and to nothing else; verifying, linking and
/// renaming is the peer's. A snapshot is complete when the report says so; without a report, when the report's
/// descriptor is at its end, the child has died and what is in the files is to be deleted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SnapshotConfig {
    /// For the state: an empty regular file, open for writing.
    pub state: FdIndex,
    /// For the new memory layer, likewise. It stays empty if no page has changed since the VM was restored.
    pub memory: FdIndex,
    /// A pipe or stream socket, for one [`SnapshotReport`] as JSON; closed by the child as its last act.
    pub report: FdIndex,
    /// The root folder of a mounted procfs; O_PATH is enough. The child finds its own page map by it.
    pub procfs: FdIndex,
    /// The new layer's id, by which [`RestoreConfig::layers`] names it: 1 to 64 letters, digits, `-`, `_`, `.`.
    pub layer_id: String,
    /// Milliseconds that writing may take, 1 ..= 3 600 000. The VM is not affected by this.
    pub deadline_ms: u64,
    /// What the writable disks go on in: every one that is attached is here, once.
    #[serde(default)]
    pub disks: Vec<NextLayer>,
}

/// A zygote to fork. It ends when its control socket's peer hangs up, or at its deadline; the VMMs that were forked off
/// it go on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ZygoteConfig {
    /// The zygote's end of a `SOCK_SEQPACKET` Unix socket pair.
    pub control: FdIndex,
    /// Its standard streams, open for writing: where it logs.
    pub log: FdIndex,
    /// Names the capture in [`Event::DisksSettled`], as [`SnapshotConfig::layer_id`].
    pub layer_id: String,
    /// Milliseconds that it may live, 1 ..= 3 600 000.
    pub deadline_ms: u64,
    /// As [`SnapshotConfig::disks`].
    #[serde(default)]
    pub disks: Vec<NextLayer>,
}

/// A VMM to fork off a zygote.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ForkConfig {
    /// The new VMM's end of a `SOCK_SEQPACKET` Unix socket pair.
    pub control: FdIndex,
    /// Its standard streams, open for writing: where it logs.
    pub log: FdIndex,
}

/// The file that a writable disk goes on in when it was captured.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NextLayer {
    /// As [`AttachedDisk::serial`].
    pub serial: String,
    /// A new and empty regular file, open for reading and writing. The peer lists it as the disk's uppermost, durably,
    /// *before* the call: an empty file there is a layer that has nothing, and does no harm if the VMM never switches to it. After
    /// a call that failed it is to be taken off the list again, and be deleted: something may have been written to it.
    pub file: FdIndex,
}

/// Most milliseconds of [`SnapshotConfig::deadline_ms`].
pub const MAX_SNAPSHOT_MS: u64 = 3_600_000;
/// Most children of one VMM at a time: snapshots that are being written, and zygotes.
pub const MAX_SNAPSHOT_WRITERS: usize = 4;

/// How a snapshot's writing ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SnapshotReport {
    /// All of it is on disk (fsync).
    Done(SnapshotDone),
    Failed(Failure),
}

/// What was written.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotDone {
    pub state_bytes: u64,
    /// Of the new layer.
    pub memory_bytes: u64,
    /// Mappings that a restore makes.
    pub extents: u32,
    /// All layers that the snapshot needs, the new one included if it is not empty.
    pub layers: Vec<SnapshotLayer>,
    pub write_ns: u64,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotLayer {
    pub id: String,
    pub bytes: u64,
    /// CRC-32 (IEEE) of the file.
    pub crc32: u32,
}

/// A VM to build from a snapshot, or from what a zygote had. Processors, memory and device slots are as the snapshot's.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RestoreConfig {
    /// [`PROTOCOL_VERSION`].
    pub protocol: u32,
    /// Ask for huge pages as
    /// [`VmConfig::huge_pages`] does, whatever the saved VM had.
    #[serde(default)]
    pub huge_pages: bool,
    /// An open `/dev/kvm`.
    pub kvm: FdIndex,
    /// The state file, open for reading. None: the VM is the one whose memory and state this VMM has been forked with
    /// ([`Call::Fork`]), once, and there are no layers.
    #[serde(default)]
    pub state: Option<FdIndex>,
    /// The layers that the snapshot names, each once, in any order. They must stay as they are for as
    /// long as the VM lives, and may be deleted: their pages are read when the guest touches them.
    pub layers: Vec<LayerConfig>,
    pub console: Option<ConsoleConfig>,
    /// Given exactly if the saved VM had one. The guest's context id may be another.
    pub vsock: Option<VsockConfig>,
    /// The disks that the saved VM had, of the same size, and others for slots that were free.
    #[serde(default)]
    pub disks: Vec<RestoredDisk>,
}

/// A memory layer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LayerConfig {
    pub id: String,
    /// A regular file, open for reading.
    pub file: FdIndex,
}

/// A disk for the slot that it had.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RestoredDisk {
    /// As [`AttachedDisk::serial`].
    pub serial: String,
    /// As [`DiskConfig::file`]; opened as the slot's kind says. For a captured disk usually an empty file, over the
    /// captured layers `below`.
    pub file: FdIndex,
    /// As [`DiskConfig::below`].
    #[serde(default)]
    pub below: Vec<FdIndex>,
}

fn all_network_slots() -> u8 {
    MAX_NETWORK_SLOTS
}

/// A network to attach.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetworkConfig {
    /// Below [`VmConfig::network_slots`].
    pub slot: u8,
    /// An open `/dev/net/tun`, attached to an interface by TUNSETIFF with IFF_TAP, IFF_NO_PI and
    /// IFF_VNET_HDR, with headers of 12 bytes (TUNSETVNETHDRSZ). Made non-blocking, its offloads
    /// are set to what the guest's driver takes. As long as the VMM has it the interface exists.
    pub tap: FdIndex,
    /// How much the guest may receive.
    #[serde(default)]
    pub to_guest: RateLimit,
    /// How much the guest may send.
    #[serde(default)]
    pub from_guest: RateLimit,
}

/// How much may pass in one direction; 0: any amount. Beyond it frames wait: those for the guest in the
/// tap, which drops what is too much, those of the guest in its own queue. A direction
/// that was idle may send 100 ms worth at once.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RateLimit {
    /// Of frames, from the Ethernet header on. What segmentation offload keeps together is one frame.
    pub bytes_per_s: u64,
    pub packets_per_s: u64,
}

/// What the VMM sends.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
// One at a time, on its way to a socket: its size costs nothing.
#[allow(clippy::large_enum_variant)]
pub enum Message {
    Response { id: u64, result: Result<Reply, Failure> },
    Event(Event),
}

/// A successful answer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
// One at a time, on its way to a socket: its size costs nothing.
#[allow(clippy::large_enum_variant)]
pub enum Reply {
    Done,
    /// `Configure` succeeded: the slots that the VM has, and where each disk of the
    /// configuration went, in its order.
    Configured {
        disk_slots: DiskSlots,
        #[serde(default)]
        network_slots: u8,
        disks: Vec<AttachedDisk>,
    },
    Attached(AttachedDisk),
    /// The VM goes on; the snapshot is being written, or the zygote is there.
    Snapshotted {
        times: SnapshotTimes,
        /// All writable disks, captured at the instant that memory was.
        disks: Vec<CapturedDisk>,
    },
    /// The new VMM obeys its socket. The packet carries its pidfd.
    Forked {
        /// In the VMM's process id namespace.
        pid: u32,
    },
    /// The VM of a snapshot is there, paused.
    Restored {
        disk_slots: DiskSlots,
        network_slots: u8,
        /// When it was saved, wall-clock time in nanoseconds since 1970. The guest's clocks
        /// go on from there: its wall clock is the agent's to set.
        saved_at_ns: u64,
    },
    State(VmState),
    Metrics(Metrics),
}

/// How long a snapshot held the VM up, in nanoseconds, by step. Nothing is written to any file in this time.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotTimes {
    /// The child's process id, in the VMM's process id namespace.
    pub pid: u32,
    /// From the request, with the disks' new files ready, to the VM's going on: all that follows. Of a VM that was paused
    /// before, what the request took.
    pub pause_ns: u64,
    /// Until all vCPUs were out of the guest and what the file server had been asked was answered.
    pub quiesce_ns: u64,
    /// Reading processors, interrupt controllers, clock and devices, into memory.
    pub save_ns: u64,
    /// fork(2).
    pub fork_ns: u64,
    /// Switching the writable disks.
    #[serde(default)]
    pub switch_ns: u64,
}

/// A writable disk that a snapshot has captured.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CapturedDisk {
    pub serial: String,
    /// Number of its layers, without the one that it goes on in.
    pub layers: u32,
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
    /// The snapshot is damaged, of another kind of host, or does not fit what was given with it.
    BadSnapshot,
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
    /// The disks that a `Snapshot` with this `layer_id` captured are complete and durable, or could not be made so:
    /// then this snapshot must not be used, and the guest's flushes fail. Once for each that captured any, and before
    /// [`Event::Ended`]. A guest that flushes meanwhile waits for it.
    DisksSettled { layer_id: String, result: Result<(), Failure> },
    /// What a `MergeDisk` began is done, or has failed: then the disk's layers are as they were.
    DiskMerged { serial: String, result: Result<(), Failure> },
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
    /// Of each network slot, in their order.
    #[serde(default)]
    pub networks: Vec<NetMetrics>,
    #[serde(default)]
    pub snapshots: SnapshotMetrics,
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

/// Snapshots of this VM since it was built.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotMetrics {
    /// Forked.
    pub taken: u64,
    /// Whose child ended with an error or was killed.
    pub failed: u64,
    /// Children that are writing now, and zygotes.
    pub writing: u64,
    /// Of the last one.
    pub last: SnapshotTimes,
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

/// Of one network slot, whatever taps it had.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetMetrics {
    pub slot: u8,
    /// It has a tap, and the tap's interface exists.
    pub link_up: bool,
    pub to_guest: NetCounters,
    pub from_guest: NetCounters,
    /// Doorbells that the guest rang; each is an exit.
    pub notifications: u64,
    /// Times that the tap, or a limiter's time, woke the device.
    pub wakeups: u64,
    /// Interrupts for frames.
    pub interrupts: u64,
}

/// One direction of a network slot.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetCounters {
    pub frames: u64,
    /// Of frames, from the Ethernet header on.
    pub bytes: u64,
    /// What the guest got wrong: buffers of the wrong direction or size, headers that the host's kernel refuses.
    pub malformed: u64,
    /// To the guest: larger than its buffers. From it: while the link was down, or the interface was, or the
    /// host lacked memory.
    pub dropped: u64,
    /// Times that it waited for room: of the guest's queue, of the tap.
    pub stalled: u64,
    /// Times that it waited for the limiter.
    pub throttled: u64,
}
