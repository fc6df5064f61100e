//! Builds a VM from a validated configuration, or from a snapshot: memory and images first, because they fail
//! most often and cost the least to undo, then KVM, processors, devices, firmware tables. The one
//! module that names concrete devices. `handles` is what the VM sees of them.

mod handles;

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};

use event_manager::MutEventSubscriber;
use kvm_ioctls::{IoEventAddress, Kvm, VcpuFd, VmFd};
use vm_memory::Address;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use self::handles::{DeviceGauges, Part};
use super::{DiskSlot, FilesystemSlot, NetworkSlot, StateError, Vm, VmParts, kvm, slots};
use crate::api::{AttachedDisk, DiskSlots};
use crate::arch::{
    self, CpuModel, HostError, ImageError, MmioDescription, Platform, RestoreStateError, SaveList,
    SetupError, layout,
};
use crate::bus::{BusError, MmioBus, PioBus};
use crate::config::{Console, Disk, MachineConfig, RestoredMachine, SnapshotFiles, Vsock as VsockParts};
use crate::devices::power::{KeyboardReset, PowerControl};
use crate::devices::serial::{CappedOutput, ConsoleCounters, SerialInput, SerialPort};
use crate::devices::virtio::VirtioDevice;
use crate::devices::virtio::balloon::Balloon;
use crate::devices::virtio::blk::Blk;
use crate::devices::virtio::fs::Fs;
use crate::devices::virtio::net::Net;
use crate::devices::virtio::rng::Rng;
use crate::devices::virtio::subscriber::DeviceSubscriber;
use crate::devices::virtio::transport::{MmioTransport, TransportError};
use crate::devices::virtio::vsock::{Vsock, VsockError};
use crate::devices::vmgenid::{self, GenerationError, GenerationId};
use crate::end::EndLatch;
use crate::memory::{self, Discard, FileExtent, Gpa, GuestRam, MapError};
use crate::snapshot::layers::{Extent, MemoryMap};
use crate::snapshot::machine::{StateFileError, match_layers};
use crate::snapshot::writer::Origin;
use crate::snapshot::{MachineState, PartState, Persist, RestoreError, Shape};
use crate::vcpu::{ExitCounters, Shared, VcpuError, VcpuHandle};

/// Offset of a virtio-mmio slot's queue-notify register (virtio 1.2, 4.2.2).
const QUEUE_NOTIFY: u64 = 0x50;
/// The serial port's name among the parts.
const SERIAL: &str = "serial";

