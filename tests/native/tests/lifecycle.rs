//! A VM's life, call by call.

#![allow(clippy::unwrap_used, clippy::expect_used)] // Helpers of tests fail as tests do.

use std::fs::File;
use std::hash::{DefaultHasher, Hasher};
use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use spore_guests::{pattern_bytes, port};
use spore_native::process::guest_memory_digest;
use spore_native::vsock::{connect, read_line};
use spore_native::{DEADLINE, Setup, disk_file};
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
    let Reply::Configured { disk_slots: DiskSlots { read_only: 12, writable: 12 }, network_slots: 4, disks } =
        configured
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

/// While a VM is paused its memory stands still, whatever its peers send; what they sent is served
/// when it goes on.
#[test]
fn a_paused_guest_gets_nothing_until_it_goes_on() {
    let mut vm = Setup::new("serve").memory_mib(128).vsock(&[]).boot();
    vm.line("serving");
    let mut stream = connect(&vm.vsock_path(), port::ECHO).unwrap();
    let data = pattern_bytes(5, 0, 4096);
    assert_eq!(vm.call(Call::Pause), Ok(Reply::Done));
    let before = guest_memory_digest(vm.pid(), 128).unwrap();
    stream.write_all(&data).unwrap();
    let mut late = UnixStream::connect(vm.vsock_path()).unwrap();
    late.set_read_timeout(Some(DEADLINE)).unwrap();
    late.write_all(format!("CONNECT {}\n", port::ECHO).as_bytes()).unwrap();
    let counted = vm.metrics();
    for _ in 0..200 {
        assert_eq!(vm.state(), VmState::Paused);
    }
    assert_eq!(vm.metrics(), counted);
    assert_eq!(guest_memory_digest(vm.pid(), 128).unwrap(), before, "guest memory changed in a pause");
    assert_eq!(vm.call(Call::Resume), Ok(Reply::Done));
    let mut back = vec![0; data.len()];
    stream.read_exact(&mut back).unwrap();
    assert!(back == data);
    assert!(read_line(&late).unwrap().starts_with("OK "));
}

/// Pauses in the middle of disk writes, so that some fall between a doorbell and its service.
#[test]
fn a_paused_guest_writes_no_disk() {
    let disk = disk_file(64);
    let mut vm = Setup::new("shell").disk(disk.try_clone().unwrap(), false).boot();
    vm.begin("disk-write,rw0,0,131072,3");
    for _ in 0..30 {
        assert_eq!(vm.call(Call::Pause), Ok(Reply::Done));
        let (counted, content) = (vm.metrics().blk, digest_of(&disk));
        for _ in 0..50 {
            assert_eq!(vm.state(), VmState::Paused);
        }
        assert_eq!(vm.metrics().blk, counted);
        assert_eq!(digest_of(&disk), content, "the disk changed in a pause");
        assert_eq!(vm.call(Call::Resume), Ok(Reply::Done));
    }
    assert!(vm.finish().contains("ok disk-write\n"));
    assert!(vm.run("disk-check,rw0,0,131072,3").contains("ok disk-check\n"));
}

fn digest_of(file: &File) -> u64 {
    let mut content = vec![0; 64 << 20];
    file.read_exact_at(&mut content, 0).unwrap();
    let mut digest = DefaultHasher::new();
    digest.write(&content);
    digest.finish()
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
    assert!(metrics.exits.mmio >= 27, "one register access a slot: {:?}", metrics.exits);
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
