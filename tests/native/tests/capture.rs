//! Disks that are captured while a guest works on them: what each layer holds, and what a kill leaves.

#![allow(clippy::unwrap_used, clippy::expect_used)] // Helpers of tests fail as tests do.

use std::fs::File;
use std::os::fd::AsFd;

use spore_guests::{checksum, pattern_bytes};
use spore_native::{Saved, Setup, Vm, disk_file, empty_file};
use spore_vmm::api::{Call, CapturedDisk, DiskConfig, Event, FailureCode, FdIndex, Reply, VmState};

const MIB: u64 = 32;

fn done(vm: &mut Vm, command: &str) -> String {
    let text = vm.run(command);
    let name = command.split(',').next().unwrap();
    assert!(text.contains(&format!("ok {name}\n")), "{command}: {text}");
    text.lines().find_map(|line| line.strip_prefix("sum=")).unwrap_or_default().to_owned()
}

/// Captures `rw0`; what it goes on in.
fn capture(vm: &mut Vm) -> File {
    let layer = empty_file();
    let _saved = vm.capture("a", &[("rw0", &layer)]);
    layer
}

/// The same guest on these layers, from the bottom up.
fn boot_on(layers: &[&File]) -> Vm {
    let mut vm = Setup::new("shell").boot();
    let (top, below) = layers.split_last().unwrap();
    let indices = (1u32..).take(below.len()).map(FdIndex).collect();
    let call = Call::AttachDisk(DiskConfig { file: FdIndex(0), read_only: false, below: indices });
    let fds: Vec<_> = [top].into_iter().chain(below).map(|file| file.as_fd()).collect();
    vm.call_with(call, &fds).unwrap();
    done(&mut vm, &format!("disk-wait,rw0,{}", MIB * 2048));
    vm
}

#[test]
fn every_layer_is_the_disk_as_it_was_then() {
    let raw = disk_file(MIB);
    let mut vm = Setup::new("shell").disk(raw.try_clone().unwrap(), false).boot();
    done(&mut vm, "disk-write,rw0,0,4096,1");
    let first = capture(&mut vm);
    // Parts of blocks, too: they are to be made whole from below.
    done(&mut vm, "disk-write,rw0,1001,50,2");
    let second = capture(&mut vm);
    done(&mut vm, "disk-write,rw0,0,65536,3");
    done(&mut vm, "disk-check,rw0,0,65536,3");
    // An end in order keeps what the guest did not flush.
    vm.call(Call::Shutdown { deadline_ms: 0 }).unwrap();
    vm.ended();
    let mut expected = pattern_bytes(1, 0, 4096 * 512);
    let mut vm = boot_on(&[&raw]);
    assert_eq!(done(&mut vm, "disk-sum,rw0,0,4096"), format!("{:016x}", checksum(&expected)));
    drop(vm);
    expected[1001 * 512..1051 * 512].copy_from_slice(&pattern_bytes(2, 1001 * 512, 50 * 512));
    let mut vm = boot_on(&[&raw, &first]);
    assert_eq!(done(&mut vm, "disk-sum,rw0,0,4096"), format!("{:016x}", checksum(&expected)));
    drop(vm);
    // The third was written and never flushed by the guest; nothing of it shows in those below.
    expected = pattern_bytes(3, 0, 65536 * 512);
    let mut vm = boot_on(&[&raw, &first, &second]);
    assert_eq!(done(&mut vm, "disk-sum,rw0,0,65536"), format!("{:016x}", checksum(&expected)));
}

#[test]
fn what_was_flushed_survives_a_kill_in_every_layer() {
    let raw = disk_file(MIB);
    let mut vm = Setup::new("shell").disk(raw.try_clone().unwrap(), false).boot();
    done(&mut vm, "disk-write,rw0,0,65536,1");
    let first = capture(&mut vm);
    done(&mut vm, "disk-write,rw0,8,1000,2");
    let second = capture(&mut vm);
    done(&mut vm, "disk-write,rw0,4096,1000,3");
    done(&mut vm, "disk-discard,rw0,8192,64");
    done(&mut vm, "disk-flush,rw0");
    vm.kill();
    let mut vm = boot_on(&[&raw, &first, &second]);
    let mut expected = pattern_bytes(1, 0, 65536 * 512);
    expected[8 * 512..1008 * 512].copy_from_slice(&pattern_bytes(2, 8 * 512, 1000 * 512));
    expected[4096 * 512..5096 * 512].copy_from_slice(&pattern_bytes(3, 4096 * 512, 1000 * 512));
    expected[8192 * 512..8256 * 512].fill(0);
    assert_eq!(done(&mut vm, "disk-sum,rw0,0,65536"), format!("{:016x}", checksum(&expected)));
}

