//! The processor's and the platform's state, out of KVM and into it.
//!
//! The order of the calls matters; it is the one that Firecracker and QEMU learned. Saving: KVM_GET_MP_STATE first, for
//! it makes pending INIT and SIPI take effect and so changes other state; KVM_GET_VCPU_EVENTS last, for the other calls may
//! change it. Restoring: CPUID first, for most of the rest is checked against it; KVM_SET_REGS before the
//! events, for it clears pending exceptions; special registers before the local APIC, for they carry its base; the APIC before
//! the MSRs, for the TSC deadline is only taken in that timer mode; of the MSRs the TSC first and
//! its deadline last. The vCPUs come before the interrupt controllers and the clock.

use kvm_bindings::{
    CpuId, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, Msrs, kvm_clock_data,
    kvm_cpuid_entry2, kvm_debugregs, kvm_irqchip, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_regs,
    kvm_sregs, kvm_vcpu_events, kvm_xcrs,
};
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};
use serde::{Deserialize, Serialize};

use super::features::{self, Mismatch};
use super::{CpuModel, cpuid, kvm_error, xsave};
use super::{SetupError, layout};

const IA32_TSC: u32 = 0x10;
const IA32_TSC_DEADLINE: u32 = 0x6e0;
/// Memory types, which KVM keeps but lists only since Linux 6.9: variable (eight pairs), fixed, default.
const MTRRS: [std::ops::RangeInclusive<u32>; 5] =
    [0x200..=0x20f, 0x250..=0x250, 0x258..=0x259, 0x268..=0x26f, 0x2ff..=0x2ff];
/// Most MSRs of one vCPU that are read from a file.
const MAX_MSRS: usize = 1024;
/// Frequencies that differ by no more than so many parts of a million are one: they are measured at boot.
const TSC_TOLERANCE: u64 = 250;

/// What a vCPU's guest was told of its processor, as this VMM set it: some KVMs read back other leaves than they were
/// given.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Leaves(Vec<kvm_cpuid_entry2>);

/// Everything of one vCPU. The `kvm_*` structures are KVM's stable interface, kept as their bytes.
#[derive(Debug, Serialize, Deserialize)]
pub struct VcpuState {
    pub mp_state: kvm_mp_state,
    pub regs: kvm_regs,
    pub sregs: kvm_sregs,
    /// XSAVE area, 32-bit words.
    pub xsave: Vec<u32>,
    pub xcrs: kvm_xcrs,
    pub debug: kvm_debugregs,
    pub local_apic: kvm_lapic_state,
    /// None where KVM does not say.
    #[serde(default)]
    pub tsc_khz: Option<u32>,
    pub leaves: Leaves,
    pub msrs: Vec<kvm_msr_entry>,
    pub events: kvm_vcpu_events,
}

/// What all vCPUs share.
#[derive(Debug, Serialize, Deserialize)]
pub struct PlatformState {
    pub pic_master: kvm_irqchip,
    pub pic_slave: kvm_irqchip,
    pub io_apic: kvm_irqchip,
    /// The guest's kvmclock. It goes on from this value: monotonic time of the guest stands still while the guest does.
    pub clock: kvm_clock_data,
}

/// State could not be read from KVM.
#[derive(Debug, thiserror::Error)]
#[error("save {what}: KVM: {source}")]
pub struct SaveStateError {
    what: &'static str,
    source: kvm_ioctls::Error,
}

/// State could not be put into KVM.
#[derive(Debug, thiserror::Error)]
pub enum RestoreStateError {
    #[error("restore vCPU {vcpu}: {source}")]
    Setup { vcpu: u8, source: SetupError },
    #[error("restore the platform: {0}")]
    Platform(#[from] SetupError),
    #[error(
        "restore vCPU {vcpu}: this host's processor or KVM lacks {mismatch}; restore it on a host like the one it was saved on"
    )]
    Processor { vcpu: u8, mismatch: Mismatch },
    #[error("restore vCPU {vcpu}: the XSAVE area has {found} words, of which {max} fit this host's")]
    Xsave { vcpu: u8, found: usize, max: usize },
    #[error("restore vCPU {vcpu}: {found} MSRs; at most {max} are allowed")]
    Msrs { vcpu: u8, found: usize, max: usize },
    #[error("restore vCPU {vcpu}: MSR {index:#x} cannot be set to {value:#x} on this host")]
    Msr { vcpu: u8, index: u32, value: u64 },
    #[error(
        "restore vCPU {vcpu}: the TSC ran at {saved} kHz, runs at {host} kHz here, and this host cannot scale it: {source}"
    )]
    Tsc { vcpu: u8, saved: u32, host: u32, source: kvm_ioctls::Error },
}

