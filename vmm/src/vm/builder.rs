//! Builds a VM from a validated configuration: memory and images first, because they fail
//! most often and cost the least to undo, then KVM, devices, firmware tables, vCPUs. The one
//! module that names concrete devices.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::fs::File;
use std::io;
use std::os::unix::net::UnixStream;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};

use event_manager::MutEventSubscriber;
use kvm_ioctls::{IoEventAddress, VmFd};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::{DiskSlot, FilesystemSlot, Gauges, StateError, Vm, VmParts, kvm, slots};
use crate::api::{AttachedDisk, BalloonMetrics, BlkMetrics, DiskSlots, FsMetrics, VsockMetrics};
use crate::arch::{self, CpuModel, HostError, ImageError, MmioDescription, Platform, SetupError, layout};
use crate::bus::{BusError, MmioBus, PioBus};
use crate::config::{Console, MachineConfig};
use crate::devices::power::{KeyboardReset, PowerControl};
use crate::devices::serial::{CappedOutput, ConsoleCounters, SerialInput, SerialPort};
use crate::devices::virtio::VirtioDevice;
use crate::devices::virtio::balloon::{Balloon, BalloonHandle};
use crate::devices::virtio::blk::{Blk, BlkHandle};
use crate::devices::virtio::fs::{Fs, FsHandle};
use crate::devices::virtio::rng::Rng;
use crate::devices::virtio::subscriber::DeviceSubscriber;
use crate::devices::virtio::transport::{MmioTransport, TransportError};
use crate::devices::virtio::vsock::{Vsock, VsockError, VsockHandle};
use crate::end::EndLatch;
use crate::memory::{self, GuestRam, MapError, RamLayout};
use crate::vcpu::{ExitCounters, Shared, VcpuError, VcpuHandle};

/// Offset of a virtio-mmio slot's queue-notify register (virtio 1.2, 4.2.2).
const QUEUE_NOTIFY: u64 = 0x50;

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

/// Builds the VM; `end` is set when it has ended.
pub fn build(
    config: MachineConfig,
    end: Arc<EndLatch>,
    on_connection: OnConnection,
) -> Result<Built, BuildError> {
    let MachineConfig {
        vcpus,
        memory_bytes,
        kvm,
        mut kernel,
        mut initrd,
        cmdline,
        console,
        vsock,
        disk_slots,
        filesystem,
        disks,
    } = config;
    let kvm = kvm::open(kvm);
    arch::check_host(&kvm, vcpus)?;
    let ram = memory::map(&RamLayout::around(memory_bytes, layout::HOLE))?;
    let entry = arch::load_image(&ram, &mut kernel, initrd.as_mut(), &cmdline)?;
    drop((kernel, initrd));

    let fd = kvm.create_vm().map_err(kvm_error("creating a VM"))?;
    kvm::register_ram(&fd, &ram).map_err(kvm_error("registering guest memory"))?;
    arch::prepare_vm(&fd)?;

    let mut board = Board {
        fd: &fd,
        ram: &ram,
        mmio: MmioBus::default(),
        described: Vec::new(),
        subscribers: Vec::new(),
        lines: Lines::default(),
    };
    let mut pio = PioBus::default();
    let console = place_serial(&mut board, &mut pio, console)?;
    let power_button = board.interrupt("the power button", layout::POWER_BUTTON_GSI)?;
    place_power(&mut pio, &end)?;
    board.place(slots::RNG, Box::new(Rng::new()))?;
    let mut vsock_handle = None;
    if let Some(vsock) = vsock {
        let device = Vsock::new(vsock.guest_cid, vsock.listener, vsock.host_ports, on_connection)?;
        vsock_handle = Some(device.handle());
        board.place(slots::VSOCK, Box::new(device))?;
    }
    let disk_slots = place_disks(&mut board, disk_slots)?;
    let filesystem = place_filesystem(&mut board, filesystem)?;
    let balloon = Balloon::new();
    let balloon_handle = balloon.handle();
    board.place(slots::BALLOON, Box::new(balloon))?;
    let Board { mmio, described, subscribers, .. } = board;

    arch::write_firmware_tables(&ram, &Platform { vcpus, slots: &described })?;
    let counters = Arc::new(ExitCounters::default());
    let shared = Shared {
        pio: Arc::new(pio),
        mmio: Arc::new(mmio),
        end: Arc::clone(&end),
        counters: Arc::clone(&counters),
    };
    let model = CpuModel::new(&kvm, vcpus)?;
    let mut vm = Vm::new(VmParts {
        vcpus: Vec::new(),
        counters,
        end,
        disks: disk_slots,
        filesystem,
        gauges: Box::new(DeviceGauges { console, vsock: vsock_handle, balloon: balloon_handle }),
        power_button,
        ram,
        fd,
    });
    for index in 0..vcpus {
        let vcpu = vm.fd().create_vcpu(index.into()).map_err(kvm_error("creating a vCPU"))?;
        model.apply(&vcpu, index, (index == 0).then_some(&entry), vm.ram())?;
        vm.add_vcpu(VcpuHandle::spawn(vcpu, index, shared.clone())?);
    }
    let disks = disks.into_iter().map(|disk| vm.attach(disk)).collect::<Result<_, _>>()?;
    Ok(Built { vm, disks, subscribers })
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

    /// Puts a device into a slot: registers on the bus, doorbells and interrupt by event
    /// descriptors, work on the event loop.
    fn place(&mut self, slot: usize, device: Box<dyn VirtioDevice>) -> Result<(), BuildError> {
        let (base, gsi) = (slots::address(slot), slots::gsi(slot));
        let line = self.interrupt("a virtio device", gsi)?;
        let transport = MmioTransport::new(device, self.ram.clone(), line)?;
        for (queue, bell) in (0u32..).zip(transport.doorbells()) {
            let address = IoEventAddress::Mmio(base + QUEUE_NOTIFY);
            self.fd.register_ioevent(bell, &address, queue).map_err(kvm_error("registering a doorbell"))?;
        }
        for (offset, register) in transport.lock_free_registers() {
            self.mmio.insert_register(base + offset, register);
        }
        let name = transport.name().to_owned();
        let transport = Arc::new(Mutex::new(transport));
        self.mmio.insert(base, slots::SIZE, &name, Arc::clone(&transport) as _)?;
        self.described.push(MmioDescription { slot, base, size: slots::SIZE, gsi });
        self.subscribers.push(Box::new(DeviceSubscriber(transport)));
        Ok(())
    }
}

