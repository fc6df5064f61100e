//! Model-specific registers that do not come up from reset as a kernel expects of firmware.
//! Everything else, kvmclock's included, starts as KVM resets it.

use kvm_bindings::{Msrs, kvm_msr_entry};
use kvm_ioctls::VcpuFd;

use super::{SetupError, kvm_error};

const IA32_MISC_ENABLE: u32 = 0x1a0;
const MISC_ENABLE_FAST_STRING: u64 = 1;
const IA32_MTRR_DEF_TYPE: u32 = 0x2ff;
/// MTRRs on; memory that no MTRR covers, here all of it, is write-back.
const MTRR_ENABLE_WRITE_BACK: u64 = 1 << 11 | 6;

const BOOT_MSRS: [(u32, u64); 2] =
    [(IA32_MISC_ENABLE, MISC_ENABLE_FAST_STRING), (IA32_MTRR_DEF_TYPE, MTRR_ENABLE_WRITE_BACK)];

pub(super) fn set_boot_msrs(vcpu: &VcpuFd) -> Result<(), SetupError> {
    let entries = BOOT_MSRS.map(|(index, data)| kvm_msr_entry { index, data, ..Default::default() });
    let msrs = Msrs::from_entries(&entries).map_err(|source| SetupError::List { what: "MSRs", source })?;
    // KVM stops at the first that it refuses and says how many it took.
    let taken = vcpu.set_msrs(&msrs).map_err(kvm_error("setting MSRs"))?;
    match BOOT_MSRS.get(taken) {
        Some(&(index, value)) => Err(SetupError::Msr { index, value }),
        None => Ok(()),
    }
}
