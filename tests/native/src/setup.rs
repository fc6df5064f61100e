//! A VM to be, in a test's words.

use std::fs::File;
use std::io::{Seek, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixListener;

use spore_vmm::api::{
    ConsoleConfig, DiskConfig, DiskSlots, FdIndex, MAX_NETWORK_SLOTS, PROTOCOL_VERSION, VmConfig, VsockConfig,
};

use crate::{Vm, host};

/// A temporary file with this content, positioned at its start.
#[must_use]
pub fn file_with(content: &[u8]) -> File {
    let mut file = tempfile::tempfile().expect("a temporary file can be made");
    file.write_all(content).expect("a temporary file can be written");
    file.rewind().expect("a file can be rewound");
    file
}

/// A sparse disk image of `mib` MiB.
#[must_use]
pub fn disk_file(mib: u64) -> File {
    let file = tempfile::tempfile().expect("a temporary file can be made");
    file.set_len(mib << 20).expect("a sparse file has no cost");
    file
}

/// What to build. Starts as one vCPU, 64 MiB, the ELF guest, no vsock, no disk.
pub struct Setup {
    pub script: String,
    pub vcpus: u8,
    pub memory_mib: u64,
    pub huge_pages: bool,
    pub kernel: Vec<u8>,
    pub initrd: Option<Vec<u8>>,
    pub disks: Vec<(File, bool)>,
    pub vsock: bool,
    /// The tag of a file system device.
    pub filesystem: Option<String>,
    pub host_ports: Vec<u32>,
    pub cap_bytes: u64,
    /// Where console output goes instead of the pipe that [`Vm::console`] reads.
    pub console: Option<OwnedFd>,
    /// Fed to the guest's serial receiver.
    pub input: Option<OwnedFd>,
}

impl Setup {
    /// A guest that runs `script` (see `tests/guests/guest/commands.rs`).
    #[must_use]
    pub fn new(script: &str) -> Self {
        Self {
            script: script.to_owned(),
            vcpus: 1,
            memory_mib: 64,
            huge_pages: false,
            kernel: spore_guests::ELF.to_vec(),
            initrd: None,
            disks: Vec::new(),
            vsock: false,
            filesystem: None,
            host_ports: Vec::new(),
            cap_bytes: 0,
            console: None,
            input: None,
        }
    }

    #[must_use]
    pub fn vcpus(mut self, vcpus: u8) -> Self {
        self.vcpus = vcpus;
        self
    }

    #[must_use]
    pub fn memory_mib(mut self, mib: u64) -> Self {
        self.memory_mib = mib;
        self
    }

    #[must_use]
    pub fn huge_pages(mut self) -> Self {
        self.huge_pages = true;
        self
    }

    #[must_use]
    pub fn kernel(mut self, image: Vec<u8>) -> Self {
        self.kernel = image;
        self
    }

    #[must_use]
    pub fn initrd(mut self, content: Vec<u8>) -> Self {
        self.initrd = Some(content);
        self
    }

    #[must_use]
    pub fn disk(mut self, file: File, read_only: bool) -> Self {
        self.disks.push((file, read_only));
        self
    }

    #[must_use]
    pub fn vsock(mut self, host_ports: &[u32]) -> Self {
        self.vsock = true;
        self.host_ports = host_ports.to_vec();
        self
    }

    #[must_use]
    pub fn filesystem(mut self, tag: &str) -> Self {
        self.filesystem = Some(tag.to_owned());
        self
    }

    #[must_use]
    pub fn cap_bytes(mut self, cap: u64) -> Self {
        self.cap_bytes = cap;
        self
    }

    #[must_use]
    pub fn console(mut self, output: OwnedFd) -> Self {
        self.console = Some(output);
        self
    }

    #[must_use]
    pub fn input(mut self, input: OwnedFd) -> Self {
        self.input = Some(input);
        self
    }

    /// Starts a VMM and configures it.
    ///
    /// # Panics
    /// When the VMM refuses.
    #[must_use]
    pub fn configure(self) -> Vm {
        let mut vm = Vm::spawn();
        vm.configure(self).expect("the VMM accepts the configuration");
        vm
    }

    /// Starts a VMM, configures it, boots it.
    ///
    /// # Panics
    /// When the VMM refuses.
    #[must_use]
    pub fn boot(self) -> Vm {
        let mut vm = self.configure();
        vm.boot();
        vm
    }

    /// The message and the descriptors that it names. `output` is the console.
    pub(crate) fn message(
        &self,
        output: OwnedFd,
        listener: Option<UnixListener>,
    ) -> (VmConfig, Vec<OwnedFd>) {
        let mut fds: Vec<OwnedFd> = Vec::new();
        let mut attach = |fd: OwnedFd| {
            fds.push(fd);
            FdIndex(u32::try_from(fds.len() - 1).unwrap_or(u32::MAX))
        };
        let again = |fd: BorrowedFd<'_>| fd.try_clone_to_owned().expect("a descriptor can be doubled");
        let config = VmConfig {
            protocol: PROTOCOL_VERSION,
            vcpus: self.vcpus,
            memory_mib: self.memory_mib,
            huge_pages: self.huge_pages,
            kvm: attach(host::kvm().into()),
            kernel: attach(file_with(&self.kernel).into()),
            initrd: self.initrd.as_ref().map(|content| attach(file_with(content).into())),
            cmdline: format!("console=ttyS0 guest={}", self.script),
            console: Some(ConsoleConfig {
                output: attach(output),
                input: self.input.as_ref().map(|input| attach(again(input.as_fd()))),
                cap_bytes: self.cap_bytes,
            }),
            vsock: listener.map(|listener| VsockConfig {
                guest_cid: 3,
                listener: attach(listener.into()),
                host_ports: self.host_ports.clone(),
            }),
            disk_slots: DiskSlots::default(),
            filesystem: self.filesystem.clone(),
            network_slots: MAX_NETWORK_SLOTS,
            disks: self
                .disks
                .iter()
                .map(|(file, read_only)| DiskConfig {
                    file: attach(again(file.as_fd())),
                    read_only: *read_only,
                    below: Vec::new(),
                })
                .collect(),
        };
        (config, fds)
    }
}
