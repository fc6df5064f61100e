//! Requests that no honest peer sends, or not then. Each gets one clear answer and leaves
//! the VM as it was.

#![allow(clippy::unwrap_used, clippy::expect_used)] // Helpers of tests fail as tests do.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};

use serde_json::{Value, json};
use spore_native::control::Received;
use spore_native::{DEADLINE, Setup, Vm, disk_file, file_with, host};
use spore_vmm::api::{Call, EndReason, Failure, FailureCode, MAX_MESSAGE, Message, Reply, VmState};

/// A VMM must still be able to do its work.
fn still_works(mut vm: Vm) {
    vm.configure(Setup::new("hello")).expect("a good configuration is accepted after refusals");
    vm.boot();
    assert_eq!(vm.ended(), EndReason::Shutdown);
}

/// Sends a `Configure` whose JSON `change` has altered, with a good kvm and kernel as
/// descriptors 0 and 1 and `more` after them, and returns the refusal.
fn refused(vm: &mut Vm, change: impl FnOnce(&mut Value), more: &[BorrowedFd<'_>]) -> Failure {
    let (kvm, kernel) = (host::kvm(), file_with(spore_guests::ELF));
    let mut fds = vec![kvm.as_fd(), kernel.as_fd()];
    fds.extend_from_slice(more);
    refused_with(vm, change, &fds)
}

fn refused_with(vm: &mut Vm, change: impl FnOnce(&mut Value), fds: &[BorrowedFd<'_>]) -> Failure {
    let mut config = json!({
        "protocol": 1, "vcpus": 1, "memory_mib": 64, "kvm": 0, "kernel": 1, "initrd": null,
        "cmdline": "guest=hello", "console": null, "vsock": null, "disks": []
    });
    change(&mut config);
    let request = json!({ "id": 77, "call": { "configure": config } });
    let failure = send_raw(vm, request.to_string().as_bytes(), fds);
    assert_eq!(vm.state(), VmState::Empty, "{failure}");
    failure
}

/// Sends bytes and returns the failure that answers them.
fn send_raw(vm: &mut Vm, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> Failure {
    let control = vm.control.as_ref().unwrap();
    control.send_bytes(bytes, fds).unwrap();
    match control.receive(DEADLINE).unwrap() {
        Received::Packet(Message::Response { result: Err(failure), .. }, _) => failure,
        other => panic!("{}: {other:?}", String::from_utf8_lossy(bytes)),
    }
}

#[track_caller]
fn assert_says(failure: &Failure, code: FailureCode, words: &[&str]) {
    assert_eq!(failure.code, code, "{failure}");
    for word in words {
        assert!(failure.message.contains(word), "{:?} does not say {word:?}", failure.message);
    }
}

#[test]
fn calls_in_the_wrong_order() {
    let wrong = |vm: &mut Vm, call: Call| {
        let name = format!("{call:?}");
        let failure = vm.call(call).expect_err(&name);
        assert_eq!(failure.code, FailureCode::WrongState, "{name}: {failure}");
        assert!(!failure.message.is_empty());
    };
    let mut vm = Vm::spawn();
    wrong(&mut vm, Call::Boot);
    wrong(&mut vm, Call::Pause);
    wrong(&mut vm, Call::Resume);
    assert_eq!(vm.attach(&disk_file(1), true).unwrap_err().code, FailureCode::WrongState);
    vm.configure(Setup::new("spin")).unwrap();
    wrong(&mut vm, Call::Pause);
    wrong(&mut vm, Call::Resume);
    assert_eq!(vm.configure(Setup::new("spin")).unwrap_err().code, FailureCode::WrongState);
    vm.boot();
    wrong(&mut vm, Call::Boot);
    wrong(&mut vm, Call::Resume);
    assert_eq!(vm.call(Call::Pause), Ok(Reply::Done));
    wrong(&mut vm, Call::Pause);
    wrong(&mut vm, Call::Boot);
    assert_eq!(vm.state(), VmState::Paused);
    assert_eq!(vm.call(Call::Resume), Ok(Reply::Done));
    assert_eq!(vm.state(), VmState::Running);
}

#[test]
fn packets_that_are_no_request() {
    let mut vm = Vm::spawn();
    for bytes in [
        &b"not json"[..],
        b"{}",
        b"[]",
        b"\0",
        b"\xff\xfe",
        b"{\"id\":1}",
        b"{\"id\":-1,\"call\":\"state\"}",
        b"{\"id\":1,\"call\":\"fly\"}",
        b"{\"id\":1,\"call\":\"state\",\"extra\":1}",
        b"{\"id\":1,\"call\":{\"shutdown\":{}}}",
        b"{\"id\":1,\"call\":{\"shutdown\":{\"deadline_ms\":1e30}}}",
        b"{\"id\":1,\"call\":\"state\"} trailing",
    ] {
        let failure = send_raw(&mut vm, bytes, &[]);
        assert_eq!(failure.code, FailureCode::InvalidArgument, "{}", String::from_utf8_lossy(bytes));
    }
    still_works(vm);
}

#[test]
fn a_packet_that_is_too_long() {
    let mut vm = Vm::spawn();
    let mut bytes = br#"{"id":1,"call":"state"}"#.to_vec();
    bytes.resize(MAX_MESSAGE + 1, b' ');
    let failure = send_raw(&mut vm, &bytes, &[]);
    assert_says(&failure, FailureCode::InvalidArgument, &["65536"]);
    still_works(vm);
}

#[test]
fn deeply_nested_json() {
    let mut vm = Vm::spawn();
    let failure = send_raw(&mut vm, &vec![b'['; MAX_MESSAGE], &[]);
    assert_eq!(failure.code, FailureCode::InvalidArgument);
    still_works(vm);
}

#[test]
fn values_out_of_range() {
    let mut vm = Vm::spawn();
    let invalid = FailureCode::InvalidArgument;
    let mut set = |name: &str, value: Value, words: &[&str]| {
        let failure = refused(&mut vm, |config| config[name] = value, &[]);
        assert_says(&failure, invalid, words);
    };
    set("protocol", json!(2), &["2", "1"]);
    set("vcpus", json!(0), &["0", "32"]);
    set("vcpus", json!(33), &["33", "32"]);
    set("vcpus", json!(256), &[]);
    set("memory_mib", json!(63), &["63", "64"]);
    set("memory_mib", json!(0), &["0", "64"]);
    set("memory_mib", json!(1024 * 1024 + 1), &["1048577", "1048576"]);
    set("memory_mib", json!(u64::MAX), &[]);
    set("cmdline", json!("a\0b"), &[]);
    set("cmdline", json!("gr\u{fc}n"), &[]);
    set("cmdline", json!("x".repeat(2048)), &["2048", "2047"]);
    set("surplus", json!(1), &["surplus"]);
    set("kernel", Value::Null, &[]);
    still_works(vm);
}

#[test]
fn descriptors_missing_surplus_or_named_twice() {
    let mut vm = Vm::spawn();
    let invalid = FailureCode::InvalidArgument;
    assert_says(&refused_with(&mut vm, |_| {}, &[]), invalid, &[]);
    assert_says(&refused_with(&mut vm, |_| {}, &[host::kvm().as_fd()]), invalid, &["1"]);
    assert_says(&refused(&mut vm, |config| config["kernel"] = json!(5), &[]), invalid, &["5"]);
    assert_says(&refused(&mut vm, |config| config["kernel"] = json!(u32::MAX), &[]), invalid, &[]);
    assert_says(&refused(&mut vm, |config| config["kernel"] = json!(0), &[]), invalid, &["0"]);
    let surplus = disk_file(1);
    assert_says(&refused(&mut vm, |_| {}, &[surplus.as_fd()]), invalid, &["2"]);
    let failure = send_raw(&mut vm, br#"{"id":1,"call":"state"}"#, &[surplus.as_fd()]);
    assert_says(&failure, invalid, &[]);
    still_works(vm);
}

#[test]
fn descriptors_of_the_wrong_kind() {
    let mut vm = Vm::spawn();
    let null = File::options().read(true).write(true).open("/dev/null").unwrap();
    let folder = File::open("/").unwrap();
    let kernel = file_with(spore_guests::ELF);
    let failure = refused_with(&mut vm, |_| {}, &[null.as_fd(), kernel.as_fd()]);
    assert_says(&failure, FailureCode::HostUnfit, &["/dev/kvm"]);
    let failure = refused_with(&mut vm, |_| {}, &[host::kvm().as_fd(), folder.as_fd()]);
    assert_says(&failure, FailureCode::InvalidArgument, &["kernel", "directory"]);
    let disk = |config: &mut Value| config["disks"] = json!([{ "file": 2, "read_only": false }]);
    for bad in [&folder, &null] {
        let failure = refused(&mut vm, disk, &[bad.as_fd()]);
        assert_eq!(failure.code, FailureCode::InvalidArgument, "{failure}");
    }
    let vsock = |cid: u32| {
        move |config: &mut Value| {
            config["vsock"] = json!({ "guest_cid": cid, "listener": 2, "host_ports": [] });
        }
    };
    let failure = refused(&mut vm, vsock(3), &[null.as_fd()]);
    assert_eq!(failure.code, FailureCode::InvalidArgument, "a listener that is no socket: {failure}");
    let folder = tempfile::tempdir().unwrap();
    for cid in [0, 1, 2, u32::MAX] {
        let path = folder.path().join(cid.to_string());
        let listener = std::os::unix::net::UnixListener::bind(path).unwrap();
        let failure = refused(&mut vm, vsock(cid), &[listener.as_fd()]);
        assert_says(&failure, FailureCode::InvalidArgument, &[&cid.to_string()]);
    }
    still_works(vm);
}

/// Each refused message's descriptors are closed.
#[test]
fn refusals_leak_no_descriptor() {
    let mut vm = Vm::spawn();
    let surplus = disk_file(1);
    let more = [surplus.as_fd(); 40];
    refused(&mut vm, |_| {}, &more);
    let before = spore_native::process::descriptors(vm.pid()).unwrap();
    for _ in 0..50 {
        refused(&mut vm, |_| {}, &more);
        refused(&mut vm, |config| config["vcpus"] = json!(0), &[]);
        send_raw(&mut vm, b"nonsense", &more);
        refused(&mut vm, |config| config["kernel"] = json!(2), &[disk_file(1).as_fd()]);
    }
    let after = spore_native::process::descriptors(vm.pid()).unwrap();
    assert_eq!(before.len(), after.len(), "before {before:?}\nafter {after:?}");
    still_works(vm);
}
