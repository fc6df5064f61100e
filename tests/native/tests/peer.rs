//! When the peer goes, the VMM goes; when the VMM goes, nothing stays.

#![allow(clippy::unwrap_used, clippy::expect_used)] // Helpers of tests fail as tests do.

use std::fs;
use std::io::Read;
use std::os::unix::process::ExitStatusExt;

use spore_guests::port;
use spore_native::control::Received;
use spore_native::{DEADLINE, Setup, Vm, disk_file, vsock};
use spore_vmm::api::Call;

/// Closes the control socket and waits for the process.
fn hang_up(mut vm: Vm, when: &str) {
    vm.control = None;
    let status = vm.exit_status();
    assert!(status.code().is_some(), "{when}: the VMM died by {status}");
}

#[test]
fn a_vmm_ends_when_its_peer_hangs_up_whatever_it_does() {
    hang_up(Vm::spawn(), "before Configure");
    hang_up(Setup::new("spin").configure(), "configured");
    for script in ["spin", "hang", "flood,1000000000"] {
        let vm = Setup::new(script).vcpus(4).boot();
        vm.line("guest: up");
        hang_up(vm, script);
    }
    let mut vm = Setup::new("spin").boot();
    vm.call(Call::Pause).unwrap();
    hang_up(vm, "paused");
    let mut vm = Setup::new("hang").boot();
    vm.call(Call::Shutdown { deadline_ms: 600_000 }).unwrap();
    hang_up(vm, "shutting down");
}

/// A hang-up right behind requests that nobody will read the answers of.
#[test]
fn a_peer_that_hangs_up_with_requests_under_way() {
    let mut vm = Setup::new("spin").boot();
    for _ in 0..20 {
        vm.send(Call::Pause, &[]);
        vm.send(Call::Resume, &[]);
        vm.send(Call::Metrics, &[]);
    }
    hang_up(vm, "requests under way");
}

/// Lines of `/proc/mounts`, and processes whose parent is `pid`.
fn mounts() -> String {
    fs::read_to_string("/proc/self/mounts").unwrap()
}

fn children(pid: u32) -> String {
    fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default()
}

#[test]
fn a_vmm_killed_by_force_leaves_nothing() {
    let mounts_before = mounts();
    let mut vm = Setup::new("serve").vsock(&[]).disk(disk_file(8), false).vcpus(2).boot();
    vm.line("serving");
    let mut stream = vsock::connect(&vm.vsock_path(), port::ECHO).unwrap();
    assert_eq!(children(vm.pid()), "", "the VMM starts no process");
    let pid = vm.pid();
    vm.kill();
    assert_eq!(vm.exit_status().signal(), Some(9));
    assert!(!fs::exists(format!("/proc/{pid}")).unwrap());
    // The connection and the control socket end; nobody else holds them.
    assert_eq!(stream.read(&mut [0; 16]).unwrap_or(0), 0);
    let control = vm.control.as_ref().unwrap();
    assert!(matches!(control.receive(DEADLINE).unwrap(), Received::Closed));
    assert_eq!(mounts(), mounts_before);
    let folder = vm.vsock_path();
    let left: Vec<_> = fs::read_dir(folder.parent().unwrap())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name != "vmm.log" && name != "vsock.sock")
        .collect();
    assert_eq!(left, Vec::<String>::new(), "files that the test did not make");
}

/// The VMM opens nothing by path: after Configure it holds what it was given and what KVM
/// and the kernel made for it.
#[test]
fn a_vmm_opens_nothing_by_path() {
    let mut vm = Setup::new("spin").vsock(&[]).disk(disk_file(8), true).boot();
    vm.line("guest: up");
    let log = vm.vsock_path().with_file_name("vmm.log").to_string_lossy().into_owned();
    for name in spore_native::process::descriptors(vm.pid()).unwrap() {
        let known = ["socket:", "pipe:", "anon_inode:"].iter().any(|kind| name.starts_with(kind))
            || name == "/dev/kvm"
            || name == "/dev/null"
            || name == log
            || name.ends_with(" (deleted)");
        assert!(known, "an open {name}");
    }
    vm.state();
}
