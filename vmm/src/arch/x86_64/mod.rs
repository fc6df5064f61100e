//! x86_64: see the modules for the parts. The entry points are, in the order of use,
//! [`check_host`], [`prepare_vm`], [`load_image`], [`write_firmware_tables`] and
//! [`CpuModel::apply`]; for a snapshot [`save_vcpu`] and [`save_platform`], and their counterparts.

mod acpi;
mod boot;
mod cpuid;
mod elf;
mod features;
mod image;
pub mod layout;
mod msr;
mod regs;
mod state;
mod xsave;

use kvm_bindings::{
    KVM_API_VERSION, KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQCHIP_IOAPIC, KvmIrqRouting, kvm_irq_routing_entry,
    kvm_irq_routing_entry__bindgen_ty_1, kvm_irq_routing_irqchip,
};
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};

pub use acpi::{MmioDescription, Platform, write_firmware_tables};
pub use boot::load_image;
pub use features::Mismatch;
pub use image::ImageError;
pub use regs::{Entry, describe_registers};
pub use state::{
    PlatformState, RestoreStateError, SaveList, SaveStateError, VcpuState, restore_platform, restore_vcpu,
    save_platform, save_vcpu,
};

use crate::memory::GuestRam;

/// Longest kernel command line in bytes, without the terminating NUL.
pub const MAX_CMDLINE: usize = 2047;

/// The command line that boots a stock Debian kernel fastest without giving anything up that
/// a container could use; figures in the README. What the caller wants goes after it.
pub const DEFAULT_CMDLINE: &str =
    "console=ttyS0 quiet panic=-1 reboot=a pci=off audit=0 cryptomgr.notests lsm=landlock,yama";

/// Inputs of the one I/O APIC.
const IO_APIC_PINS: u32 = 24;

