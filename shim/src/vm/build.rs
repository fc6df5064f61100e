//! How a VM comes to be: booted, or restored from a template of booted ones or from a snapshot.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};

use sha2::{Digest, Sha256};
use slog::warn;
use spore_agent_api::{NAMES_PORT, READY_PORT};
use spore_vmm::api::{
    Call, ConsoleConfig, DiskSlots, FdIndex, MAX_NETWORK_SLOTS, PROTOCOL_VERSION, VmConfig, VsockConfig,
};

use super::snapshot::Image;
use super::{CONSOLE, HostFiles, VSOCK, Vm, VmError};
use crate::config::{Config, Machine};
use crate::rootfs::MOST_LAYER_DISKS;
use crate::template::Template;
use crate::volumes::FileServer;

/// What one container takes: its layers and what the upper directory held before the first
/// task, its writable layer. A guest spends some time on every slot as it boots.
const DISK_SLOTS: DiskSlots = DiskSlots { read_only: MOST_LAYER_DISKS + 1, writable: 1 };
const CONSOLE_CAP: u64 = 1 << 20;
/// Every guest has the same id: each has its own vsock device and socket.
const GUEST_CID: u32 = 3;

/// The machine that the VMM is asked for; its descriptors are those of [`Vm::build`].
fn description(config: &Config, machine: &Machine) -> VmConfig {
    let mut cmdline = spore_vmm::DEFAULT_CMDLINE.to_string();
    for more in [config.kernel_args.as_str(), if machine.debug { "loglevel=7" } else { "" }] {
        if !more.is_empty() {
            cmdline.push(' ');
            cmdline.push_str(more);
        }
    }
    VmConfig {
        protocol: PROTOCOL_VERSION,
        vcpus: machine.vcpus,
        memory_mib: machine.memory_mib,
        huge_pages: machine.huge_pages,
        kvm: FdIndex(0),
        kernel: FdIndex(3),
        initrd: Some(FdIndex(4)),
        cmdline,
        console: Some(console()),
        vsock: Some(vsock()),
        disk_slots: DISK_SLOTS,
        filesystem: Some(spore_agent_api::VOLUMES_TAG.into()),
        network_slots: MAX_NETWORK_SLOTS,
        disks: Vec::new(),
    }
}

pub(super) fn console() -> ConsoleConfig {
    ConsoleConfig { output: FdIndex(1), input: None, cap_bytes: CONSOLE_CAP }
}

pub(super) fn vsock() -> VsockConfig {
    VsockConfig { guest_cid: GUEST_CID, listener: FdIndex(2), host_ports: vec![READY_PORT, NAMES_PORT] }
}

impl HostFiles {
    /// What a template of `machine` depends on: VMs with equal identities can be restored from
    /// each other's. Of this host, this boot of it, and these files.
    pub(crate) fn identity(&self, config: &Config, machine: &Machine) -> io::Result<[u8; 32]> {
        use std::os::unix::fs::MetadataExt;
        let mut hash = Sha256::new();
        let described = serde_json::to_vec(&description(config, machine))?;
        for metadata in [std::fs::metadata(&config.vmm)?, self.kernel.metadata()?, self.initramfs.metadata()?]
        {
            for number in [metadata.dev(), metadata.ino(), metadata.len()] {
                hash.update(number.to_le_bytes());
            }
            for number in [metadata.ctime(), metadata.ctime_nsec()] {
                hash.update(number.to_le_bytes());
            }
        }
        // What processors KVM gives to guests follows from the host's, its microcode and the kernel.
        let processors = std::fs::read_to_string("/proc/cpuinfo")?;
        let first = processors.split("\n\n").next().unwrap_or_default();
        let varies = ["cpu MHz", "bogomips", "apicid", "initial apicid"];
        for line in first.lines().filter(|line| !varies.iter().any(|name| line.starts_with(name))) {
            hash.update(line.as_bytes());
        }
        hash.update(std::fs::read("/proc/version")?);
        hash.update(described);
        Ok(hash.finalize().into())
    }
}

impl Vm {
    /// Builds the VM and lets it run: from the template, or by a boot where there is none or
    /// it cannot be used, which also removes it.
    pub(crate) async fn build(
        &self,
        config: &Config,
        files: &HostFiles,
        template: Option<&Template>,
    ) -> Result<(), VmError> {
        let (console, listener) = self.outlets()?;
        let common = (files.kvm.as_raw_fd(), console.as_raw_fd(), listener.as_raw_fd());
        if let Some(template) = template {
            let layers = vec![(template.layer.clone(), &template.memory)];
            let image = Image { state: Some(&template.state), layers, disks: Vec::new() };
            let begun = async {
                self.restore(common, &image).await?;
                self.resume().await
            };
            match begun.await {
                Ok(()) => return Ok(()),
                Err(VmError::Refused { message, .. }) => {
                    warn!(self.log, "the template cannot be used, a guest is booted instead"; "error" => message);
                    template.discard();
                }
                Err(error) => return Err(error),
            }
        }
        let (kvm, console, listener) = common;
        let fds = [kvm, console, listener, files.kernel.as_raw_fd(), files.initramfs.as_raw_fd()];
        let configuration = description(config, &self.machine);
        self.call("configure", Call::Configure(configuration), &fds).await?;
        self.call("boot", Call::Boot, &[]).await.map(drop)
    }

    /// Makes this VM the saved one, its disks included, and lets it run, with `volumes` that go on with its tables.
    pub(crate) async fn bring_back(
        &self,
        files: &HostFiles,
        image: &Image<'_>,
        volumes: Option<(FileServer, Vec<UnixStream>)>,
    ) -> Result<(), VmError> {
        let (console, listener) = self.outlets()?;
        self.restore((files.kvm.as_raw_fd(), console.as_raw_fd(), listener.as_raw_fd()), image).await?;
        if let Some((server, sockets)) = volumes {
            self.attach_volumes(server, sockets).await?;
        }
        self.resume().await
    }

    /// The console's log and the vsock socket.
    fn outlets(&self) -> Result<(File, UnixListener), VmError> {
        let host = |operation| move |source| VmError::Host { operation, source };
        let console =
            self.dir.create_file(&self.file_name(CONSOLE)).map_err(host("create the console's log"))?;
        let listener = UnixListener::bind(self.dir.socket(&self.file_name(VSOCK)))
            .map_err(host("make the vsock socket"))?;
        Ok((console, listener))
    }
}
