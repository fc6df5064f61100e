#![allow(unsafe_code)] // fork(2) and memory slots of KVM, which have no safe interface
//! What the kernel alone takes for the steps that snapshots and restores stand on, in this process: the references.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::{Kvm, VmFd};
use nix::sys::wait::waitpid;
use nix::unistd::{ForkResult, fork};
use vm_memory::mmap::{MmapRegion, MmapRegionBuilder};

const PAGE: usize = 4096;
/// Guest memory continues behind a hole for devices.
const HOLE: std::ops::Range<u64> = 3 << 30..4 << 30;

/// Memory as a guest's: private, anonymous, of which a part has been written.
pub(super) struct Memory(MmapRegion);

impl Memory {
    pub(super) fn new(mib: u64, written_mib: u64, huge_pages: bool) -> Result<Self> {
        let region = MmapRegionBuilder::new(usize::try_from(mib << 20)?)
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            .with_mmap_flags(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE)
            .build()
            .context("map memory")?;
        if huge_pages {
            // SAFETY: the mapping made above; no content changes.
            let advised =
                unsafe { libc::madvise(region.as_ptr().cast(), region.size(), libc::MADV_HUGEPAGE) };
            ensure!(advised == 0, "MADV_HUGEPAGE: {}", std::io::Error::last_os_error());
        }
        for at in (0..usize::try_from(written_mib << 20)?).step_by(PAGE) {
            // SAFETY: inside the mapping, of which nobody else knows.
            unsafe { region.as_ptr().add(at).write_volatile(1) };
        }
        Ok(Self(region))
    }

    /// fork(2) of this process, with the memory, by a parent that does nothing else.
    pub(super) fn fork(&self) -> Result<Duration> {
        let begun = Instant::now();
        // SAFETY: the child makes one system call, which ends it.
        match unsafe { fork() }.context("fork")? {
            ForkResult::Child => {
                // SAFETY: runs nothing of this process's.
                unsafe { libc::_exit(0) }
            }
            ForkResult::Parent { child } => {
                let time = begun.elapsed();
                waitpid(child, None).context("wait for a child")?;
                Ok(time)
            }
        }
    }

    /// So many forks and VMs of KVM's, one after the other: what each pair takes, without the VM's end. None is alive when the next is
    /// made, for KVM follows a fork in every VM that has the memory.
    pub(super) fn fork_and_build(&self, count: u32) -> Result<Duration> {
        let mut all = Duration::ZERO;
        for _ in 0..count {
            let begun = Instant::now();
            self.fork()?;
            let made = self.machine()?;
            all += begun.elapsed();
            drop(made);
        }
        Ok(all / count)
    }

    /// A VM of KVM's with this memory and one vCPU, and what its memory slots took alone.
    pub(super) fn machine(&self) -> Result<(VmFd, Duration)> {
        let kvm = Kvm::new().context("open /dev/kvm")?;
        let vm = kvm.create_vm().context("KVM_CREATE_VM")?;
        let begun = Instant::now();
        let size = self.0.size() as u64;
        let address = self.0.as_ptr() as u64;
        let low = size.min(HOLE.start);
        let slots = [(0, low, address), (HOLE.end, size - low, address + low)];
        for (slot, (guest_phys_addr, memory_size, userspace_addr)) in (0..).zip(slots) {
            if memory_size > 0 {
                let flags = 0;
                let region =
                    kvm_userspace_memory_region { slot, flags, guest_phys_addr, memory_size, userspace_addr };
                // SAFETY: the mapping outlives the VM, which never runs.
                unsafe { vm.set_user_memory_region(region) }.context("KVM_SET_USER_MEMORY_REGION")?;
            }
        }
        let time = begun.elapsed();
        vm.create_vcpu(0).context("KVM_CREATE_VCPU")?;
        Ok((vm, time))
    }
}
