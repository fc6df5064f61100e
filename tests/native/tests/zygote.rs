//! Clones by zygote: each goes on from one moment of its source, with nothing written, and is a VM like others.

#![allow(clippy::unwrap_used, clippy::expect_used)] // Helpers of tests fail as tests do.

use std::fs::{self, File};
use std::os::fd::AsFd;

use spore_native::process::{descriptors, resident_anonymous};
use spore_native::{DEADLINE, Restore, Setup, Vm, Zygote, disk_file, empty_file};
use spore_vmm::api::{Call, EndReason, FailureCode, Reply, VmState};

fn clone_of(zygote: &mut Zygote) -> Vm {
    Restore::inherited().run_in(zygote.fork())
}

fn store(vm: &mut Vm, at: u64, mib: u64, seed: u64) {
    assert!(vm.run(&format!("store,{at},{mib},{seed}")).contains("ok store"));
}

/// That all of these MiB hold the pattern of one seed.
fn holds(vm: &mut Vm, at: u64, mib: u64, seed: u64) {
    let said = vm.run(&format!("load,{at},{mib}"));
    assert!(said.contains(&format!("seed={seed}\n")), "{said}");
}

fn done(vm: &mut Vm, command: &str) {
    let said = vm.run(command);
    assert!(said.contains("ok "), "{command}: {said}");
}

#[test]
fn clones_go_on_from_one_moment_and_are_each_other_s_strangers() {
    let mut source = Setup::new("shell").memory_mib(256).boot();
    store(&mut source, 0, 16, 7);
    let mut zygote = source.zygote("z", &[]).unwrap();
    assert_eq!(source.state(), VmState::Running);
    store(&mut source, 0, 16, 8);
    let mut clones: Vec<Vm> = (0..8).map(|_| clone_of(&mut zygote)).collect();
    drop(zygote);
    for (seed, clone) in (100..).zip(&mut clones) {
        holds(clone, 0, 16, 7);
        store(clone, 0, 4, seed);
    }
    for (seed, clone) in (100..).zip(&mut clones) {
        holds(clone, 0, 4, seed);
        holds(clone, 4, 12, 7);
    }
    holds(&mut source, 0, 16, 8);
}

#[test]
fn a_clone_s_processors_go_on_with_their_registers() {
    let mut source = Setup::new("shell").vcpus(4).boot();
    assert!(source.run("smp,4").contains("online=4\n"));
    source.begin("vector");
    let console = source.console.as_ref().unwrap();
    console.wait(DEADLINE, |text| text.contains('!').then_some(())).unwrap();
    let mut zygote = source.zygote("z", &[]).unwrap();
    for vm in [&mut source, &mut clone_of(&mut zygote)] {
        vm.type_in("\n");
        let right = |text: &str| text.contains("ok vector\n").then_some(());
        vm.console.as_ref().unwrap().wait(DEADLINE, right).expect("the registers are as they were");
    }
}

#[test]
fn a_clone_has_a_generation_of_its_own() {
    let mut source = Setup::new("generation").boot();
    let mut told = vec![source.line("generation ")];
    let mut zygote = source.zygote("z", &[]).unwrap();
    // It says the id again when it is told that it is another.
    told.extend((0..3).map(|_| clone_of(&mut zygote).line("generation ")));
    told.sort();
    told.dedup();
    assert_eq!(told.len(), 4, "{told:?}");
}

#[test]
fn a_zygote_outlives_its_source_and_a_clone_its_zygote() {
    let mut source = Setup::new("shell").boot();
    store(&mut source, 0, 8, 3);
    let mut zygote = source.zygote("z", &[]).unwrap();
    source.kill();
    let mut clone = clone_of(&mut zygote);
    drop(zygote);
    holds(&mut clone, 0, 8, 3);
    assert_eq!(clone.call(Call::Shutdown { deadline_ms: 0 }), Ok(Reply::Done));
    assert_eq!(clone.ended(), EndReason::Forced);
}