/// Why a VM could not be built. Nothing of it is left.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    #[error(transparent)]
    Host(#[from] HostError),
    #[error("KVM: {operation}: {source}")]
    Kvm { operation: &'static str, source: kvm_ioctls::Error },
    #[error(transparent)]
    Setup(#[from] SetupError),
    #[error(transparent)]
    Memory(#[from] MapError),
    #[error(transparent)]
    Image(#[from] ImageError),
    #[error(transparent)]
    Bus(#[from] BusError),
    #[error(transparent)]
    Vcpu(#[from] VcpuError),
    #[error(transparent)]
    Transport(#[from] TransportError),
    #[error(transparent)]
    Vsock(#[from] VsockError),
    #[error("{what}: an event descriptor: {source}; raise the limit of open files")]
    EventFd { what: &'static str, source: io::Error },
    #[error(transparent)]
    Disk(#[from] StateError),
    #[error(transparent)]
    StateFile(#[from] StateFileError),
    #[error(transparent)]
    Restore(#[from] RestoreError),
    #[error(transparent)]
    RestoreState(#[from] RestoreStateError),
    #[error(transparent)]
    Generation(#[from] GenerationError),
}

/// Takes connections of the guest to host ports.
pub type OnConnection = Box<dyn FnMut(u32, UnixStream) + Send>;
/// What the event loop runs for a device.
pub type Subscriber = Box<dyn MutEventSubscriber>;

/// A VM that is ready to boot.
pub struct Built {
    pub vm: Vm,
    /// Where the configuration's disks went.
    pub disks: Vec<AttachedDisk>,
    /// To be added to the event loop before it boots.
    pub subscribers: Vec<Subscriber>,
}

/// Guest memory that stands still, and what is known of where it comes from.
#[derive(Debug)]
pub struct SavedMemory {
    pub ram: GuestRam,
    pub origin: Origin,
    pub discard: Discard,
}

/// A paused VM in a process that was forked off its own.
#[derive(Debug)]
pub struct Inherited {
    pub state: MachineState,
    pub memory: SavedMemory,
}

/// A VM out of a snapshot.
pub struct RestoredVm {
    /// Paused.
    pub vm: Vm,
    pub shape: Shape,
    /// When it was saved, wall-clock nanoseconds since 1970.
    pub saved_at_ns: u64,
    pub subscribers: Vec<Subscriber>,
}

/// Builds the VM; `end` is set when it has ended.
pub fn build(
    config: MachineConfig,
    end: Arc<EndLatch>,
    on_connection: OnConnection,
) -> Result<Built, BuildError> {
    let MachineConfig {
        vcpus,
        memory_bytes,
        huge_pages,
        kvm,
        mut kernel,
        mut initrd,
        cmdline,
        console,
        vsock,
        disk_slots,
        filesystem,
        network_slots,
        disks,
    } = config;
    let kvm = kvm::open(kvm);
    arch::check_host(&kvm, vcpus)?;
    let shape = Shape { vcpus, memory_bytes, disk_slots, filesystem, network_slots, vsock: vsock.is_some() };
    let ram = memory::map(&shape.layout())?;
    if huge_pages {
        memory::prefer_huge_pages(&ram);
    }
    let entry = arch::load_image(&ram, &mut kernel, initrd.as_mut(), &cmdline)?;
    drop((kernel, initrd));
    let frame = Frame::new(&kvm, &ram)?;

    let discard = Discard::new(&ram);
    let fittings = Fittings { console, vsock, on_connection, disks: Vec::new(), saved: None };
    let devices = Devices::place(&frame.fd, &ram, &shape, discard, fittings, &end)?;
    arch::write_firmware_tables(&ram, &Platform { vcpus, slots: &devices.described })?;
    let model = CpuModel::new(&kvm, vcpus)?;
    let mut processors = Vec::new();
    for index in 0..vcpus {
        let vcpu = frame.processor(index)?;
        model.apply(&vcpu, index, (index == 0).then_some(&entry), &ram)?;
        processors.push((vcpu, frame.list.of(model.leaves(index))));
    }
    let (mut vm, subscribers) =
        assemble(frame, ram, shape, Origin::default(), processors, devices, end, Vm::new)?;
    let disks = disks.into_iter().map(|disk| vm.attach(disk)).collect::<Result<_, _>>()?;
    Ok(Built { vm, disks, subscribers })
}

/// Builds the VM of a snapshot, or the one that was inherited. It is checked before anything is built of it. Processors get their state before
/// the interrupt controllers, and those before the devices, which raise again what was pending.
pub fn restore(
    config: RestoredMachine,
    inherited: Option<Inherited>,
    end: Arc<EndLatch>,
    on_connection: OnConnection,
) -> Result<RestoredVm, BuildError> {
    let RestoredMachine { huge_pages, kvm, files, console, vsock, disks } = config;
    let (state, memory) = match (files, inherited) {
        (Some(SnapshotFiles { state, layers }), None) => (MachineState::read(&state)?, Memory::In(layers)),
        (None, Some(Inherited { state, memory })) => (state, Memory::Here(memory)),
        (files, _) => {
            let detail = match files {
                None => "no state file is given, and this VMM has no VM's memory from a fork",
                Some(_) => "a state file is given, and this VMM has a VM's memory already, from a fork",
            };
            return Err(RestoreError::invalid("memory", detail).into());
        }
    };
    let MachineState { saved_at_ns, shape, platform, vcpus, mut parts, memory: table, .. } = state;
    let kvm = kvm::open(kvm);
    arch::check_host(&kvm, shape.vcpus)?;
    let model = CpuModel::new(&kvm, shape.vcpus)?;
    for (index, saved) in (0..).zip(&vcpus) {
        model.check(index, saved)?;
    }
    match (shape.vsock, vsock.is_some()) {
        (true, false) => {
            return Err(
                RestoreError::invalid("vsock", "the saved VM had one, and no listener is given").into()
            );
        }
        (false, true) => {
            return Err(
                RestoreError::invalid("vsock", "the saved VM had none, and a listener is given").into()
            );
        }
        _ => {}
    }
    let SavedMemory { ram, origin, discard } = match memory {
        Memory::Here(memory) => memory,
        Memory::In(layers) => map_layers(&shape, table, layers)?,
    };
    if huge_pages {
        memory::prefer_huge_pages(&ram);
    }
    let frame = Frame::new(&kvm, &ram)?;

    let mut processors = Vec::new();
    for (index, saved) in (0..).zip(&vcpus) {
        processors.push((frame.processor(index)?, frame.list.of(saved.leaves.clone())));
    }
    for ((index, (vcpu, list)), saved) in (0..).zip(&processors).zip(&vcpus) {
        arch::restore_vcpu(vcpu, index, saved, list)?;
    }
    arch::restore_platform(&frame.fd, &platform)?;
    let fittings = Fittings { console, vsock, on_connection, disks, saved: Some(&mut parts) };
    let devices = Devices::place(&frame.fd, &ram, &shape, discard, fittings, &end)?;
    if let Some(part) = parts.into_keys().next() {
        return Err(RestoreError::Surplus { part }.into());
    }
    let (vm, subscribers) =
        assemble(frame, ram, shape.clone(), origin, processors, devices, end, Vm::restored)?;
    Ok(RestoredVm { vm, shape, saved_at_ns, subscribers })
}

/// Where a VM's memory is before the VM is.
enum Memory {
    Here(SavedMemory),
    /// Files by id.
    In(Vec<(String, File)>),
}

/// Guest memory out of the files of a snapshot.
fn map_layers(
    shape: &Shape,
    table: MemoryMap,
    layers: Vec<(String, File)>,
) -> Result<SavedMemory, BuildError> {
    let files = match_layers(&table, layers)?;
    let place = |extent: &Extent| {
        // The table was checked against its layers, of which there are as many files.
        let file = usize::try_from(extent.layer).ok().and_then(|at| files.get(at))?;
        Some(FileExtent { start: extent.start, bytes: extent.bytes, file, offset: extent.offset })
    };
    let mapped: Vec<FileExtent<'_>> = table.extents.iter().filter_map(place).collect();
    let ram = memory::map_files(&shape.layout(), &mapped)?;
    let ranges: Vec<Range<u64>> = table.extents.iter().map(|extent| extent.start..extent.end()).collect();
    let discard = Discard::with_files(&ram, &ranges);
    Ok(SavedMemory { ram, origin: Origin { layers: table.layers, extents: table.extents }, discard })
}

/// KVM's half of a VM, without processors.
struct Frame {
    fd: VmFd,
    list: SaveList,
    run_size: usize,
}

impl Frame {
    fn new(kvm: &Kvm, ram: &GuestRam) -> Result<Self, BuildError> {
        let fd = kvm.create_vm().map_err(kvm_error("creating a VM"))?;
        kvm::register_ram(&fd, ram).map_err(kvm_error("registering guest memory"))?;
        arch::prepare_vm(&fd)?;
        let list = SaveList::new(kvm, &fd)?;
        let run_size = kvm.get_vcpu_mmap_size().map_err(kvm_error("asking for the size of a run page"))?;
        Ok(Self { fd, list, run_size })
    }

    fn processor(&self, index: u8) -> Result<VcpuFd, BuildError> {
        let mut vcpu = self.fd.create_vcpu(index.into()).map_err(kvm_error("creating a vCPU"))?;
        kvm::keep_out_of_forks(&mut vcpu, self.run_size);
        Ok(vcpu)
    }
}

/// Puts the parts together; `make` says which state the VM begins in.
#[allow(clippy::too_many_arguments)] // each once, by name, from two callers
fn assemble(
    frame: Frame,
    ram: GuestRam,
    shape: Shape,
    origin: Origin,
    processors: Vec<(VcpuFd, SaveList)>,
    devices: Devices,
    end: Arc<EndLatch>,
    make: impl FnOnce(VmParts) -> Vm,
) -> Result<(Vm, Vec<Subscriber>), BuildError> {
    let counters = Arc::new(ExitCounters::default());
    let shared = Shared {
        pio: Arc::new(devices.pio),
        mmio: Arc::new(devices.mmio),
        end: Arc::clone(&end),
        counters: Arc::clone(&counters),
        list: Arc::default(),
    };
    let mut vm = make(VmParts {
        fd: frame.fd,
        ram,
        vcpus: Vec::new(),
        counters,
        end,
        disks: devices.disks,
        filesystem: devices.filesystem,
        networks: devices.networks,
        gauges: Box::new(devices.gauges),
        power_button: devices.power_button,
        shape,
        parts: devices.parts,
        origin,
        discard: devices.discard,
    });
    // Into the VM one by one: what has been started is stopped if a later one cannot be.
    for (index, (vcpu, list)) in (0..).zip(processors) {
        let shared = Shared { list: Arc::new(list), ..shared.clone() };
        vm.add_vcpu(VcpuHandle::spawn(vcpu, index, shared)?);
    }
    Ok((vm, devices.subscribers))
}

/// What the host gives to the devices.
struct Fittings<'a> {
    console: Option<Console>,
    vsock: Option<VsockParts>,
    on_connection: OnConnection,
    /// For slots by serial.
    disks: Vec<(String, Disk)>,
    /// What the parts were, by name; each takes its own out.
    saved: Option<&'a mut BTreeMap<String, PartState>>,
}

/// All devices of a VM, on their buses.
struct Devices {
    mmio: MmioBus,
    pio: PioBus,
    described: Vec<MmioDescription>,
    subscribers: Vec<Subscriber>,
    parts: BTreeMap<String, Box<dyn Persist>>,
    disks: Vec<Box<dyn DiskSlot>>,
    filesystem: Option<Box<dyn FilesystemSlot>>,
    networks: Vec<Box<dyn NetworkSlot>>,
    gauges: DeviceGauges,
    power_button: EventFd,
    discard: Arc<Mutex<Discard>>,
}

impl Devices {
    fn place(
        fd: &VmFd,
        ram: &GuestRam,
        shape: &Shape,
        discard: Discard,
        fittings: Fittings<'_>,
        end: &Arc<EndLatch>,
    ) -> Result<Self, BuildError> {
        let Fittings { console, vsock, on_connection, disks, saved } = fittings;
        let mut board = Board {
            fd,
            ram,
            mmio: MmioBus::default(),
            described: Vec::new(),
            subscribers: Vec::new(),
            lines: Lines::default(),
            saved,
            parts: BTreeMap::new(),
        };
        let mut pio = PioBus::default();
        let console = place_serial(&mut board, &mut pio, console)?;
        let power_button = board.interrupt("the power button", layout::POWER_BUTTON_GSI)?;
        place_power(&mut pio, end)?;
        place_generation_id(&mut board)?;
        board.place(slots::RNG, Box::new(Rng::new()))?;
        let mut vsock_handle = None;
        if let Some(vsock) = vsock {
            let device = Vsock::new(vsock.guest_cid, vsock.listener, vsock.host_ports, on_connection)?;
            vsock_handle = Some(device.handle());
            board.place(slots::VSOCK, Box::new(device))?;
        }
        let disks = place_disks(&mut board, shape.disk_slots, disks)?;
        let filesystem = place_filesystem(&mut board, shape.filesystem.clone())?;
        let discard = Arc::new(Mutex::new(discard));
        let balloon = Balloon::with_discard(Arc::clone(&discard));
        let balloon_handle = balloon.handle();
        board.place(slots::BALLOON, Box::new(balloon))?;
        let networks = place_networks(&mut board, shape.network_slots)?;
        let Board { mmio, described, subscribers, parts, .. } = board;
        let gauges = DeviceGauges { console, vsock: vsock_handle, balloon: balloon_handle };
        Ok(Self {
            mmio,
            pio,
            described,
            subscribers,
            parts,
            disks,
            filesystem,
            networks,
            gauges,
            power_button,
            discard,
        })
    }
}

fn kvm_error(operation: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> BuildError {
    move |source| BuildError::Kvm { operation, source }
}

fn eventfd(what: &'static str) -> Result<EventFd, BuildError> {
    EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK).map_err(|source| BuildError::EventFd { what, source })
}

/// The virtio slots while they are filled.
struct Board<'a> {
    fd: &'a VmFd,
    ram: &'a GuestRam,
    mmio: MmioBus,
    described: Vec<MmioDescription>,
    subscribers: Vec<Subscriber>,
    lines: Lines,
    saved: Option<&'a mut BTreeMap<String, PartState>>,
    parts: BTreeMap<String, Box<dyn Persist>>,
}

/// The interrupt lines that have an event descriptor. One each: KVM makes an edge of every
/// signalled descriptor, and of two on one line the second edge may fall into the first and be
/// lost. One descriptor counts, so nothing is.
#[derive(Default)]
struct Lines(BTreeMap<u32, EventFd>);

impl Lines {
    /// An event descriptor that raises `gsi`; `register` is called with the first one.
    fn get(
        &mut self,
        what: &'static str,
        gsi: u32,
        register: impl FnOnce(&EventFd) -> Result<(), BuildError>,
    ) -> Result<EventFd, BuildError> {
        let line = match self.0.entry(gsi) {
            Entry::Occupied(line) => line.into_mut(),
            Entry::Vacant(place) => {
                let line = eventfd(what)?;
                register(&line)?;
                place.insert(line)
            }
        };
        line.try_clone().map_err(|source| BuildError::EventFd { what, source })
    }
}

impl Board<'_> {
    /// An event descriptor that raises an interrupt line.
    fn interrupt(&mut self, what: &'static str, gsi: u32) -> Result<EventFd, BuildError> {
        let fd = self.fd;
        self.lines.get(what, gsi, |line| {
            fd.register_irqfd(line, gsi).map_err(kvm_error("registering an interrupt"))
        })
    }

    /// What a part was, in a restored VM.
    fn saved(&mut self, name: &str) -> Result<Option<PartState>, BuildError> {
        let Some(saved) = &mut self.saved else { return Ok(None) };
        let missing = || RestoreError::Missing { part: name.to_owned() };
        Ok(Some(saved.remove(name).ok_or_else(missing)?))
    }

    /// Puts a device into a slot: registers on the bus, doorbells and interrupt by event
    /// descriptors, work on the event loop, saved state if there is any.
    fn place(&mut self, slot: usize, device: Box<dyn VirtioDevice>) -> Result<(), BuildError> {
        let (base, gsi) = (slots::address(slot), slots::gsi(slot));
        let line = self.interrupt("a virtio device", gsi)?;
        let mut transport = MmioTransport::new(device, self.ram.clone(), line)?;
        for (queue, bell) in (0u32..).zip(transport.doorbells()) {
            let address = IoEventAddress::Mmio(base + QUEUE_NOTIFY);
            self.fd.register_ioevent(bell, &address, queue).map_err(kvm_error("registering a doorbell"))?;
        }
        for (offset, register) in transport.lock_free_registers() {
            self.mmio.insert_register(base + offset, register);
        }
        let part = format!("virtio-{slot}");
        if let Some(state) = self.saved(&part)? {
            transport.restore(&state)?;
        }
        let name = transport.name().to_owned();
        let transport = Arc::new(Mutex::new(transport));
        self.parts.insert(part, Box::new(Part(Arc::clone(&transport))));
        self.mmio.insert(base, slots::SIZE, &name, Arc::clone(&transport) as _)?;
        self.described.push(MmioDescription { slot, base, size: slots::SIZE, gsi });
        self.subscribers.push(Box::new(DeviceSubscriber(transport)));
        Ok(())
    }
}

/// `disks` go to the slots of their serials, at once: a saved slot is checked against its disk.
fn place_disks(
    board: &mut Board<'_>,
    slots: DiskSlots,
    mut disks: Vec<(String, Disk)>,
) -> Result<Vec<Box<dyn DiskSlot>>, BuildError> {
    let mut handles: Vec<Box<dyn DiskSlot>> = Vec::new();
    let kinds =
        [(true, slots::FIRST_READ_ONLY, slots.read_only), (false, slots::FIRST_WRITABLE, slots.writable)];
    for (read_only, first, count) in kinds {
        for n in 0..usize::from(count) {
            let serial = slots::serial(read_only, n);
            let device = Blk::new(serial.clone(), read_only);
            let handle: Box<dyn DiskSlot> = Box::new(device.handle());
            if let Some(at) = disks.iter().position(|(wanted, _)| *wanted == serial) {
                let (_, disk) = disks.swap_remove(at);
                handle.attach(disk.file, disk.below).map_err(StateError::Attach)?;
            }
            handles.push(handle);
            board.place(first + n, Box::new(device))?;
        }
    }
    match disks.pop() {
        Some((serial, _)) => {
            Err(RestoreError::invalid(&format!("disk {serial}"), "the saved VM has no such slot").into())
        }
        None => Ok(handles),
    }
}

fn place_filesystem(
    board: &mut Board<'_>,
    tag: Option<String>,
) -> Result<Option<Box<dyn FilesystemSlot>>, BuildError> {
    let Some(tag) = tag else { return Ok(None) };
    let device = Fs::new(tag);
    let handle = device.handle();
    board.place(slots::FILESYSTEM, Box::new(device))?;
    Ok(Some(Box::new(handle)))
}

fn place_networks(board: &mut Board<'_>, count: u8) -> Result<Vec<Box<dyn NetworkSlot>>, BuildError> {
    let mut handles: Vec<Box<dyn NetworkSlot>> = Vec::new();
    for number in 0..count {
        let device =
            Net::new(number).map_err(|source| BuildError::EventFd { what: "a network device", source })?;
        handles.push(Box::new(device.handle()));
        board.place(slots::FIRST_NETWORK + usize::from(number), Box::new(device))?;
    }
    Ok(handles)
}

fn place_serial(
    board: &mut Board<'_>,
    pio: &mut PioBus,
    console: Option<Console>,
) -> Result<Arc<ConsoleCounters>, BuildError> {
    let counters = Arc::new(ConsoleCounters::default());
    let line = board.interrupt("the serial port", layout::SERIAL_GSI)?;
    let (output, input, cap) = match console {
        Some(console) => (Some(console.output), console.input, console.cap_bytes),
        None => (None, None, 0),
    };
    let output = CappedOutput::new(output, cap, Arc::clone(&counters));
    let what = "console input";
    let room = input.is_some().then(|| eventfd(what)).transpose()?;
    let again = |room: &EventFd| room.try_clone().map_err(|source| BuildError::EventFd { what, source });
    let theirs = room.as_ref().map(again).transpose()?;
    let port = match (board.saved(SERIAL)?, theirs) {
        (Some(state), theirs) => SerialPort::restore(&state, line, output, theirs)?,
        (None, Some(theirs)) => SerialPort::with_input(line, output, theirs),
        (None, None) => SerialPort::new(line, output),
    };
    let port = Arc::new(Mutex::new(port));
    if let (Some(input), Some(room)) = (input, room) {
        board.subscribers.push(Box::new(SerialInput::new(Arc::clone(&port), input, room)));
    }
    board.parts.insert(SERIAL.to_owned(), Box::new(Part(Arc::clone(&port))));
    pio.insert(layout::SERIAL_PORT, layout::SERIAL_PORTS, SERIAL, port)?;
    Ok(counters)
}

/// A machine that was saved before there was one goes on without.
fn place_generation_id(board: &mut Board<'_>) -> Result<(), BuildError> {
    let at = Gpa::new(layout::GENERATION_ID);
    let device = match &mut board.saved {
        None => GenerationId::new(board.ram, at)?,
        Some(saved) => {
            let Some(state) = saved.remove(vmgenid::NAME) else { return Ok(()) };
            GenerationId::check(&state)?;
            let line = board.interrupt("the generation id", layout::GENERATION_ID_GSI)?;
            GenerationId::restore(board.ram, at, line)?
        }
    };
    board.parts.insert(vmgenid::NAME.to_owned(), Box::new(device));
    Ok(())
}

fn place_power(pio: &mut PioBus, end: &Arc<EndLatch>) -> Result<(), BusError> {
    let power = Arc::new(Mutex::new(PowerControl::new(Arc::clone(end))));
    pio.insert(layout::POWER_PORT, layout::POWER_PORTS, "power", power)?;
    let keyboard = Arc::new(Mutex::new(KeyboardReset::new(Arc::clone(end))));
    pio.insert(layout::KEYBOARD_COMMAND_PORT, 1, "keyboard reset", keyboard)
}

#[cfg(test)]
mod tests;
