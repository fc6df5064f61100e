//! Memory that a guest gives back leaves the VMM, and comes back as zeroes when it is used.

#![allow(clippy::unwrap_used, clippy::expect_used)] // Helpers of tests fail as tests do.

use spore_native::process::resident_anonymous;
use spore_native::{Setup, Vm};
use spore_vmm::api::{BalloonMetrics, Call, FailureCode, Reply};

/// What the guest dirties, in MiB.
const DIRTY: u64 = 64;
const MEMORY: u64 = 128;
const KIB: u64 = 1024;

/// A guest that obeys commands and has dirtied memory; what the VMM held before, in KiB.
fn dirtied() -> (Vm, u64) {
    let mut vm = Setup::new("shell").memory_mib(MEMORY).boot();
    // The devices' rings and buffers are made before the comparison begins.
    assert!(vm.run("report,0").contains("ok report"));
    let before = resident(&vm);
    dirty(&mut vm, before);
    (vm, before)
}

fn dirty(vm: &mut Vm, before: u64) {
    assert!(vm.run(&format!("dirty,{DIRTY},1")).contains("ok dirty"));
    let full = resident(vm);
    assert!(full >= before + DIRTY * KIB, "{before} KiB before, {full} full");
}

fn resident(vm: &Vm) -> u64 {
    resident_anonymous(vm.pid()).unwrap()
}

fn balloon(vm: &mut Vm) -> BalloonMetrics {
    vm.metrics().balloon
}

#[test]
fn reported_memory_leaves_the_vmm() {
    let (mut vm, before) = dirtied();
    for round in 1..=3 {
        assert!(vm.run(&format!("report,{DIRTY}")).contains("ok report"));
        let after = resident(&vm);
        println!("{before} KiB before {DIRTY} MiB were dirtied, {after} after they were reported");
        assert!(after <= before + KIB, "round {round}: {before} KiB before, {after} after");
        assert_eq!(balloon(&mut vm).reported_bytes, round * (DIRTY << 20));
        assert!(vm.run(&format!("zeroes,{DIRTY}")).contains("ok zeroes"));
        dirty(&mut vm, before);
    }
}

#[test]
fn the_balloon_follows_its_target() {
    let (mut vm, before) = dirtied();
    assert_eq!(vm.call(Call::SetBalloon { target_mib: DIRTY }), Ok(Reply::Done));
    assert!(vm.run("inflate,0").contains("ok inflate"));
    let after = resident(&vm);
    assert!(after <= before + KIB, "{before} KiB before, {after} after");
    let told = balloon(&mut vm);
    assert_eq!((told.target_bytes, told.actual_bytes), (DIRTY << 20, DIRTY << 20));
    assert_eq!((told.inflated_bytes, told.reported_bytes), (DIRTY << 20, 0));

    assert_eq!(vm.call(Call::SetBalloon { target_mib: 0 }), Ok(Reply::Done));
    assert!(vm.run(&format!("deflate,{DIRTY}")).contains("ok deflate"));
    assert!(vm.run(&format!("zeroes,{DIRTY}")).contains("ok zeroes"));
    dirty(&mut vm, before);
    let told = balloon(&mut vm);
    assert_eq!((told.target_bytes, told.actual_bytes), (0, 0));
}

#[test]
fn a_target_leaves_the_guest_what_it_needs() {
    let mut vm = Vm::spawn();
    let early = vm.call(Call::SetBalloon { target_mib: 0 }).unwrap_err();
    assert_eq!(early.code, FailureCode::WrongState, "{early}");
    vm.configure(Setup::new("spin").memory_mib(MEMORY)).unwrap();
    assert_eq!(vm.call(Call::SetBalloon { target_mib: MEMORY - 64 }), Ok(Reply::Done));
    vm.boot();
    for target_mib in [MEMORY - 63, MEMORY, u64::MAX] {
        let refused = vm.call(Call::SetBalloon { target_mib }).unwrap_err();
        assert_eq!(refused.code, FailureCode::InvalidArgument);
        assert!(refused.message.contains("at most 64 can be given up"), "{refused}");
    }
    assert_eq!(balloon(&mut vm).target_bytes, (MEMORY - 64) << 20, "as it was");
}