fn place_disks(board: &mut Board<'_>, slots: DiskSlots) -> Result<Vec<Box<dyn DiskSlot>>, BuildError> {
    let mut handles: Vec<Box<dyn DiskSlot>> = Vec::new();
    let kinds =
        [(true, slots::FIRST_READ_ONLY, slots.read_only), (false, slots::FIRST_WRITABLE, slots.writable)];
    for (read_only, first, count) in kinds {
        for n in 0..usize::from(count) {
            let device = Blk::new(slots::serial(read_only, n), read_only);
            handles.push(Box::new(device.handle()));
            board.place(first + n, Box::new(device))?;
        }
    }
    Ok(handles)
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
    let port = match input {
        Some(input) => serial_with_input(board, line, output, input)?,
        None => Arc::new(Mutex::new(SerialPort::new(line, output))),
    };
    pio.insert(layout::SERIAL_PORT, layout::SERIAL_PORTS, "serial", port)?;
    Ok(counters)
}

fn serial_with_input(
    board: &mut Board<'_>,
    line: EventFd,
    output: CappedOutput,
    input: File,
) -> Result<Arc<Mutex<SerialPort>>, BuildError> {
    let what = "console input";
    let room = eventfd(what)?;
    let theirs = room.try_clone().map_err(|source| BuildError::EventFd { what, source })?;
    let port = Arc::new(Mutex::new(SerialPort::with_input(line, output, theirs)));
    board.subscribers.push(Box::new(SerialInput::new(Arc::clone(&port), input, room)));
    Ok(port)
}

fn place_power(pio: &mut PioBus, end: &Arc<EndLatch>) -> Result<(), BusError> {
    let power = Arc::new(Mutex::new(PowerControl::new(Arc::clone(end))));
    pio.insert(layout::POWER_PORT, layout::POWER_PORTS, "power", power)?;
    let keyboard = Arc::new(Mutex::new(KeyboardReset::new(Arc::clone(end))));
    pio.insert(layout::KEYBOARD_COMMAND_PORT, 1, "keyboard reset", keyboard)
}

impl DiskSlot for BlkHandle {
    fn serial(&self) -> String {
        self.serial()
    }

    fn read_only(&self) -> bool {
        self.read_only()
    }

    fn is_free(&self) -> bool {
        self.is_free()
    }

    fn attach(&self, file: File) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        Ok(self.attach(file)?)
    }

    fn metrics(&self) -> BlkMetrics {
        self.metrics()
    }
}

impl FilesystemSlot for FsHandle {
    fn attach(&self, sockets: Vec<UnixStream>) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        Ok(self.attach(sockets)?)
    }

    fn hold(&self, held: bool) {
        self.hold(held);
    }

    fn in_flight(&self) -> usize {
        self.in_flight()
    }

    fn metrics(&self) -> FsMetrics {
        self.metrics()
    }
}

struct DeviceGauges {
    console: Arc<ConsoleCounters>,
    vsock: Option<VsockHandle>,
    balloon: BalloonHandle,
}

impl Gauges for DeviceGauges {
    fn unsent(&self) -> u64 {
        self.vsock.as_ref().map_or(0, VsockHandle::unsent)
    }

    fn resumed(&self) {
        if let Some(vsock) = &self.vsock {
            vsock.resumed();
        }
    }

    fn vsock(&self) -> VsockMetrics {
        self.vsock.as_ref().map(VsockHandle::metrics).unwrap_or_default()
    }

    fn balloon(&self) -> BalloonMetrics {
        self.balloon.metrics()
    }

    fn set_balloon(&self, mib: u64) {
        self.balloon.set_target(mib);
    }

    fn console(&self) -> (u64, u64) {
        (self.console.bytes.load(Ordering::Relaxed), self.console.dropped.load(Ordering::Relaxed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_that_share_a_line_share_its_descriptor() {
        let (mut lines, mut registered) = (Lines::default(), Vec::new());
        let mut get = |slot| {
            let gsi = slots::gsi(slot);
            lines.get("a test", gsi, |line| {
                registered.push((gsi, line.try_clone().unwrap()));
                Ok(())
            })
        };
        let (first, sharer, other) = (get(0).unwrap(), get(18).unwrap(), get(1).unwrap());
        assert_eq!(registered.iter().map(|(gsi, _)| *gsi).collect::<Vec<_>>(), [6, 7]);
        first.write(1).unwrap();
        sharer.write(1).unwrap();
        assert_eq!(registered[0].1.read().unwrap(), 2, "no edge is lost");
        assert!(registered[1].1.read().is_err(), "the other line is silent");
        drop(other);
    }

    #[test]
    fn a_line_that_was_not_registered_is_not_kept() {
        let mut lines = Lines::default();
        let failed = lines.get("a test", 6, |_| Err(kvm_error("a test")(kvm_ioctls::Error::new(5))));
        assert!(failed.is_err());
        let mut registered = false;
        lines
            .get("a test", 6, |_| {
                registered = true;
                Ok(())
            })
            .unwrap();
        assert!(registered);
    }
}