#[test]
fn a_clone_of_a_clone_has_what_both_wrote() {
    let mut source = Setup::new("shell").boot();
    store(&mut source, 0, 8, 1);
    let mut first = clone_of(&mut source.zygote("z", &[]).unwrap());
    store(&mut first, 2, 2, 2);
    let mut second = clone_of(&mut first.zygote("z", &[]).unwrap());
    store(&mut first, 0, 8, 9);
    holds(&mut second, 0, 2, 1);
    holds(&mut second, 2, 2, 2);
    holds(&mut second, 4, 4, 1);
}

#[test]
fn a_clone_s_snapshot_has_what_lies_below_too() {
    let mut vm = Setup::new("shell").memory_mib(128).boot();
    store(&mut vm, 0, 8, 1);
    let below = vm.snapshot("a", &[]);
    drop(vm);
    let mut source = below.restore().run();
    // Given back: it is zero, whatever the layer has there.
    done(&mut source, "report,1");
    store(&mut source, 2, 2, 2);
    let mut clone = clone_of(&mut source.zygote("z", &[]).unwrap());
    store(&mut clone, 4, 1, 3);
    let saved = clone.snapshot("b", &below.layers);
    // What the source wrote since it was restored, and the clone: not what the layer has.
    assert!((3 << 20..5 << 20).contains(&saved.done.memory_bytes), "{:?}", saved.done);
    let mut again = saved.restore().run();
    for (at, mib, seed) in [(0, 1, 0), (1, 1, 1), (2, 2, 2), (4, 1, 3), (5, 3, 1)] {
        holds(&mut again, at, mib, seed);
    }
}

#[test]
fn memory_and_disk_of_every_clone_are_of_one_instant() {
    const END: u64 = 1500;
    let raw = disk_file(1);
    let mut source = Setup::new("shell").disk(raw.try_clone().unwrap(), false).boot();
    source.begin(&format!("disk-count,rw0,0,{END}"));
    while source.metrics().blk[0].writes < 150 {}
    let next = empty_file();
    let mut zygote = source.zygote("z", &[("rw0", &next)]).unwrap();
    assert_eq!(zygote.disks.len(), 1);
    source.settled("z");
    assert!(source.metrics().blk[0].writes < END, "the zygote came too late to be mid-traffic");
    let files: Vec<File> = (0..3).map(|_| empty_file()).collect();
    let clone = |file| Restore::inherited().stack("rw0", &[&raw, file]).run_in(zygote.fork());
    let mut clones: Vec<Vm> = files.iter().map(clone).collect();
    for clone in &mut clones {
        let said = clone.finish_first();
        assert!(said.contains("ok disk-count"), "{said}");
    }
    assert!(source.finish().contains("ok disk-count"), "the source");
}

/// Bytes that a process has written, to whatever: `wchar` of /proc/PID/io.
fn written_by(pid: u32) -> u64 {
    let io = fs::read_to_string(format!("/proc/{pid}/io")).unwrap();
    io.lines().find_map(|line| line.strip_prefix("wchar: ")).unwrap().parse().unwrap()
}

#[test]
fn nothing_is_written_and_little_is_copied() {
    const MIB: u64 = 64;
    let mut source = Setup::new("shell").memory_mib(256).boot();
    store(&mut source, 0, MIB, 7);
    let before = written_by(source.pid());
    let mut zygote = source.zygote("z", &[]).unwrap();
    let clone = clone_of(&mut zygote);
    for (pid, from) in [(source.pid(), before), (zygote.times.pid, 0), (clone.pid(), 0)] {
        let written = written_by(pid) - from;
        // Answers, and lines of the log.
        assert!(written < 16 * 1024, "process {pid} wrote {written} bytes");
    }
    let smaps = fs::read_to_string(format!("/proc/{}/smaps_rollup", clone.pid())).unwrap();
    let line = smaps.lines().find_map(|line| line.strip_prefix("Private_Dirty:")).unwrap();
    let own: u64 = line.trim().trim_end_matches(" kB").parse().unwrap();
    let resident = resident_anonymous(clone.pid()).unwrap();
    println!("a clone of {MIB} MiB: {own} KiB its own, {resident} KiB resident");
    assert!(own < MIB * 1024 / 8, "{own} KiB of {MIB} MiB were copied");
}