/// What there is to save of a vCPU on this host. Found out once for each VM.
#[derive(Debug, Clone, Default)]
pub struct SaveList {
    msrs: Vec<u32>,
    xsave_words: usize,
    leaves: Leaves,
}

impl SaveList {
    pub fn new(kvm: &Kvm, vm: &VmFd) -> Result<Self, SetupError> {
        let listed = kvm.get_msr_index_list().map_err(kvm_error("listing MSRs"))?;
        let mut msrs = listed.as_slice().to_vec();
        msrs.extend(MTRRS.into_iter().flatten());
        msrs.sort_unstable();
        msrs.dedup();
        // The size in bytes since Linux 5.17, where dynamically enabled state may make it larger than 4096.
        let bytes = usize::try_from(vm.check_extension_int(Cap::Xsave2)).unwrap_or(0);
        Ok(Self { msrs, xsave_words: xsave::words(bytes), leaves: Leaves::default() })
    }

    /// The list for a vCPU that was given these leaves.
    pub fn of(&self, leaves: Leaves) -> Self {
        Self { leaves, ..self.clone() }
    }
}

/// Reads a vCPU that is out of the guest, with no access half done. All vCPUs of the VM are.
pub fn save_vcpu(vcpu: &VcpuFd, list: &SaveList) -> Result<VcpuState, SaveStateError> {
    let failed = |what| move |source| SaveStateError { what, source };
    let mp_state = vcpu.get_mp_state().map_err(failed("the multiprocessor state"))?;
    let regs = vcpu.get_regs().map_err(failed("the registers"))?;
    let sregs = vcpu.get_sregs().map_err(failed("the special registers"))?;
    let xsave = xsave::get(vcpu, list.xsave_words).map_err(failed("the XSAVE area"))?;
    let xcrs = vcpu.get_xcrs().map_err(failed("the extended control registers"))?;
    let debug = vcpu.get_debug_regs().map_err(failed("the debug registers"))?;
    let local_apic = vcpu.get_lapic().map_err(failed("the local APIC"))?;
    let tsc_khz = vcpu.get_tsc_khz().ok().filter(|khz| *khz > 0);
    let leaves = list.leaves.clone();
    let msrs = save_msrs(vcpu, &list.msrs).map_err(failed("MSRs"))?;
    let events = vcpu.get_vcpu_events().map_err(failed("pending events"))?;
    Ok(VcpuState { mp_state, regs, sregs, xsave, xcrs, debug, local_apic, tsc_khz, leaves, msrs, events })
}

/// Reads what there is of `indices`: KVM stops at the first that this vCPU does not have.
fn save_msrs(vcpu: &VcpuFd, indices: &[u32]) -> Result<Vec<kvm_msr_entry>, kvm_ioctls::Error> {
    let mut found = Vec::with_capacity(indices.len());
    let mut rest = indices;
    while !rest.is_empty() {
        let chunk = &rest[..rest.len().min(kvm_bindings::KVM_MAX_MSR_ENTRIES)];
        let mut msrs = entries(chunk.iter().map(|&index| kvm_msr_entry { index, ..Default::default() }))?;
        let count = vcpu.get_msrs(&mut msrs)?;
        found.extend(msrs.as_slice().iter().take(count));
        let next = if count < chunk.len() { count + 1 } else { count };
        rest = &rest[next..];
    }
    fix_deadline(&mut found);
    Ok(found)
}

