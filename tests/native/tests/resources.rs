//! What a VMM holds: descriptors, threads, memory.

#![allow(clippy::unwrap_used, clippy::expect_used)] // Helpers of tests fail as tests do.

use std::fs;

use spore_guests::{pattern_bytes, port};
use spore_native::process::{descriptors, resident_beyond_guest};
use spore_native::vsock::{connect, exchange};
use spore_native::{Setup, disk_file};
use spore_vmm::api::{Call, FailureCode, Reply};

#[test]
fn attaching_leaks_no_descriptor() {
    let mut vm = Setup::new("spin").boot();
    let before = descriptors(vm.pid()).unwrap().len();
    for _ in 0..12 {
        vm.attach(&disk_file(1), true).unwrap();
    }
    let attached = descriptors(vm.pid()).unwrap().len();
    assert_eq!(attached, before + 12, "one descriptor a disk");
    for _ in 0..100 {
        assert_eq!(vm.attach(&disk_file(1), true).unwrap_err().code, FailureCode::Exhausted);
    }
    assert_eq!(descriptors(vm.pid()).unwrap().len(), attached);
}

#[test]
fn pausing_leaks_nothing() {
    let mut vm = Setup::new("spin").vcpus(2).boot();
    let look = |pid: u32| {
        let threads = fs::read_dir(format!("/proc/{pid}/task")).unwrap().count();
        (threads, descriptors(pid).unwrap().len())
    };
    // KVM adds a thread of its own when the guest first runs.
    vm.line("guest: up");
    let before = look(vm.pid());
    for _ in 0..100 {
        assert_eq!(vm.call(Call::Pause), Ok(Reply::Done));
        assert_eq!(vm.call(Call::Resume), Ok(Reply::Done));
    }
    assert_eq!(look(vm.pid()), before);
    println!("threads and descriptors of a VMM with 2 vCPUs: {before:?}");
}

/// Printed, not asserted: the figure depends on the host's C library and page cache.
#[test]
fn resident_memory_beyond_the_guest_is_printed() {
    for (vcpus, mib) in [(1, 128), (4, 512)] {
        let setup = Setup::new("serve").vcpus(vcpus).memory_mib(mib).vsock(&[]).disk(disk_file(8), false);
        let vm = setup.boot();
        vm.line("serving");
        let idle = resident_beyond_guest(vm.pid(), mib).unwrap();
        let data = pattern_bytes(1, 0, 8 << 20);
        let stream = connect(&vm.vsock_path(), port::ECHO).unwrap();
        assert!(exchange(&stream, &data).unwrap() == data);
        let busy = resident_beyond_guest(vm.pid(), mib).unwrap();
        println!(
            "VMM, {vcpus} vCPUs, {mib} MiB: {idle} KiB resident beyond the guest, {busy} after 8 MiB of echo"
        );
    }
}
