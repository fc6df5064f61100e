//! The serial console: every byte, up to the cap, and never in the way.

#![allow(clippy::unwrap_used, clippy::expect_used)] // Helpers of tests fail as tests do.

use std::fs::File;
use std::io::{Read, Seek};
use std::os::fd::OwnedFd;

use spore_native::{DEADLINE, Setup};
use spore_vmm::api::{Call, EndReason, Reply};

const LINE: &str = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcde\n";

/// A file for the console, and a second handle to read it by.
fn file() -> (File, OwnedFd) {
    let file = tempfile::tempfile().unwrap();
    let output = file.try_clone().unwrap();
    (file, output.into())
}

fn content(mut file: File) -> String {
    let mut text = String::new();
    file.rewind().unwrap();
    file.read_to_string(&mut text).unwrap();
    text
}

#[test]
fn every_byte_arrives_without_a_cap() {
    let (file, output) = file();
    let mut vm = Setup::new("flood,131072").console(output).boot();
    assert_eq!(vm.ended(), EndReason::Shutdown);
    let expected = format!("guest: up\n{}ok flood\n", LINE.repeat(131_072 / 64));
    assert!(content(file) == expected, "128 KiB of console output differs");
}

#[test]
fn output_stops_at_the_cap_with_a_notice_and_the_guest_goes_on() {
    let (file, output) = file();
    let mut vm = Setup::new("flood,131072;spin").console(output).cap_bytes(10_000).boot();
    // The flood is over when the guest spins: then the counters stand still.
    let mut metrics = vm.metrics();
    let end = std::time::Instant::now() + DEADLINE;
    while metrics.console_bytes + metrics.console_dropped < 131_072 + 19 {
        assert!(std::time::Instant::now() < end, "{metrics:?}");
        metrics = vm.metrics();
    }
    vm.kill();
    vm.exit_status();
    let text = content(file);
    let whole = format!("guest: up\n{}", LINE.repeat(200));
    assert_eq!(&text[..10_000], &whole[..10_000]);
    let notice = &text[10_000..];
    assert!(notice.len() < 500 && notice.trim().lines().count() == 1, "{notice:?}");
    assert!(notice.contains("10000"), "the notice names the cap: {notice:?}");
    assert_eq!(metrics.console_bytes, 10_000, "{metrics:?}");
    assert_eq!(metrics.console_dropped, 131_072 + 19 - 10_000, "{metrics:?}");
}

/// A console whose reader is gone must not take the VM with it.
#[test]
fn a_console_without_reader_does_no_harm() {
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let mut vm = Setup::new("flood,100000").console(writer.into()).boot();
    assert_eq!(vm.ended(), EndReason::Shutdown);
}

/// A console whose reader is stuck must not keep the peer from the VM.
#[test]
fn a_console_whose_reader_is_stuck_does_not_block_the_control_socket() {
    let (reader, writer) = std::io::pipe().unwrap();
    let mut vm = Setup::new("flood,10000000").console(writer.into()).boot();
    // More than a pipe holds, less than the flood.
    let end = std::time::Instant::now() + DEADLINE;
    while vm.metrics().console_bytes + vm.metrics().console_dropped < 60_000 {
        assert!(std::time::Instant::now() < end, "{:?}", vm.metrics());
    }
    assert_eq!(vm.call(Call::Pause), Ok(Reply::Done));
    assert_eq!(vm.call(Call::Resume), Ok(Reply::Done));
    assert_eq!(vm.call(Call::Shutdown { deadline_ms: 0 }), Ok(Reply::Done));
    assert_eq!(vm.ended(), EndReason::Forced);
    drop(reader);
}

#[test]
fn input_reaches_the_guest() {
    let mut vm = Setup::new("shell").boot();
    assert_eq!(vm.run("hello"), "ok hello\n");
    assert_eq!(vm.run("nonsense"), "failed nonsense: unknown command\n");
    let long = format!("cmdline{}", "x".repeat(200));
    assert_eq!(vm.run(&long), format!("failed {long}: unknown command\n"));
    vm.begin("exit");
    assert_eq!(vm.ended(), EndReason::Shutdown);
}

/// The end of the input is no end of the guest.
#[test]
fn an_input_that_ends_does_no_harm() {
    let (reader, writer) = std::io::pipe().unwrap();
    drop(writer);
    let mut vm = Setup::new("dirty,1,200").input(reader.into()).boot();
    assert_eq!(vm.ended(), EndReason::Shutdown);
}