/// A deadline of 0 is one that has passed while the vCPU was out of the guest, its interrupt perhaps not delivered yet: set to
/// now, it fires again at the restore, which a guest takes for an early tick. Unarmed timers do the same once.
fn fix_deadline(msrs: &mut [kvm_msr_entry]) {
    let Some(now) = msrs.iter().find(|msr| msr.index == IA32_TSC).map(|msr| msr.data) else { return };
    for msr in msrs.iter_mut().filter(|msr| msr.index == IA32_TSC_DEADLINE && msr.data == 0) {
        msr.data = now;
    }
}

fn entries(msrs: impl Iterator<Item = kvm_msr_entry>) -> Result<Msrs, kvm_ioctls::Error> {
    let list: Vec<_> = msrs.collect();
    Msrs::from_entries(&list).map_err(|_| kvm_ioctls::Error::new(libc::E2BIG))
}

/// Reads what vCPUs share. All of them are out of the guest.
pub fn save_platform(vm: &VmFd) -> Result<PlatformState, SaveStateError> {
    let failed = |what| move |source| SaveStateError { what, source };
    let chip = |chip_id| {
        let mut chip = kvm_irqchip { chip_id, ..Default::default() };
        vm.get_irqchip(&mut chip).map(|()| chip).map_err(failed("the interrupt controllers"))
    };
    Ok(PlatformState {
        pic_master: chip(KVM_IRQCHIP_PIC_MASTER)?,
        pic_slave: chip(KVM_IRQCHIP_PIC_SLAVE)?,
        io_apic: chip(KVM_IRQCHIP_IOAPIC)?,
        clock: vm.get_clock().map_err(failed("the clock"))?,
    })
}

/// Puts the shared state into a VM whose vCPUs have theirs.
pub fn restore_platform(vm: &VmFd, state: &PlatformState) -> Result<(), RestoreStateError> {
    let chips = [
        (KVM_IRQCHIP_PIC_MASTER, &state.pic_master),
        (KVM_IRQCHIP_PIC_SLAVE, &state.pic_slave),
        (KVM_IRQCHIP_IOAPIC, &state.io_apic),
    ];
    for (chip_id, saved) in chips {
        // Which chip it is, is ours to say.
        let chip = kvm_irqchip { chip_id, pad: 0, chip: saved.chip };
        vm.set_irqchip(&chip).map_err(kvm_error("setting the interrupt controllers"))?;
    }
    // No flags: KVM counts on from this value, whatever the host's clocks did meanwhile.
    let clock = kvm_clock_data { clock: state.clock.clock, ..Default::default() };
    Ok(vm.set_clock(&clock).map_err(kvm_error("setting the clock"))?)
}

impl CpuModel {
    /// What vCPU `index` is told.
    pub fn leaves(&self, index: u8) -> Leaves {
        Leaves(cpuid::for_vcpu(&self.supported, self.vcpus, index, self.tsc_deadline))
    }

    /// Whether this host offers what a saved vCPU was shown. Nothing has to be built for it.
    pub fn check(&self, index: u8, state: &VcpuState) -> Result<(), RestoreStateError> {
        features::compare(&state.leaves.0, &self.leaves(index).0)
            .map_err(|mismatch| RestoreStateError::Processor { vcpu: index, mismatch })
    }
}

/// Puts a state into a new vCPU.
pub fn restore_vcpu(
    vcpu: &VcpuFd,
    index: u8,
    state: &VcpuState,
    list: &SaveList,
) -> Result<(), RestoreStateError> {
    let failed = |operation| move |source| setup(index, kvm_error(operation)(source));
    let leaves = CpuId::from_entries(&state.leaves.0)
        .map_err(|source| setup(index, SetupError::List { what: "CPUID leaves", source }))?;
    vcpu.set_cpuid2(&leaves).map_err(failed("setting CPUID"))?;
    restore_tsc_frequency(vcpu, index, state.tsc_khz)?;
    vcpu.set_mp_state(state.mp_state).map_err(failed("setting the multiprocessor state"))?;
    vcpu.set_regs(&state.regs).map_err(failed("setting registers"))?;
    vcpu.set_sregs(&state.sregs).map_err(failed("setting special registers"))?;
    if state.xsave.len() > list.xsave_words && state.xsave[list.xsave_words..].iter().any(|word| *word != 0) {
        let (found, max) = (state.xsave.len(), list.xsave_words);
        return Err(RestoreStateError::Xsave { vcpu: index, found, max });
    }
    xsave::set(vcpu, list.xsave_words, &state.xsave).map_err(failed("setting the XSAVE area"))?;
    // None on a host without XSAVE, and KVM refuses to set none.
    if state.xcrs.nr_xcrs > 0 {
        vcpu.set_xcrs(&state.xcrs).map_err(failed("setting extended control registers"))?;
    }
    vcpu.set_debug_regs(&state.debug).map_err(failed("setting debug registers"))?;
    vcpu.set_lapic(&state.local_apic).map_err(failed("setting the local APIC"))?;
    restore_msrs(vcpu, index, &state.msrs)?;
    vcpu.set_vcpu_events(&state.events).map_err(failed("setting pending events"))
}

