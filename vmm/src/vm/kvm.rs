#![allow(unsafe_code)] // KVM takes host addresses and owns a descriptor by number
//! The few KVM calls whose safety rests on guest memory staying mapped.

use std::os::fd::FromRawFd;

use kvm_bindings::{kvm_run, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};

use crate::config::KvmFd;
use crate::memory::{self, GuestRam};

/// The KVM system handle on a descriptor that we were given.
pub(super) fn open(fd: KvmFd) -> Kvm {
    // SAFETY: `KvmFd` owns an open descriptor and gives it up here. Whether it is /dev/kvm is
    // found out by its answers: ioctls on anything else fail.
    unsafe { Kvm::from_raw_fd(fd.into_raw_fd()) }
}

/// Keeps a vCPU's run page, of `size` bytes, out of processes that this one forks: a mapping there would hold the
/// vCPU's file, and with it the VM, for as long as they live.
pub(super) fn keep_out_of_forks(vcpu: &mut VcpuFd, size: usize) {
    let page: *mut kvm_run = vcpu.get_kvm_run();
    // SAFETY: the mapping of this vCPU, of which KVM told the size; MADV_DONTFORK changes nothing in this process.
    if unsafe { libc::madvise(page.cast(), size, libc::MADV_DONTFORK) } != 0 {
        let error = std::io::Error::last_os_error();
        crate::log::warn(
            "vm",
            format_args!("a snapshot's writer will hold on to this VM: MADV_DONTFORK: {error}"),
        );
    }
}

/// Registers all RAM. The caller keeps `ram` alive for as long as vCPUs of `vm` can run.
pub(super) fn register_ram(vm: &VmFd, ram: &GuestRam) -> Result<(), kvm_ioctls::Error> {
    for (slot, run) in (0..).zip(memory::slots(ram)) {
        let region = kvm_userspace_memory_region {
            slot,
            flags: 0,
            guest_phys_addr: run.start.0,
            memory_size: run.size,
            userspace_addr: run.host_address,
        };
        // SAFETY: the range is a whole mapping of `ram`, which `Vm` holds until its vCPUs have
        // stopped; regions of one GuestRam do not overlap.
        unsafe { vm.set_user_memory_region(region) }?;
    }
    Ok(())
}
