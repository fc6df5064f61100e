//! Devices in a snapshot: mid-traffic, and with what the host gives them anew.

#![allow(clippy::unwrap_used, clippy::expect_used)] // Helpers of tests fail as tests do.

use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::fs::FileExt;

use spore_guests::{pattern_bytes, port};
use spore_native::vsock::{connect, exchange};
use spore_native::{DEADLINE, Setup, Vm, disk_file, empty_file};
use spore_vmm::api::{BlkMetrics, Call, Reply};

fn content(file: &File) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(file.metadata().unwrap().len()).unwrap()];
    file.read_exact_at(&mut bytes, 0).unwrap();
    bytes
}

fn written(vm: &mut Vm) -> u64 {
    vm.metrics().blk.first().map_or(0, |BlkMetrics { written_bytes, .. }| *written_bytes)
}

#[test]
fn a_disk_that_is_being_written_is_written_to_the_end_by_source_and_copy() {
    const MIB: u64 = 32;
    let disk = disk_file(MIB);
    let mut vm = Setup::new("shell").disk(disk.try_clone().unwrap(), false).boot();
    vm.begin(&format!("disk-fill,rw0,0,{},4", MIB * 2048));
    while written(&mut vm) < 1 << 20 {
        assert!(vm.metrics().blk.len() == 1);
    }
    let saved = vm.capture("a", &[("rw0", &empty_file())]);
    assert!(written(&mut vm) < MIB << 20, "the snapshot came too late to be mid-traffic");
    let mut copy = saved.restore().stack("rw0", &[&disk, &empty_file()]).run();
    vm.finish();
    copy.finish_first();
    for vm in [&mut vm, &mut copy] {
        assert!(vm.run(&format!("disk-check,rw0,0,{},4", MIB * 2048)).contains("ok disk-check"));
    }
}

#[test]
fn an_empty_slot_takes_a_disk_after_the_restore() {
    let mut vm = Setup::new("shell").boot();
    assert!(vm.run("disks").contains("disk rw0 slot=14 sectors=0"));
    let saved = vm.snapshot("a", &[]);
    let disk = disk_file(1);
    let mut copy = saved.restore().paused();
    assert_eq!(copy.attach(&disk, false), Ok("rw0".to_owned()));
    assert_eq!(copy.call(Call::Resume), Ok(Reply::Done));
    assert!(copy.run("disk-wait,rw0,2048").contains("ok disk-wait"));
    assert!(copy.run("disk-fill,rw0,0,2048,9").contains("ok disk-fill"));
    assert!(content(&disk) == pattern_bytes(9, 0, 1 << 20));
}

#[test]
fn a_guest_s_socket_services_answer_in_the_copy() {
    let mut vm = Setup::new("serve").vsock(&[]).boot();
    vm.line("serving");
    let mut open = connect(&vm.vsock_path(), port::ECHO).unwrap();
    open.write_all(b"before").unwrap();
    let mut back = [0; 6];
    open.read_exact(&mut back).unwrap();
    let saved = vm.snapshot("a", &[]);
    let copy = saved.restore().vsock().run();
    assert_eq!(copy.line("vsock event"), "vsock event 0", "TRANSPORT_RESET");
    // The source's connection goes on; the copy has none of it, and takes new ones.
    assert_eq!(exchange(&open, b"after").unwrap(), b"after");
    let fresh = connect(&copy.vsock_path(), port::ECHO).unwrap();
    assert_eq!(exchange(&fresh, b"anew").unwrap(), b"anew");
}

#[test]
fn the_balloon_goes_on_as_it_was() {
    let mut vm = Setup::new("shell").memory_mib(128).boot();
    assert_eq!(vm.call(Call::SetBalloon { target_mib: 16 }), Ok(Reply::Done));
    assert!(vm.run("inflate,0").contains("ok inflate"));
    let saved = vm.snapshot("a", &[]);
    let mut copy = saved.restore().run();
    let told = copy.metrics().balloon;
    assert_eq!((told.target_bytes, told.actual_bytes), (16 << 20, 16 << 20));
    assert!(copy.run("zeroes,16").contains("ok zeroes"));
    assert!(copy.run("deflate,16").contains("ok deflate"));
    assert_eq!(copy.metrics().balloon.actual_bytes, 0);
}

#[test]
fn bytes_that_wait_for_the_guest_wait_in_the_copy() {
    let mut vm = Setup::new("shell").boot();
    vm.line("ready");
    assert_eq!(vm.call(Call::Pause), Ok(Reply::Done));
    vm.type_in("hello\n");
    let saved = vm.snapshot("a", &[]);
    assert_eq!(vm.call(Call::Resume), Ok(Reply::Done));
    vm.line("ok hello");
    let mut copy = saved.restore().run();
    // What was not the guest's yet at the moment of the snapshot is the source's alone.
    assert!(copy.run("cmdline").contains("ok cmdline"));
    let text = copy.console.as_ref().unwrap().wait(DEADLINE, |text| Some(text.to_owned())).unwrap();
    assert!(!text.contains("ok hello"), "{text}");
}

#[test]
fn a_machine_that_had_a_file_server_goes_on_with_another_only() {
    let mut vm = Setup::new("shell").filesystem("volumes").boot();
    vm.line("ready");
    let without = vm.snapshot("a", &[]);
    let _server = vm.attach_filesystem().unwrap();
    let with = vm.snapshot("b", &[]);
    assert!(without.restore().run().run("cmdline").contains("ok cmdline"));
    let mut copy = with.restore().paused();
    let refused = copy.call(Call::Resume).unwrap_err();
    assert!(refused.message.contains("attach one first"), "{}", refused.message);
    let _another = copy.attach_filesystem().unwrap();
    assert_eq!(copy.call(Call::Resume), Ok(Reply::Done));
    assert!(copy.run("cmdline").contains("ok cmdline"));
}