/// This host's KVM cannot run our guests.
#[derive(Debug, thiserror::Error)]
pub enum HostError {
    #[error("/dev/kvm: API version is {found}, not {KVM_API_VERSION}; is the descriptor really /dev/kvm?")]
    ApiVersion { found: i32 },
    #[error("/dev/kvm: this kernel's KVM lacks {missing}; a newer host kernel has it")]
    Capability { missing: &'static str },
    #[error("/dev/kvm: {vcpus} vCPUs exceed this KVM's maximum of {max}")]
    Vcpus { vcpus: u8, max: usize },
}

/// A KVM call of the CPU or VM set-up failed.
#[derive(Debug, thiserror::Error)]
pub enum SetupError {
    #[error("KVM: {operation}: {source}")]
    Kvm { operation: &'static str, source: kvm_ioctls::Error },
    #[error("KVM: MSR {index:#x} cannot be set to {value:#x}")]
    Msr { index: u32, value: u64 },
    #[error("KVM: too many {what}: {source}")]
    List { what: &'static str, source: vmm_sys_util::fam::Error },
    #[error("guest memory: writing {what}: {source}")]
    Memory { what: &'static str, source: vm_memory::GuestMemoryError },
}

/// Names an operation in an error of KVM's.
fn kvm_error(operation: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> SetupError {
    move |source| SetupError::Kvm { operation, source }
}

/// Checks that KVM has all that this VMM relies on.
pub fn check_host(kvm: &Kvm, vcpus: u8) -> Result<(), HostError> {
    let found = kvm.get_api_version();
    if u32::try_from(found) != Ok(KVM_API_VERSION) {
        return Err(HostError::ApiVersion { found });
    }
    let needed = [
        (Cap::Irqchip, "an in-kernel interrupt controller (KVM_CAP_IRQCHIP)"),
        (Cap::UserMemory, "user memory regions (KVM_CAP_USER_MEMORY)"),
        (Cap::Irqfd, "irqfd (KVM_CAP_IRQFD)"),
        (Cap::Ioeventfd, "ioeventfd (KVM_CAP_IOEVENTFD)"),
        (Cap::ImmediateExit, "immediate exits (KVM_CAP_IMMEDIATE_EXIT)"),
        (Cap::SetTssAddr, "a TSS address (KVM_CAP_SET_TSS_ADDR)"),
        (Cap::SetIdentityMapAddr, "an identity map address (KVM_CAP_SET_IDENTITY_MAP_ADDR)"),
        (Cap::ExtCpuid, "CPUID configuration (KVM_CAP_EXT_CPUID)"),
        (Cap::MpState, "multiprocessor state (KVM_CAP_MP_STATE)"),
    ];
    if let Some((_, missing)) = needed.into_iter().find(|(cap, _)| !kvm.check_extension(*cap)) {
        return Err(HostError::Capability { missing });
    }
    let max = kvm.get_max_vcpus();
    if usize::from(vcpus) > max {
        return Err(HostError::Vcpus { vcpus, max });
    }
    Ok(())
}

/// Sets the VM-wide parts up that must exist before the first vCPU: KVM's private pages and
/// the interrupt controllers.
pub fn prepare_vm(vm: &VmFd) -> Result<(), SetupError> {
    vm.set_identity_map_address(layout::IDENTITY_MAP)
        .map_err(kvm_error("setting the identity map address"))?;
    vm.set_tss_address(layout::TSS).map_err(kvm_error("setting the TSS address"))?;
    vm.create_irq_chip().map_err(kvm_error("creating the interrupt controllers"))?;
    route_interrupts(vm)
}

/// Leads every line to the I/O APIC and nowhere else. KVM's default also feeds lines 0 to 15
/// to the 8259 PIC, which a hardware-reduced guest neither sets up nor masks: each pulse would
/// reach the boot processor a second time, as exception 4 (COM1) or 5 (the power button).
fn route_interrupts(vm: &VmFd) -> Result<(), SetupError> {
    let routes: Vec<_> = (0..IO_APIC_PINS)
        .map(|pin| kvm_irq_routing_entry {
            gsi: pin,
            type_: KVM_IRQ_ROUTING_IRQCHIP,
            u: kvm_irq_routing_entry__bindgen_ty_1 {
                irqchip: kvm_irq_routing_irqchip { irqchip: KVM_IRQCHIP_IOAPIC, pin },
            },
            ..Default::default()
        })
        .collect();
    let routes = KvmIrqRouting::from_entries(&routes)
        .map_err(|source| SetupError::List { what: "interrupt routes", source })?;
    vm.set_gsi_routing(&routes).map_err(kvm_error("routing interrupts"))
}

/// What every vCPU of one VM has in common.
#[derive(Debug)]
pub struct CpuModel {
    supported: Vec<kvm_bindings::kvm_cpuid_entry2>,
    vcpus: u8,
    tsc_deadline: bool,
}

impl CpuModel {
    pub fn new(kvm: &Kvm, vcpus: u8) -> Result<Self, SetupError> {
        let supported = kvm
            .get_supported_cpuid(kvm_bindings::KVM_MAX_CPUID_ENTRIES)
            .map_err(kvm_error("reading the supported CPUID"))?;
        let tsc_deadline = kvm.check_extension(Cap::TscDeadlineTimer);
        Ok(Self { supported: supported.as_slice().to_vec(), vcpus, tsc_deadline })
    }

    /// Configures one vCPU. `entry` is where the boot processor starts; the others wait for it
    /// to wake them.
    pub fn apply(
        &self,
        vcpu: &VcpuFd,
        index: u8,
        entry: Option<&Entry>,
        ram: &GuestRam,
    ) -> Result<(), SetupError> {
        let leaves = cpuid::for_vcpu(&self.supported, self.vcpus, index, self.tsc_deadline);
        let leaves = kvm_bindings::CpuId::from_entries(&leaves)
            .map_err(|source| SetupError::List { what: "CPUID leaves", source })?;
        vcpu.set_cpuid2(&leaves).map_err(kvm_error("setting CPUID"))?;
        msr::set_boot_msrs(vcpu)?;
        regs::set_fpu(vcpu)?;
        regs::set_local_apic(vcpu)?;
        entry.map_or(Ok(()), |entry| regs::set_entry(vcpu, entry, ram))
    }
}
