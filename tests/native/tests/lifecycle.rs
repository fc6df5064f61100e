//! A VM's life, call by call.

#![allow(clippy::unwrap_used, clippy::expect_used)] // Helpers of tests fail as tests do.

use std::time::Duration;

use spore_native::{DEADLINE, Setup};
use spore_vmm::api::{Call, DiskSlots, EndReason, Reply, VmState};

#[test]
fn a_guest_boots_speaks_and_powers_itself_off() {
    let mut vm = Setup::new("hello").boot();
    assert_eq!(vm.line("ok hello"), "ok hello");
    assert_eq!(vm.ended(), EndReason::Shutdown);
    assert_eq!(vm.console_text(), "guest: up\nok hello\n");
}

#[test]
fn the_state_follows_the_calls() {
    let mut vm = spore_native::Vm::spawn();
    assert_eq!(vm.state(), VmState::Empty);
    let configured = vm.configure(Setup::new("spin")).unwrap();
    let Reply::Configured { disk_slots: DiskSlots { read_only: 12, writable: 12 }, disks } = configured
    else {
        panic!("Configure: {configured:?}");
    };
    assert_eq!(disks, []);
    assert_eq!(vm.state(), VmState::Configured);
    vm.boot();
    assert_eq!(vm.state(), VmState::Running);
    assert_eq!(vm.call(Call::Pause), Ok(Reply::Done));
    assert_eq!(vm.state(), VmState::Paused);
    assert_eq!(vm.call(Call::Resume), Ok(Reply::Done));
    assert_eq!(vm.state(), VmState::Running);
    let deadline_ms = u64::try_from(DEADLINE.as_millis()).unwrap();
    assert_eq!(vm.call(Call::Shutdown { deadline_ms }), Ok(Reply::Done));
    assert_eq!(vm.state(), VmState::ShuttingDown);
}

#[test]
fn a_configured_guest_does_not_run_before_boot() {
    let mut vm = Setup::new("hello").configure();
    let metrics = vm.metrics();
    assert_eq!(metrics.boot.entered_ns, 0);
    assert_eq!(metrics.console_bytes, 0);
    vm.boot();
    assert_eq!(vm.ended(), EndReason::Shutdown);
}

/// A paused guest makes no progress however often the VMM is asked; a resumed one goes on
/// where it was.
#[test]
fn pause_stops_the_guest_and_resume_continues_it() {
    let mut vm = Setup::new("dirty,1,100000000").vcpus(2).boot();
    vm.line("dirty round=3 ");
    for _ in 0..5 {
        assert_eq!(vm.call(Call::Pause), Ok(Reply::Done));
        let before = vm.metrics();
        for _ in 0..200 {
            assert_eq!(vm.state(), VmState::Paused);
        }
        let after = vm.metrics();
        assert_eq!((before.console_bytes, &before.exits), (after.console_bytes, &after.exits));
        let console = vm.console.clone().unwrap();
        let caught_up = |text: &str| (text.len() as u64 == after.console_bytes).then(|| text.lines().count());
        let lines = console.wait(DEADLINE, caught_up).expect("the console shows all that the VMM counted");
        assert_eq!(vm.call(Call::Resume), Ok(Reply::Done));
        vm.nth_line("", lines + 10);
    }
    // Whole and in order, across all the pauses.
    let text = vm.console.as_ref().unwrap().text();
    let rounds: Vec<usize> = text
        .lines()
        .filter_map(|line| line.strip_prefix("dirty round=")?.split(' ').next()?.parse().ok())
        .collect();
    assert_eq!(rounds, (0..rounds.len()).collect::<Vec<_>>());
}

/// A halted vCPU sits inside KVM_RUN with nothing to wake it; a spinning one never leaves
/// by itself; one that was never started waits for its start-up interrupt.
#[test]
fn pause_reaches_vcpus_that_spin_halt_or_wait() {
    for script in ["spin", "hang", "smp,4;hang"] {
        let mut vm = Setup::new(script).vcpus(4).boot();
        vm.line(if script.starts_with("smp") { "ok smp" } else { "guest: up" });
        for _ in 0..20 {
            assert_eq!(vm.call(Call::Pause), Ok(Reply::Done), "{script}");
            assert_eq!(vm.call(Call::Resume), Ok(Reply::Done), "{script}");
        }
        assert_eq!(vm.state(), VmState::Running, "{script}");
    }
}

#[test]
fn metrics_count_what_happened() {
    let mut vm = Setup::new("acpi;bus;spin").boot();
    vm.line("ok bus");
    // At rest, so that no byte is between the console and its counter.
    assert_eq!(vm.call(Call::Pause), Ok(Reply::Done));
    let metrics = vm.metrics();
    let printed = vm.console.as_ref().unwrap().text().len() as u64;
    assert!(metrics.console_bytes >= printed, "{} < {printed}", metrics.console_bytes);
    assert_eq!(metrics.console_dropped, 0);
    assert!(metrics.exits.pio >= printed, "one port access a byte: {:?}", metrics.exits);
    assert!(metrics.exits.mmio >= 26, "one register access a slot: {:?}", metrics.exits);
    let boot = metrics.boot;
    assert!(boot.process_start_ns > 0);
    assert!(boot.process_start_ns < boot.configured_ns, "{boot:?}");
    assert!(boot.configured_ns < boot.entered_ns, "{boot:?}");
    println!(
        "process start to configured {:?}, to guest entry {:?}",
        Duration::from_nanos(boot.configured_ns - boot.process_start_ns),
        Duration::from_nanos(boot.entered_ns - boot.process_start_ns)
    );
}
