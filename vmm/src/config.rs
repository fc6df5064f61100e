//! Input validated: from a [`VmConfig`] and the descriptors of its packet to a
//! [`MachineConfig`], whose values are in range and whose descriptors are of the right kind
//! and mode. Nothing is built from anything else.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, IntoRawFd, OwnedFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::Duration;

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::socket::{
    AddressFamily, SockType, SockaddrLike, SockaddrStorage, getsockname, getsockopt, sockopt,
};
use nix::sys::stat::{SFlag, fstat};
use nix::sys::statfs::{PROC_SUPER_MAGIC, fstatfs};

use crate::api::{
    ConsoleConfig, DiskConfig, DiskSlots, FdIndex, ForkConfig, LayerConfig, MAX_DISK_LAYERS, MAX_DISK_SLOTS,
    MAX_MEMORY_MIB, MAX_NETWORK_SLOTS, MAX_SERVER_SOCKETS, MAX_SNAPSHOT_MS, MAX_TAG, MAX_VCPUS,
    MIN_MEMORY_MIB, NetworkConfig, NextLayer, PROTOCOL_VERSION, RateLimit, RestoreConfig, SnapshotConfig,
    VmConfig, VsockConfig, ZygoteConfig,
};
use crate::arch;
use crate::control::{FdError, FdTable};
use crate::snapshot::layers::{MAX_LAYER_ID, MAX_LAYERS, is_layer_id};
use crate::snapshot::writer::Target;

/// Context ids of guests; those below have a meaning of their own, the last one is "any".
const GUEST_CIDS: std::ops::RangeInclusive<u32> = 3..=0xffff_fffe;
/// Most host ports of one VM.
const MAX_HOST_PORTS: usize = 64;