#[test]
fn layers_are_merged_under_a_running_guest() {
    let raw = disk_file(MIB);
    let mut vm = Setup::new("shell").disk(raw.try_clone().unwrap(), false).boot();
    let mut layers = vec![raw];
    for seed in 1..=4u64 {
        layers.push(capture(&mut vm));
        done(&mut vm, &format!("disk-write,rw0,{},4096,{seed}", seed * 1000));
    }
    let sum = done(&mut vm, "disk-sum,rw0,0,65536");
    let merged = empty_file();
    let call = Call::MergeDisk { serial: "rw0".into(), first: 1, last: 3, file: FdIndex(0) };
    assert_eq!(vm.call_with(call.clone(), &[merged.as_fd()]), Ok(Reply::Done));
    done(&mut vm, "disk-check,rw0,4000,4096,4");
    assert_eq!(vm.event().0, Event::DiskMerged { serial: "rw0".into(), result: Ok(()) });
    assert_eq!(done(&mut vm, "disk-sum,rw0,0,65536"), sum);
    let refused = vm.call_with(call, &[empty_file().as_fd()]).unwrap_err();
    assert!(refused.message.contains("of this disk's 3"), "{refused}");
    done(&mut vm, "disk-flush,rw0");
    vm.kill();
    let mut vm = boot_on(&[&layers[0], &merged, &layers[4]]);
    assert_eq!(done(&mut vm, "disk-sum,rw0,0,65536"), sum);
}

#[test]
fn memory_and_disk_are_of_one_instant_in_every_copy() {
    // Copies are taken after one, two and three steps; the rest is room for a machine that is slow to take them.
    const STEP: u64 = 150;
    const END: u64 = 10 * STEP;
    let raw = disk_file(1);
    let mut vm = Setup::new("shell").disk(raw.try_clone().unwrap(), false).boot();
    vm.begin(&format!("disk-count,rw0,0,{END}"));
    let (mut layers, mut taken) = (vec![raw], Vec::new());
    for at in 1..=3 {
        while vm.metrics().blk[0].writes < at * STEP {}
        let next = empty_file();
        taken.push(vm.capture(&at.to_string(), &[("rw0", &next)]));
        layers.push(next);
    }
    assert!(vm.metrics().blk[0].writes < END, "the snapshots came too late to be mid-traffic");
    assert!(vm.finish().contains("ok disk-count"), "the source");
    let copy = |saved: &Saved, count: usize| {
        // It goes on in a file of its own, over those that were the disk's.
        let own = empty_file();
        let stack: Vec<&File> = layers[..count].iter().chain([&own]).collect();
        saved.restore().stack("rw0", &stack).run()
    };
    let mut copies: Vec<Vm> = (1..).zip(&taken).map(|(count, saved)| copy(saved, count)).collect();
    // Memory of one instant and a disk of another are told apart.
    let mut torn = copy(&taken[0], layers.len());
    for copy in &mut copies {
        assert!(copy.finish_first().contains("ok disk-count"));
        assert!(copy.metrics().blk[0].writes > 0, "it went on");
    }
    assert!(torn.finish_first().contains("memory and disk disagree"));
}

#[test]
fn a_copy_s_copy_has_the_layers_of_both() {
    let raw = disk_file(1);
    let mut vm = Setup::new("shell").disk(raw.try_clone().unwrap(), false).boot();
    done(&mut vm, "disk-count,rw0,0,3");
    let next = empty_file();
    let saved = vm.capture("a", &[("rw0", &next)]);
    done(&mut vm, "disk-count,rw0,3,9");
    let (first, second) = (empty_file(), empty_file());
    let mut copy = saved.restore().stack("rw0", &[&raw, &first]).run();
    done(&mut copy, "disk-count,rw0,3,5");
    let (report, theirs) = std::io::pipe().unwrap();
    let pending =
        copy.begin_capture("b", &saved.layers, 60_000, (report, theirs.into()), &[("rw0", &second)]).unwrap();
    assert_eq!(pending.disks, [CapturedDisk { serial: "rw0".into(), layers: 2 }]);
    copy.settled("b");
    done(&mut copy, "disk-count,rw0,5,6");
    let own = empty_file();
    let mut third = pending.saved().restore().stack("rw0", &[&raw, &first, &own]).run();
    done(&mut third, "disk-count,rw0,5,7");
    done(&mut vm, "disk-count,rw0,9,10");
}

