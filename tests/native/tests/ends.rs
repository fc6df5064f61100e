//! Why a guest ended, and what the VMM says about it.

#![allow(clippy::unwrap_used, clippy::expect_used)] // Helpers of tests fail as tests do.

use std::io::Read;

use spore_guests::{SOURCE_SEED, pattern_bytes, port};
use spore_native::Setup;
use spore_native::vsock::connect;
use spore_vmm::api::{Call, EndReason, Reply};

#[test]
fn power_off() {
    for vcpus in [1, 4] {
        let mut vm = Setup::new("off").vcpus(vcpus).boot();
        assert_eq!(vm.ended(), EndReason::Shutdown);
    }
}

#[test]
fn reset() {
    let mut vm = Setup::new("reset").boot();
    assert_eq!(vm.ended(), EndReason::Reset);
}

#[test]
fn triple_fault_comes_with_registers() {
    let mut vm = Setup::new("triple").vcpus(2).boot();
    match vm.ended() {
        EndReason::TripleFault { vcpu: 0, registers } => {
            assert!(registers.contains("rip"), "{registers}");
        }
        other => panic!("{other:?}"),
    }
}

/// The guest jumps into a device's registers at CPL0. No KVM can run that; what it makes of
/// it differs, but it must end and name the vCPU.
#[test]
fn running_nonsense_ends_with_a_diagnosis() {
    let mut vm = Setup::new("wild").boot();
    match vm.ended() {
        EndReason::InternalError { vcpu: Some(0), detail, registers: Some(registers) } => {
            assert!(!detail.is_empty());
            assert!(registers.contains("rip"), "{registers}");
        }
        EndReason::TripleFault { vcpu: 0, registers } => assert!(registers.contains("rip"), "{registers}"),
        other => panic!("{other:?}"),
    }
}

#[test]
fn the_power_button_reaches_the_guest() {
    let mut vm = Setup::new("button").vcpus(2).boot();
    vm.line("waiting");
    assert_eq!(vm.call(Call::Shutdown { deadline_ms: 600_000 }), Ok(Reply::Done));
    assert_eq!(vm.line("button"), "button");
    assert_eq!(vm.ended(), EndReason::Shutdown);
}

#[test]
fn a_guest_that_ignores_the_button_is_ended_at_the_deadline() {
    for script in ["hang", "spin"] {
        let mut vm = Setup::new(script).boot();
        vm.line("guest: up");
        assert_eq!(vm.call(Call::Shutdown { deadline_ms: 50 }), Ok(Reply::Done));
        assert_eq!(vm.ended(), EndReason::Forced, "{script}");
    }
}

#[test]
fn a_second_shutdown_cannot_be_later_than_the_first() {
    let mut vm = Setup::new("hang").boot();
    vm.line("guest: up");
    assert_eq!(vm.call(Call::Shutdown { deadline_ms: 600_000 }), Ok(Reply::Done));
    // A shim that lost patience asks again.
    assert_eq!(vm.call(Call::Shutdown { deadline_ms: 0 }), Ok(Reply::Done));
    assert_eq!(vm.ended(), EndReason::Forced);
}

#[test]
fn a_guest_that_ends_while_it_is_asked_to_still_says_how() {
    let mut vm = Setup::new("button;reset").boot();
    vm.line("waiting");
    assert_eq!(vm.call(Call::Shutdown { deadline_ms: 600_000 }), Ok(Reply::Done));
    assert_eq!(vm.ended(), EndReason::Reset);
}

/// What the guest had sent when it ended reaches the host, before the news of the end.
#[test]
fn the_last_bytes_arrive_after_the_end() {
    let mut vm = Setup::new("serve").memory_mib(128).vsock(&[]).boot();
    vm.line("serving");
    let mut stream = connect(&vm.vsock_path(), port::SOURCE).unwrap();
    // Nobody reads: the guest sends until its credit is used up, far more than the socket holds.
    let (mut sent, mut same) = (0, 0);
    while same < 200 {
        let now = vm.metrics().vsock.tx_bytes;
        same = if now == sent && now > 256 << 10 { same + 1 } else { 0 };
        sent = now;
    }
    let reader = std::thread::spawn(move || {
        let mut data = Vec::new();
        stream.read_to_end(&mut data).map(|_| data)
    });
    assert_eq!(vm.call(Call::Shutdown { deadline_ms: 0 }), Ok(Reply::Done));
    assert_eq!(vm.ended(), EndReason::Forced);
    let data = reader.join().unwrap().unwrap();
    assert!(data.len() as u64 >= sent, "{} of {sent} bytes", data.len());
    assert!(data == pattern_bytes(SOURCE_SEED, 0, data.len()));
}

/// A peer that does not read delays the end only so long.
#[test]
fn a_peer_that_does_not_read_cannot_hold_the_end_up() {
    let mut vm = Setup::new("serve").memory_mib(128).vsock(&[]).boot();
    vm.line("serving");
    let _stalled = connect(&vm.vsock_path(), port::SOURCE).unwrap();
    while vm.metrics().vsock.tx_bytes <= 256 << 10 {}
    // Its answer may be lost with the guest.
    drop(connect(&vm.vsock_path(), port::POWER_OFF));
    assert_eq!(vm.ended(), EndReason::Shutdown);
}