fn setup(vcpu: u8, source: SetupError) -> RestoreStateError {
    RestoreStateError::Setup { vcpu, source }
}

fn restore_tsc_frequency(vcpu: &VcpuFd, index: u8, saved: Option<u32>) -> Result<(), RestoreStateError> {
    let (Some(saved), Ok(host)) = (saved, vcpu.get_tsc_khz()) else { return Ok(()) };
    let difference = u64::from(saved.abs_diff(host));
    if difference * 1_000_000 <= u64::from(saved) * TSC_TOLERANCE {
        return Ok(());
    }
    vcpu.set_tsc_khz(saved).map_err(|source| RestoreStateError::Tsc { vcpu: index, saved, host, source })
}

/// Sets MSRs in the order that they need. One that KVM refuses but that has its value already, such as one that only
/// tells of the processor, is as good as set.
fn restore_msrs(vcpu: &VcpuFd, index: u8, msrs: &[kvm_msr_entry]) -> Result<(), RestoreStateError> {
    if msrs.len() > MAX_MSRS {
        return Err(RestoreStateError::Msrs { vcpu: index, found: msrs.len(), max: MAX_MSRS });
    }
    let rank = |msr: &kvm_msr_entry| match msr.index {
        IA32_TSC => 0,
        IA32_TSC_DEADLINE => 2,
        _ => 1,
    };
    let mut ordered = msrs.to_vec();
    ordered.sort_by_key(rank);
    let failed = |source| setup(index, kvm_error("setting MSRs")(source));
    let mut rest = &ordered[..];
    while !rest.is_empty() {
        let chunk = &rest[..rest.len().min(kvm_bindings::KVM_MAX_MSR_ENTRIES)];
        let count = vcpu.set_msrs(&entries(chunk.iter().copied()).map_err(failed)?).map_err(failed)?;
        let mut next = count;
        if let Some(refused) = chunk.get(count) {
            if save_msrs(vcpu, &[refused.index]).map_err(failed)?.first().map(|msr| msr.data)
                != Some(refused.data)
            {
                return Err(RestoreStateError::Msr {
                    vcpu: index,
                    index: refused.index,
                    value: refused.data,
                });
            }
            next += 1;
        }
        rest = &rest[next..];
    }
    Ok(())
}

/// Makes sure that the hole that a snapshot was laid out around is this build's: a file says only how much RAM there is.
const _: () = assert!(layout::HOLE.start == 0xc000_0000 && layout::HOLE.end == 1 << 32);

#[cfg(test)]
mod tests {
    use super::*;

    fn msr(index: u32, data: u64) -> kvm_msr_entry {
        kvm_msr_entry { index, data, ..Default::default() }
    }

    #[test]
    fn a_deadline_that_has_passed_is_set_to_now() {
        let mut msrs = [msr(IA32_TSC_DEADLINE, 0), msr(IA32_TSC, 77)];
        fix_deadline(&mut msrs);
        assert_eq!(msrs[0].data, 77);
        let mut msrs = [msr(IA32_TSC_DEADLINE, 99), msr(IA32_TSC, 77)];
        fix_deadline(&mut msrs);
        assert_eq!(msrs[0].data, 99, "one that is to come stays");
    }
}
