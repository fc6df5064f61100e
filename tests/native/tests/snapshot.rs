//! A live snapshot is the VM at one moment: its copy goes on from there, and the VM does as if nothing had been.

#![allow(clippy::unwrap_used, clippy::expect_used)] // Helpers of tests fail as tests do.

use std::fs;

use spore_native::{DEADLINE, Setup, Vm};
use spore_vmm::api::{Call, Reply, SnapshotReport, VmState};

/// All that a guest which counts has ever said, up to `bytes` bytes or a little more.
fn counted(bytes: usize) -> String {
    let mut text = "guest: up\n".to_owned();
    for number in 0.. {
        if text.len() >= bytes {
            break;
        }
        text.push_str(&format!("count {number}\n"));
    }
    text
}

/// Waits until `vm` has said `bytes` bytes.
fn said(vm: &Vm, bytes: usize) -> String {
    let console = vm.console.as_ref().unwrap();
    console.wait(DEADLINE, |text| (text.len() >= bytes).then(|| text.to_owned())).unwrap()
}

#[test]
fn a_copy_goes_on_exactly_where_its_source_was() {
    let mut vm = Setup::new("count").boot();
    let before = said(&vm, 500).len();
    let pending = vm.begin_snapshot("a", &[]).unwrap();
    println!("{:?}", pending.times);
    assert_eq!(vm.state(), VmState::Running);
    let after = vm.console.as_ref().unwrap().text().len();
    let saved = pending.saved();
    let copy = saved.restore().run();
    let text = said(&copy, 500);
    let source = said(&vm, after + 1000);
    assert!(counted(source.len()).starts_with(&source), "the source counts on as if nothing had been");
    let all = counted(after + text.len() + 100);
    // What it had said by then may still have been in the pipe.
    let moments: Vec<usize> = (before..=after + 64 * 1024)
        .take_while(|at| at + text.len() <= all.len())
        .filter(|at| all[*at..].starts_with(&text))
        .collect();
    assert_eq!(moments.len(), 1, "between byte {before} and {after}; the copy: {text:?}");
}

#[test]
fn vector_registers_survive() {
    let mut vm = Setup::new("shell").boot();
    vm.begin("vector");
    vm.console.as_ref().unwrap().wait(DEADLINE, |text| text.contains('!').then_some(())).unwrap();
    let saved = vm.snapshot("a", &[]);
    for vm in [&mut vm, &mut saved.restore().run()] {
        vm.type_in("\n");
        // The source's line begins with the sign.
        let done = |text: &str| text.contains("ok vector\n").then_some(());
        vm.console.as_ref().unwrap().wait(DEADLINE, done).expect("the registers are as they were");
    }
}

#[test]
fn a_paused_vm_stays_paused() {
    let mut vm = Setup::new("count").boot();
    said(&vm, 100);
    assert_eq!(vm.call(Call::Pause), Ok(Reply::Done));
    let saved = vm.snapshot("a", &[]);
    assert_eq!(vm.state(), VmState::Paused);
    let mut copy = saved.restore().paused();
    assert_eq!(copy.state(), VmState::Paused);
    assert_eq!(copy.console.as_ref().unwrap().text(), "");
    assert_eq!(copy.call(Call::Resume), Ok(Reply::Done));
    said(&copy, 100);
}

#[test]
fn every_processor_is_saved() {
    let mut vm = Setup::new("shell").vcpus(4).boot();
    assert!(vm.run("smp,4").contains("online=4\n"));
    let saved = vm.snapshot("a", &[]);
    let mut copy = saved.restore().run();
    assert!(copy.run("hello").contains("ok hello"));
    assert!(vm.run("hello").contains("ok hello"));
}

#[test]
fn many_copies_come_of_one_snapshot() {
    let mut vm = Setup::new("shell").memory_mib(256).boot();
    assert!(vm.run("store,0,8,7").contains("ok store"));
    let saved = vm.snapshot("a", &[]);
    drop(vm);
    let mut copies: Vec<Vm> = (0..4).map(|_| saved.restore().run()).collect();
    for (seed, copy) in (100..).zip(&mut copies) {
        assert!(copy.run(&format!("store,0,4,{seed}")).contains("ok store"));
    }
    for (seed, copy) in (100..).zip(&mut copies) {
        assert!(copy.run("load,0,4").contains(&format!("seed={seed}\n")));
        assert!(copy.run("load,4,4").contains("seed=7\n"));
    }
}

/// What a process has written, to whatever: `wchar` of /proc/PID/io.
fn written_by(pid: u32) -> u64 {
    let io = fs::read_to_string(format!("/proc/{pid}/io")).unwrap();
    let line = io.lines().find_map(|line| line.strip_prefix("wchar: ")).unwrap();
    line.parse().unwrap()
}

#[test]
fn a_pause_writes_no_memory() {
    const MIB: u64 = 1 << 20;
    let mut vm = Setup::new("shell").memory_mib(256).boot();
    assert!(vm.run("store,0,64,7").contains("ok store"));
    let before = written_by(vm.pid());
    let pending = vm.begin_snapshot("a", &[]).unwrap();
    let after = written_by(vm.pid());
    println!("{:?}", pending.times);
    let saved = pending.saved();
    assert!(saved.done.memory_bytes >= 64 * MIB, "{:?}", saved.done);
    // Events and the answer.
    assert!(after - before < 16 * 1024, "the VMM wrote {} bytes in the pause", after - before);
}

#[test]
fn a_snapshot_outlives_its_vmm() {
    let mut vm = Setup::new("shell").boot();
    assert!(vm.run("store,0,8,9").contains("ok store"));
    let pending = vm.begin_snapshot("a", &[]).unwrap();
    vm.kill();
    let mut copy = pending.saved().restore().run();
    assert!(copy.run("load,0,8").contains("seed=9\n"));
}

#[test]
fn a_deadline_that_passes_is_reported_and_costs_the_vm_nothing() {
    let mut vm = Setup::new("shell").memory_mib(512).boot();
    assert!(vm.run("store,0,256,9").contains("ok store"));
    let (report, theirs) = std::io::pipe().unwrap();
    let mut pending = vm.begin_snapshot_with("a", &[], 1, (report, theirs.into())).unwrap();
    let report = pending.report();
    let Some(SnapshotReport::Failed(failure)) = report else { panic!("{report:?}") };
    assert!(failure.message.contains("not written within 1ms"), "{failure}");
    assert!(vm.run("load,0,256").contains("seed=9\n"));
}