#[test]
fn a_stack_is_attached_to_a_restored_guest() {
    let raw = disk_file(1);
    let mut vm = Setup::new("shell").disk(raw.try_clone().unwrap(), false).boot();
    done(&mut vm, "disk-count,rw0,0,3");
    let next = empty_file();
    let _saved = vm.capture("a", &[("rw0", &next)]);
    vm.kill();
    // As a container's own disk comes to a guest out of a template.
    let mut booted = Setup::new("shell").boot();
    done(&mut booted, "cmdline");
    let template = booted.snapshot("t", &[]);
    let mut copy = template.restore().paused();
    let call = Call::AttachDisk(DiskConfig { file: FdIndex(0), read_only: false, below: vec![FdIndex(1)] });
    copy.call_with(call, &[next.as_fd(), raw.as_fd()]).unwrap();
    assert_eq!(copy.call(Call::Resume), Ok(Reply::Done));
    done(&mut copy, "disk-wait,rw0,2048");
    done(&mut copy, "disk-count,rw0,3,4");
}

#[test]
fn a_guest_s_end_leaves_captured_disks_settled() {
    let raw = disk_file(MIB);
    let mut vm = Setup::new("shell").disk(raw.try_clone().unwrap(), false).boot();
    done(&mut vm, "disk-write,rw0,0,65536,1");
    let next = empty_file();
    let (report, theirs) = std::io::pipe().unwrap();
    let pending = vm.begin_capture("a", &[], 60_000, (report, theirs.into()), &[("rw0", &next)]).unwrap();
    vm.call(Call::Shutdown { deadline_ms: 0 }).unwrap();
    vm.settled("a");
    vm.ended();
    let mut copy = pending.saved().restore().stack("rw0", &[&raw, &empty_file()]).run();
    done(&mut copy, "disk-check,rw0,0,65536,1");
}

#[test]
fn a_capture_is_of_all_disks_or_of_none() {
    let disks = [disk_file(1), disk_file(1)];
    let mut setup = Setup::new("shell");
    for disk in &disks {
        setup = setup.disk(disk.try_clone().unwrap(), false);
    }
    let mut vm = setup.boot();
    let mut refused = |files: &[(&str, &File)]| {
        let (report, theirs) = std::io::pipe().unwrap();
        let failure =
            vm.begin_capture("a", &[], 60_000, (report, theirs.into()), files).map(drop).unwrap_err();
        assert_eq!(vm.state(), VmState::Running);
        assert_eq!(vm.metrics().snapshots.taken, 0);
        (failure.code, failure.message)
    };
    let (first, second) = (empty_file(), empty_file());
    let (code, said) = refused(&[("rw0", &first)]);
    assert!(code == FailureCode::WrongState && said.contains("disk rw1 has no file"), "{said}");
    for (files, expected) in [
        ([("rw0", &empty_file()), ("rw7", &second)], "no writable disk in a slot \"rw7\""),
        ([("rw0", &empty_file()), ("ro0", &second)], "no writable disk in a slot \"ro0\""),
        ([("rw0", &empty_file()), ("rw0", &second)], "given twice"),
        ([("rw0", &empty_file()), ("rw1", &disks[0])], "bytes long"),
    ] {
        let (code, said) = refused(&files);
        assert!(code == FailureCode::InvalidArgument && said.contains(expected), "{said}");
    }
    done(&mut vm, "disk-write,rw1,0,2048,5");
    vm.kill();
    // Nothing was switched: what was written is in the files that the disks had.
    let mut vm = boot_with(&disks[1]);
    done(&mut vm, "disk-check,rw0,0,2048,5");
}

fn boot_with(raw: &File) -> Vm {
    Setup::new("shell").disk(raw.try_clone().unwrap(), false).boot()
}
