//! What depends on the processor architecture: the memory map, boot protocol, firmware
//! tables, CPU model and registers. Nothing outside this module names an MSR, a CPUID leaf,
//! a boot header or an ACPI table; the rest of the crate uses the names re-exported here, and
//! another architecture would provide the same ones.

#[cfg(target_arch = "x86_64")]
mod x86_64;
#[cfg(target_arch = "x86_64")]
pub use x86_64::{
    CpuModel, DEFAULT_CMDLINE, Entry, HostError, ImageError, MAX_CMDLINE, Mismatch, MmioDescription,
    Platform, PlatformState, RestoreStateError, SaveList, SaveStateError, SetupError, VcpuState, check_host,
    describe_registers, layout, load_image, prepare_vm, restore_platform, restore_vcpu, save_platform,
    save_vcpu, write_firmware_tables,
};
#[cfg(not(target_arch = "x86_64"))]
compile_error!("Spore's VMM has only been written for x86_64 so far");