#[test]
fn a_zygote_holds_its_socket_and_its_log_alone() {
    let disk = disk_file(1);
    let mut source = Setup::new("shell").vsock(&[]).disk(disk, false).boot();
    let next = empty_file();
    let mut zygote = source.zygote("z", &[("rw0", &next)]).unwrap();
    drop(zygote.fork());
    // It answers when it has closed what it gave away.
    let _ = zygote.call(Call::State, &[]);
    let names = descriptors(zygote.times.pid).unwrap();
    let files = names.iter().filter(|name| name.starts_with('/')).count();
    let sockets = names.iter().filter(|name| name.starts_with("socket:")).count();
    assert_eq!((files, sockets), (3, 1), "{names:?}");
    assert!(!names.iter().any(|name| name.contains("kvm")), "{names:?}");
}

#[test]
fn a_deadline_ends_the_zygote_and_nothing_else() {
    let mut source = Setup::new("shell").boot();
    done(&mut source, "hello");
    let mut zygote = source.zygote_until("z", &[], 4000).unwrap();
    let mut clone = clone_of(&mut zygote);
    zygote.closed();
    done(&mut clone, "hello");
    done(&mut source, "hello");
    assert_eq!(source.metrics().snapshots.failed, 0);
}

#[test]
fn copies_of_one_vm_are_bounded_and_a_zygote_s_end_makes_room() {
    let mut source = Setup::new("shell").boot();
    let mut zygotes: Vec<Zygote> = (0..4).map(|_| source.zygote("z", &[]).unwrap()).collect();
    let refused = source.zygote("z", &[]).map(drop).unwrap_err();
    assert_eq!(refused.code, FailureCode::Exhausted);
    assert!(refused.message.contains("4 copies of the VM are there already"), "{refused}");
    drop(zygotes.pop());
    while source.metrics().snapshots.writing > 3 {}
    source.zygote("z", &[]).map(drop).unwrap();
}

#[test]
fn what_cannot_be_is_refused_and_changes_nothing() {
    let mut source = Setup::new("shell").boot();
    store(&mut source, 0, 4, 5);
    let saved = source.snapshot("a", &[]);
    let mut zygote = source.zygote("z", &[]).unwrap();

    let plain = Vm::spawn().restore(Restore::inherited()).unwrap_err();
    assert_eq!(plain.code, FailureCode::BadSnapshot);
    assert!(plain.message.contains("no state file is given"), "{plain}");
    let both = zygote.fork().restore(saved.restore()).unwrap_err();
    assert!(both.message.contains("has a VM's memory already"), "{both}");
    let layers = Restore { state: None, ..saved.restore() };
    let layers = zygote.fork().restore(layers).unwrap_err();
    assert!(layers.message.contains("they belong to a state file"), "{layers}");
    let disk = Restore::inherited().disk("rw11", &empty_file());
    assert!(zygote.fork().restore(disk).is_err());

    let (plain, stream) = (disk_file(1), std::os::unix::net::UnixStream::pair().unwrap().0);
    let fork = Call::Fork(spore_vmm::api::ForkConfig {
        control: spore_vmm::api::FdIndex(0),
        log: spore_vmm::api::FdIndex(1),
    });
    for control in [plain.as_fd(), stream.as_fd()] {
        let (answer, fds) = zygote.call(fork.clone(), &[control, plain.as_fd()]);
        assert_eq!(answer.unwrap_err().code, FailureCode::InvalidArgument);
        assert!(fds.is_empty());
    }
    let (answer, _) = zygote.call(Call::Boot, &[]);
    assert!(answer.unwrap_err().message.contains("a zygote serves Fork alone"));
    let refused = source.call(Call::Fork(spore_vmm::api::ForkConfig {
        control: spore_vmm::api::FdIndex(0),
        log: spore_vmm::api::FdIndex(1),
    }));
    assert!(refused.is_err());
    holds(&mut clone_of(&mut zygote), 0, 4, 5);
    holds(&mut source, 0, 4, 5);
}

#[test]
fn a_zygote_of_a_paused_vm_leaves_it_paused() {
    let mut source = Setup::new("shell").boot();
    store(&mut source, 0, 4, 5);
    assert_eq!(source.call(Call::Pause), Ok(Reply::Done));
    let mut zygote = source.zygote("z", &[]).unwrap();
    assert_eq!(source.state(), VmState::Paused);
    holds(&mut clone_of(&mut zygote), 0, 4, 5);
}
