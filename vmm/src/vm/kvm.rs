#![allow(unsafe_code)] // KVM takes host addresses and owns a descriptor by number
//! The few KVM calls whose safety rests on guest memory staying mapped.

use std::os::fd::FromRawFd;

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::{Kvm, VmFd};

use crate::config::KvmFd;
use crate::memory::{self, GuestRam};

/// The KVM system handle on a descriptor that we were given.
pub(super) fn open(fd: KvmFd) -> Kvm {
    // SAFETY: `KvmFd` owns an open descriptor and gives it up here. Whether it is /dev/kvm is
    // found out by its answers: ioctls on anything else fail.
    unsafe { Kvm::from_raw_fd(fd.into_raw_fd()) }
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
