#![allow(unsafe_code)] // KVM takes the address of guest memory
//! What a guest sees of memory that is discarded under it, in RAM that consists of files, as
//! after a restore. The VMM has no such RAM yet: this one is made here, around one vCPU.

#![allow(clippy::unwrap_used, clippy::expect_used)] // Helpers of tests fail as tests do.

use std::os::unix::fs::FileExt;

use kvm_bindings::{kvm_regs, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd};
use spore_vmm::memory::{Discard, GuestRam};
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemory, GuestMemoryRegion, GuestRegionMmap};

const SIZE: usize = 1 << 20;
const CODE: u64 = 0x1000;
const DATA: u64 = 0x2000;
/// `mov al, [0x2000]; out 0x10, al; jmp` back, for a CPU in real mode.
const PROGRAM: [u8; 7] = [0xa0, 0x00, 0x20, 0xe6, 0x10, 0xeb, 0xf9];
/// What the file holds.
const OLD: u8 = 0x5a;

/// The byte at [`DATA`] as the guest reads it.
fn guest_reads(vcpu: &mut VcpuFd) -> u8 {
    match vcpu.run().unwrap() {
        VcpuExit::IoOut(0x10, data) => data[0],
        other => panic!("{other:?}"),
    }
}

#[test]
fn the_guest_reads_zeroes_where_a_file_was_discarded() {
    let file = tempfile::tempfile().unwrap();
    file.write_all_at(&vec![OLD; SIZE], 0).unwrap();
    file.write_all_at(&PROGRAM, CODE).unwrap();
    let region = MmapRegionBuilder::new(SIZE)
        .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
        .with_mmap_flags(libc::MAP_PRIVATE | libc::MAP_NORESERVE)
        .with_file_offset(FileOffset::new(file, 0))
        .build()
        .unwrap();
    let ram = GuestRam::from_regions(vec![GuestRegionMmap::new(region, GuestAddress(0)).unwrap()]).unwrap();
    let host = ram.iter().next().unwrap();

    let vm = Kvm::new().unwrap().create_vm().unwrap();
    let slot = kvm_userspace_memory_region {
        slot: 0,
        flags: 0,
        guest_phys_addr: 0,
        memory_size: host.len(),
        userspace_addr: host.as_ptr() as u64,
    };
    // SAFETY: `ram` outlives the vCPU, which runs on this thread only.
    unsafe { vm.set_user_memory_region(slot) }.unwrap();
    let mut vcpu = vm.create_vcpu(0).unwrap();
    let mut segments = vcpu.get_sregs().unwrap();
    (segments.cs.base, segments.cs.selector) = (0, 0);
    vcpu.set_sregs(&segments).unwrap();
    vcpu.set_regs(&kvm_regs { rip: CODE, rflags: 2, ..Default::default() }).unwrap();

    let mut discard = Discard::new(&ram);
    assert_eq!(guest_reads(&mut vcpu), OLD);
    for written in [0x77, 0x33] {
        ram.write_obj(written, GuestAddress(DATA)).unwrap();
        assert_eq!(guest_reads(&mut vcpu), written);
        assert_eq!(discard.discard(DATA..DATA + 0x1000).unwrap(), 0x1000);
        assert_eq!(guest_reads(&mut vcpu), 0, "neither what was written nor the file's byte");
    }
}