/// A message asks for what cannot be.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error(
        "protocol: version {found}; this VMM speaks {PROTOCOL_VERSION}: install shim and VMM of one release"
    )]
    Protocol { found: u32 },
    #[error("{what}: {found}; allowed is {min} to {max}")]
    Range { what: &'static str, found: u64, min: u64, max: u64 },
    #[error("{what}: byte {byte:#04x} at {at}; printable ASCII is allowed")]
    Byte { what: &'static str, byte: u8, at: usize },
    #[error("disks: {found} {kind} ones; there are {max} slots of that kind")]
    Disks { kind: &'static str, found: usize, max: usize },
    #[error("{what}: {id:?}; needed are 1 to {MAX_LAYER_ID} letters, digits, '-', '_' or '.'")]
    LayerId { what: String, id: String },
    #[error("{what}: {name:?} is given twice")]
    Twice { what: &'static str, name: String },
    #[error("layers: they belong to a state file, and none is given")]
    LayersAlone,
    #[error("{what}: the file is not empty ({bytes} bytes); give a new one")]
    NotEmpty { what: &'static str, bytes: u64 },
    #[error("disks: {serial:?} is no slot's serial; those are ro0, ro1, … and rw0, rw1, …")]
    Serial { serial: String },
    #[error("vsock.host_ports: port {port} is listed twice")]
    HostPort { port: u32 },
    #[error("{what}: the descriptor is {found}; needed is {needed}")]
    Kind { what: String, found: String, needed: &'static str },
    #[error("{what}: the descriptor is not open for {needed}")]
    Mode { what: String, needed: &'static str },
    #[error("{what}: the descriptor is open for appending (O_APPEND), which ignores where a write belongs")]
    Append { what: String },
    #[error("{what}: the descriptor cannot be examined: {source}")]
    Examine { what: String, source: nix::Error },
    #[error(transparent)]
    Fd(#[from] FdError),
}

/// A VM that can be built.
#[derive(Debug)]
pub struct MachineConfig {
    pub vcpus: u8,
    pub memory_bytes: u64,
    pub huge_pages: bool,
    pub kvm: KvmFd,
    pub kernel: File,
    pub initrd: Option<File>,
    pub cmdline: String,
    pub console: Option<Console>,
    pub vsock: Option<Vsock>,
    pub disk_slots: DiskSlots,
    pub filesystem: Option<String>,
    pub network_slots: u8,
    pub disks: Vec<Disk>,
}

/// An open `/dev/kvm`.
#[derive(Debug)]
pub struct KvmFd(OwnedFd);

impl KvmFd {
    /// For a library that takes the number and owns it from then on.
    pub fn into_raw_fd(self) -> RawFd {
        self.0.into_raw_fd()
    }
}

#[derive(Debug)]
pub struct Console {
    pub output: File,
    pub input: Option<File>,
    pub cap_bytes: u64,
}

#[derive(Debug)]
pub struct Vsock {
    pub guest_cid: u32,
    pub listener: UnixListener,
    pub host_ports: Vec<u32>,
}

#[derive(Debug)]
pub struct Disk {
    pub file: File,
    /// From the bottom up.
    pub below: Vec<File>,
    pub read_only: bool,
}

/// A tap for a slot. That it is one is for the device to find out.
#[derive(Debug)]
pub struct Network {
    pub slot: u8,
    pub tap: OwnedFd,
    pub to_guest: RateLimit,
    pub from_guest: RateLimit,
}

impl MachineConfig {
    /// Checks `config`; takes each descriptor that it names, and wants all to be named.
    pub fn new(config: VmConfig, mut fds: FdTable) -> Result<Self, ConfigError> {
        if config.protocol != PROTOCOL_VERSION {
            return Err(ConfigError::Protocol { found: config.protocol });
        }
        in_range("vcpus", config.vcpus.into(), 1, MAX_VCPUS.into())?;
        in_range("memory_mib", config.memory_mib, MIN_MEMORY_MIB, MAX_MEMORY_MIB)?;
        in_range("cmdline length", config.cmdline.len() as u64, 0, arch::MAX_CMDLINE as u64)?;
        printable(&config.cmdline, "cmdline")?;
        let slots = config.disk_slots;
        in_range("disk_slots.read_only", slots.read_only.into(), 0, MAX_DISK_SLOTS.into())?;
        in_range("disk_slots.writable", slots.writable.into(), 0, MAX_DISK_SLOTS.into())?;
        count_disks(&config.disks, slots)?;
        in_range("network_slots", config.network_slots.into(), 0, MAX_NETWORK_SLOTS.into())?;
        if let Some(tag) = &config.filesystem {
            in_range("filesystem length", tag.len() as u64, 1, MAX_TAG as u64)?;
            printable(tag, "filesystem")?;
        }
        let machine = Self {
            vcpus: config.vcpus,
            memory_bytes: config.memory_mib << 20,
            huge_pages: config.huge_pages,
            kvm: take_kvm(&mut fds, config.kvm)?,
            kernel: take_image(&mut fds, config.kernel, "kernel")?,
            initrd: config.initrd.map(|index| take_image(&mut fds, index, "initrd")).transpose()?,
            cmdline: config.cmdline,
            console: config.console.map(|console| take_console(&mut fds, &console)).transpose()?,
            vsock: config.vsock.map(|vsock| take_vsock(&mut fds, vsock)).transpose()?,
            disk_slots: slots,
            filesystem: config.filesystem,
            network_slots: config.network_slots,
            disks: config
                .disks
                .iter()
                .enumerate()
                .map(|(at, disk)| take_disk(&mut fds, disk, &format!("disks[{at}]")))
                .collect::<Result<_, _>>()?,
        };
        fds.finish()?;
        Ok(machine)
    }
}

fn printable(text: &str, what: &'static str) -> Result<(), ConfigError> {
    let odd = |byte: &u8| !(b' '..=b'~').contains(byte);
    match text.as_bytes().iter().enumerate().find(|(_, byte)| odd(byte)) {
        Some((at, &byte)) => Err(ConfigError::Byte { what, byte, at }),
        None => Ok(()),
    }
}

/// A VM that can be restored, as far as that can be said without its state.
#[derive(Debug)]
pub struct RestoredMachine {
    pub huge_pages: bool,
    pub kvm: KvmFd,
    /// None: what this process was forked with.
    pub files: Option<SnapshotFiles>,
    pub console: Option<Console>,
    pub vsock: Option<Vsock>,
    /// By serial.
    pub disks: Vec<(String, Disk)>,
}

/// The files of a snapshot.
#[derive(Debug)]
pub struct SnapshotFiles {
    pub state: File,
    /// By id.
    pub layers: Vec<(String, File)>,
}

impl RestoredMachine {
    /// Checks `config`, as [`MachineConfig::new`] does.
    pub fn new(config: RestoreConfig, mut fds: FdTable) -> Result<Self, ConfigError> {
        if config.protocol != PROTOCOL_VERSION {
            return Err(ConfigError::Protocol { found: config.protocol });
        }
        in_range("layers count", config.layers.len() as u64, 0, MAX_LAYERS as u64)?;
        let most = u64::from(MAX_DISK_SLOTS) * 2;
        in_range("disks count", config.disks.len() as u64, 0, most)?;
        no_twice("layers", config.layers.iter().map(|layer| &layer.id))?;
        no_twice("disks", config.disks.iter().map(|disk| &disk.serial))?;
        let kvm = take_kvm(&mut fds, config.kvm)?;
        let state = config.state.map(|state| take_image(&mut fds, state, "state")).transpose()?;
        let layers = config.layers.into_iter().map(|layer| take_layer(&mut fds, layer));
        let layers: Vec<_> = layers.collect::<Result<_, _>>()?;
        if state.is_none() && !layers.is_empty() {
            return Err(ConfigError::LayersAlone);
        }
        let machine = Self {
            huge_pages: config.huge_pages,
            kvm,
            files: state.map(|state| SnapshotFiles { state, layers }),
            console: config.console.map(|console| take_console(&mut fds, &console)).transpose()?,
            vsock: config.vsock.map(|vsock| take_vsock(&mut fds, vsock)).transpose()?,
            disks: config
                .disks
                .into_iter()
                .map(|disk| {
                    let read_only = disk.serial.starts_with("ro");
                    if !read_only && !disk.serial.starts_with("rw") {
                        return Err(ConfigError::Serial { serial: disk.serial });
                    }
                    let config = DiskConfig { file: disk.file, below: disk.below, read_only };
                    let taken = take_disk(&mut fds, &config, &format!("disk {}", disk.serial))?;
                    Ok((disk.serial, taken))
                })
                .collect::<Result<_, _>>()?,
        };
        fds.finish()?;
        Ok(machine)
    }
}

fn no_twice<'a>(what: &'static str, names: impl Iterator<Item = &'a String>) -> Result<(), ConfigError> {
    let mut seen = std::collections::BTreeSet::new();
    for name in names {
        if !seen.insert(name) {
            return Err(ConfigError::Twice { what, name: name.clone() });
        }
    }
    Ok(())
}

fn take_layer(fds: &mut FdTable, layer: LayerConfig) -> Result<(String, File), ConfigError> {
    let LayerConfig { id, file } = layer;
    if !is_layer_id(&id) {
        return Err(ConfigError::LayerId { what: "layers".into(), id });
    }
    let file = take_image(fds, file, &format!("layer {id}"))?;
    Ok((id, file))
}

/// The files that disks go on in, by serial.
pub type NextFiles = Vec<(String, File)>;

/// Checks the files of a `Snapshot`: where it goes, and what the disks of these serials go on in.
pub fn snapshot_target(config: SnapshotConfig, mut fds: FdTable) -> Result<(Target, NextFiles), ConfigError> {
    let patience = patience(config.deadline_ms)?;
    check_layer_id(&config.layer_id)?;
    let report = fds.take(config.report, "report")?;
    let kinds = [SFlag::S_IFIFO, SFlag::S_IFSOCK];
    check_kind(report.as_fd(), "report", &kinds, "a pipe or a stream socket")?;
    check_mode(report.as_fd(), "report", false, true)?;
    let procfs = fds.take(config.procfs, "procfs")?;
    check_procfs(procfs.as_fd())?;
    let target = Target {
        state: take_empty(&mut fds, config.state, "state")?,
        memory: take_empty(&mut fds, config.memory, "memory")?,
        report: File::from(report),
        procfs,
        layer_id: config.layer_id,
        patience,
    };
    Ok((target, next_layers(config.disks, fds)?))
}

fn patience(milliseconds: u64) -> Result<Duration, ConfigError> {
    in_range("deadline_ms", milliseconds, 1, MAX_SNAPSHOT_MS)?;
    Ok(Duration::from_millis(milliseconds))
}

fn check_layer_id(id: &str) -> Result<(), ConfigError> {
    if is_layer_id(id) {
        return Ok(());
    }
    Err(ConfigError::LayerId { what: "layer_id".into(), id: id.to_owned() })
}

/// What the disks of these serials go on in. The last that is taken of a call's descriptors.
fn next_layers(disks: Vec<NextLayer>, mut fds: FdTable) -> Result<NextFiles, ConfigError> {
    no_twice("disks", disks.iter().map(|disk| &disk.serial))?;
    let next = |disk: NextLayer| {
        let file = take_next(&mut fds, disk.file, &format!("the next layer of {}", disk.serial))?;
        Ok((disk.serial, file))
    };
    let disks = disks.into_iter().map(next).collect::<Result<_, ConfigError>>()?;
    fds.finish()?;
    Ok(disks)
}

/// Where a forked process obeys, and where it logs.
#[derive(Debug)]
pub struct Ends {
    pub control: OwnedFd,
    pub log: OwnedFd,
}

impl Ends {
    fn take(fds: &mut FdTable, control: FdIndex, log: FdIndex) -> Result<Self, ConfigError> {
        let control = fds.take(control, "control")?;
        let needed = "a Unix socket of packets (SOCK_SEQPACKET)";
        let (kind, _) = unix_socket(control.as_fd(), "control", needed)?;
        if kind != SockType::SeqPacket {
            let found = format!("a Unix socket of type {kind:?}");
            return Err(ConfigError::Kind { what: "control".into(), found, needed });
        }
        let log = fds.take(log, "log")?;
        check_mode(log.as_fd(), "log", false, true)?;
        Ok(Self { control, log })
    }
}

/// Checks the descriptors of a `Zygote`: its ends, how long it may live, and what the disks of these serials go on in.
pub fn zygote_target(
    config: ZygoteConfig,
    mut fds: FdTable,
) -> Result<(Ends, Duration, NextFiles), ConfigError> {
    let patience = patience(config.deadline_ms)?;
    check_layer_id(&config.layer_id)?;
    let ends = Ends::take(&mut fds, config.control, config.log)?;
    Ok((ends, patience, next_layers(config.disks, fds)?))
}

/// Checks the descriptors of a `Fork`.
pub fn fork_target(config: &ForkConfig, mut fds: FdTable) -> Result<Ends, ConfigError> {
    let ends = Ends::take(&mut fds, config.control, config.log)?;
    fds.finish()?;
    Ok(ends)
}

/// A new file to write to.
fn take_empty(fds: &mut FdTable, index: FdIndex, what: &'static str) -> Result<File, ConfigError> {
    let fd = fds.take(index, what)?;
    check_kind(fd.as_fd(), what, &[SFlag::S_IFREG], "a regular file")?;
    check_mode(fd.as_fd(), what, false, true)?;
    check_positioned(fd.as_fd(), what)?;
    let status =
        fstat(fd.as_fd()).map_err(|source| ConfigError::Examine { what: what.to_owned(), source })?;
    match u64::try_from(status.st_size) {
        Ok(0) => Ok(File::from(fd)),
        found => Err(ConfigError::NotEmpty { what, bytes: found.unwrap_or(u64::MAX) }),
    }
}

fn check_procfs(fd: BorrowedFd<'_>) -> Result<(), ConfigError> {
    let what = "procfs";
    let needed = "the root folder of a procfs";
    check_kind(fd, what, &[SFlag::S_IFDIR], needed)?;
    let found = fstatfs(fd).map_err(|source| ConfigError::Examine { what: what.to_owned(), source })?;
    if found.filesystem_type() == PROC_SUPER_MAGIC {
        return Ok(());
    }
    let found = format!("a folder of another file system ({:?})", found.filesystem_type());
    Err(ConfigError::Kind { what: what.to_owned(), found, needed })
}

/// Checks the sockets of an `AttachFilesystem`.
pub fn server_sockets(sockets: &[FdIndex], mut fds: FdTable) -> Result<Vec<UnixStream>, ConfigError> {
    in_range("sockets count", sockets.len() as u64, 1, MAX_SERVER_SOCKETS as u64)?;
    let take = |(at, index): (usize, &FdIndex)| {
        let what = format!("sockets[{at}]");
        let fd = fds.take(*index, &what)?;
        let (kind, listening) = unix_socket(fd.as_fd(), &what, "a connected Unix stream socket")?;
        if kind != SockType::Stream || listening {
            let found = format!("a Unix socket of type {kind:?}, listening: {listening}");
            return Err(ConfigError::Kind { what, found, needed: "a connected Unix stream socket" });
        }
        Ok(UnixStream::from(fd))
    };
    let taken = sockets.iter().enumerate().map(take).collect::<Result<_, _>>()?;
    fds.finish()?;
    Ok(taken)
}

/// The type of a Unix socket, and whether it listens.
fn unix_socket(
    fd: BorrowedFd<'_>,
    what: &str,
    needed: &'static str,
) -> Result<(SockType, bool), ConfigError> {
    check_kind(fd, what, &[SFlag::S_IFSOCK], needed)?;
    let examine = |source| ConfigError::Examine { what: what.to_owned(), source };
    let family = getsockname::<SockaddrStorage>(fd.as_raw_fd()).map_err(examine)?.family();
    if family != Some(AddressFamily::Unix) {
        let found = format!("a {family:?} socket");
        return Err(ConfigError::Kind { what: what.to_owned(), found, needed });
    }
    let kind = getsockopt(&fd, sockopt::SockType).map_err(examine)?;
    Ok((kind, getsockopt(&fd, sockopt::AcceptConn).map_err(examine)?))
}

/// Checks the disk of an `AttachDisk`.
pub fn attached_disk(config: &DiskConfig, mut fds: FdTable) -> Result<Disk, ConfigError> {
    let disk = take_disk(&mut fds, config, "disk")?;
    fds.finish()?;
    Ok(disk)
}

/// Checks the file of a `MergeDisk`.
pub fn merged_file(index: FdIndex, mut fds: FdTable) -> Result<File, ConfigError> {
    let file = take_next(&mut fds, index, "file")?;
    fds.finish()?;
    Ok(file)
}

/// A file that is to become a layer of a disk. That it is empty is for the disk to find out.
fn take_next(fds: &mut FdTable, index: FdIndex, what: &str) -> Result<File, ConfigError> {
    let fd = fds.take(index, what)?;
    check_kind(fd.as_fd(), what, &[SFlag::S_IFREG], "a regular file")?;
    check_mode(fd.as_fd(), what, true, true)?;
    check_positioned(fd.as_fd(), what)?;
    Ok(File::from(fd))
}

/// Checks the tap of an `AttachNetwork`.
pub fn attached_network(config: &NetworkConfig, mut fds: FdTable) -> Result<Network, ConfigError> {
    let NetworkConfig { slot, tap, to_guest, from_guest } = *config;
    let fd = fds.take(tap, "tap")?;
    check_kind(fd.as_fd(), "tap", &[SFlag::S_IFCHR], "an open /dev/net/tun")?;
    check_mode(fd.as_fd(), "tap", true, true)?;
    fds.finish()?;
    Ok(Network { slot, tap: fd, to_guest, from_guest })
}

fn in_range(what: &'static str, found: u64, min: u64, max: u64) -> Result<(), ConfigError> {
    if (min..=max).contains(&found) { Ok(()) } else { Err(ConfigError::Range { what, found, min, max }) }
}

fn count_disks(disks: &[DiskConfig], slots: DiskSlots) -> Result<(), ConfigError> {
    for (kind, read_only, max) in [("read-only", true, slots.read_only), ("writable", false, slots.writable)]
    {
        let max = max.into();
        let found = disks.iter().filter(|disk| disk.read_only == read_only).count();
        if found > max {
            return Err(ConfigError::Disks { kind, found, max });
        }
    }
    Ok(())
}

fn take_kvm(fds: &mut FdTable, index: FdIndex) -> Result<KvmFd, ConfigError> {
    let fd = fds.take(index, "kvm")?;
    check_kind(fd.as_fd(), "kvm", &[SFlag::S_IFCHR], "/dev/kvm")?;
    check_mode(fd.as_fd(), "kvm", true, true)?;
    Ok(KvmFd(fd))
}

fn take_image(fds: &mut FdTable, index: FdIndex, what: &str) -> Result<File, ConfigError> {
    let fd = fds.take(index, what)?;
    check_kind(fd.as_fd(), what, &[SFlag::S_IFREG], "a regular file")?;
    check_mode(fd.as_fd(), what, true, false)?;
    Ok(File::from(fd))
}

fn take_disk(fds: &mut FdTable, disk: &DiskConfig, what: &str) -> Result<Disk, ConfigError> {
    let fd = fds.take(disk.file, what)?;
    check_kind(fd.as_fd(), what, &[SFlag::S_IFREG, SFlag::S_IFBLK], "a regular file or a block device")?;
    check_mode(fd.as_fd(), what, true, !disk.read_only)?;
    if !disk.read_only {
        check_positioned(fd.as_fd(), what)?;
    }
    let most = if disk.read_only { 1 } else { MAX_DISK_LAYERS };
    in_range("layers of a disk", disk.below.len() as u64 + 1, 1, most as u64)?;
    let take = |(at, index): (usize, &FdIndex)| {
        let what = format!("{what}.below[{at}]");
        let fd = fds.take(*index, &what)?;
        check_kind(fd.as_fd(), &what, &[SFlag::S_IFREG, SFlag::S_IFBLK], "a regular file or a block device")?;
        check_mode(fd.as_fd(), &what, true, false)?;
        Ok(File::from(fd))
    };
    let below = disk.below.iter().enumerate().map(take).collect::<Result<_, ConfigError>>()?;
    Ok(Disk { file: File::from(fd), below, read_only: disk.read_only })
}

fn take_console(fds: &mut FdTable, console: &ConsoleConfig) -> Result<Console, ConfigError> {
    let output = fds.take(console.output, "console.output")?;
    check_mode(output.as_fd(), "console.output", false, true)?;
    let input = console.input.map(|index| fds.take(index, "console.input")).transpose()?;
    if let Some(input) = &input {
        check_mode(input.as_fd(), "console.input", true, false)?;
    }
    Ok(Console { output: File::from(output), input: input.map(File::from), cap_bytes: console.cap_bytes })
}

fn take_vsock(fds: &mut FdTable, vsock: VsockConfig) -> Result<Vsock, ConfigError> {
    let (min, max) = (u64::from(*GUEST_CIDS.start()), u64::from(*GUEST_CIDS.end()));
    in_range("vsock.guest_cid", vsock.guest_cid.into(), min, max)?;
    in_range("vsock.host_ports count", vsock.host_ports.len() as u64, 0, MAX_HOST_PORTS as u64)?;
    let twice = |(at, port): (usize, &u32)| vsock.host_ports.iter().skip(at + 1).any(|other| other == port);
    if let Some(at) = vsock.host_ports.iter().enumerate().position(twice) {
        return Err(ConfigError::HostPort { port: vsock.host_ports[at] });
    }
    let what = "vsock.listener";
    let fd = fds.take(vsock.listener, what)?;
    let needed = "a listening Unix stream socket";
    let (kind, listening) = unix_socket(fd.as_fd(), what, needed)?;
    if kind != SockType::Stream || !listening {
        let found = format!("a Unix socket of type {kind:?}, listening: {listening}");
        return Err(ConfigError::Kind { what: what.to_owned(), found, needed });
    }
    let VsockConfig { guest_cid, host_ports, .. } = vsock;
    Ok(Vsock { guest_cid, listener: UnixListener::from(fd), host_ports })
}

fn check_kind(
    fd: BorrowedFd<'_>,
    what: &str,
    allowed: &[SFlag],
    needed: &'static str,
) -> Result<(), ConfigError> {
    let status = fstat(fd).map_err(|source| ConfigError::Examine { what: what.to_owned(), source })?;
    let kind = SFlag::from_bits_truncate(status.st_mode) & SFlag::S_IFMT;
    if allowed.contains(&kind) {
        return Ok(());
    }
    let found = match kind {
        SFlag::S_IFREG => "a regular file",
        SFlag::S_IFDIR => "a directory",
        SFlag::S_IFCHR => "a character device",
        SFlag::S_IFBLK => "a block device",
        SFlag::S_IFIFO => "a pipe",
        SFlag::S_IFSOCK => "a socket",
        _ => "of an unknown kind",
    };
    Err(ConfigError::Kind { what: what.to_owned(), found: found.to_owned(), needed })
}

fn check_mode(fd: BorrowedFd<'_>, what: &str, read: bool, write: bool) -> Result<(), ConfigError> {
    let examine = |source| ConfigError::Examine { what: what.to_owned(), source };
    let flags = OFlag::from_bits_truncate(fcntl(fd, FcntlArg::F_GETFL).map_err(examine)?);
    let mode = flags & OFlag::O_ACCMODE;
    let (can_read, can_write) = (mode != OFlag::O_WRONLY, mode != OFlag::O_RDONLY);
    // A descriptor that only names a file (O_PATH) can do neither.
    let usable = !flags.contains(OFlag::O_PATH);
    if usable && (can_read || !read) && (can_write || !write) {
        return Ok(());
    }
    let needed = match (read, write) {
        (true, true) => "reading and writing",
        (false, true) => "writing",
        _ => "reading",
    };
    Err(ConfigError::Mode { what: what.to_owned(), needed })
}

/// pwrite(2) on a descriptor opened with O_APPEND writes at the file's end, whatever the offset.
fn check_positioned(fd: BorrowedFd<'_>, what: &str) -> Result<(), ConfigError> {
    let examine = |source| ConfigError::Examine { what: what.to_owned(), source };
    let flags = OFlag::from_bits_truncate(fcntl(fd, FcntlArg::F_GETFL).map_err(examine)?);
    if flags.contains(OFlag::O_APPEND) {
        return Err(ConfigError::Append { what: what.to_owned() });
    }
    Ok(())
}

#[cfg(test)]
mod tests;
