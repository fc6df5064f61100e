//! Snapshots that cannot be: each gives an error that says why, and leaves the VM, or no VM, as it was.

#![allow(clippy::unwrap_used, clippy::expect_used)] // Helpers of tests fail as tests do.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use spore_native::{Restore, Saved, Setup, Vm, disk_file};
use spore_vmm::api::{Call, Failure, FailureCode, FdIndex, Reply, SnapshotConfig, VmState};

fn shell() -> Vm {
    let mut vm = Setup::new("shell").boot();
    assert!(vm.run("store,0,2,1").contains("ok store"));
    vm
}

fn saved() -> Saved {
    shell().snapshot("a", &[])
}

fn bytes(file: &File) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(file.metadata().unwrap().len()).unwrap()];
    file.read_exact_at(&mut bytes, 0).unwrap();
    bytes
}

fn file(bytes: &[u8]) -> File {
    let file = tempfile::tempfile().unwrap();
    file.write_all_at(bytes, 0).unwrap();
    file
}

/// A state file with some of its text replaced, and its sums right.
fn forged(state: &File, replace: impl FnOnce(String) -> String) -> File {
    let whole = bytes(state);
    let body = replace(String::from_utf8(whole[32..].to_vec()).unwrap()).into_bytes();
    let mut header = whole[..16].to_vec();
    header.extend((body.len() as u64).to_le_bytes());
    header.extend(crc32fast::hash(&body).to_le_bytes());
    header.extend(crc32fast::hash(&header).to_le_bytes());
    file(&[header, body].concat())
}

/// Refused, with no VM left; the good snapshot is taken by the same VMM after that.
fn refused(saved: &Saved, change: impl FnOnce(&mut Restore)) -> Failure {
    let mut vm = Vm::spawn();
    let mut restore = saved.restore();
    change(&mut restore);
    let failure = vm.restore(restore).unwrap_err();
    assert_eq!(vm.state(), VmState::Empty, "{failure}");
    assert!(matches!(vm.restore(saved.restore()), Ok(Reply::Restored { .. })));
    assert_eq!(vm.call(Call::Resume), Ok(Reply::Done));
    assert!(vm.run("load,0,2").contains("seed=1\n"));
    failure
}

fn bad(saved: &Saved, words: &str, change: impl FnOnce(&mut Restore)) {
    let failure = refused(saved, change);
    assert_eq!(failure.code, FailureCode::BadSnapshot, "{failure}");
    assert!(failure.message.contains(words), "{failure}");
}

#[test]
fn damaged_state_is_refused() {
    let saved = saved();
    let whole = bytes(&saved.state);
    bad(&saved, "cut off", |restore| restore.state = Some(file(&whole[..whole.len() - 1])));
    bad(&saved, "header alone", |restore| restore.state = Some(file(&whole[..20])));
    bad(&saved, "does not begin as", |restore| restore.state = Some(file(&[7; 4096])));
    let mut flipped = whole.clone();
    flipped[whole.len() / 2] ^= 4;
    bad(&saved, "damaged", |restore| restore.state = Some(file(&flipped)));
}

#[test]
fn layers_that_do_not_fit_are_refused() {
    let saved = saved();
    bad(&saved, "layer a is needed", |restore| restore.layers.clear());
    bad(&saved, "does not need it", |restore| restore.layers.push(("b".into(), file(&[0; 4096]))));
    let short = bytes(&saved.layers[0].1);
    bad(&saved, "is damaged", |restore| restore.layers[0].1 = file(&short[..short.len() - 4096]));
}

#[test]
fn forged_state_is_refused() {
    let saved = saved();
    let state = &saved.state;
    let forge = |from: &str, to: &str| {
        let (from, to) = (from.to_owned(), to.to_owned());
        let made = forged(state, move |text| {
            assert!(text.contains(&from), "{from} is not in the state");
            text.replacen(&from, &to, 1)
        });
        move |restore: &mut Restore| restore.state = Some(made)
    };
    bad(&saved, "vCPUs: 200", forge("\"shape\":{\"vcpus\":1", "\"shape\":{\"vcpus\":200"));
    bad(&saved, "has the state of 1", forge("\"shape\":{\"vcpus\":1", "\"shape\":{\"vcpus\":2"));
    bad(
        &saved,
        "memory in bytes",
        forge("\"memory_bytes\":67108864", "\"memory_bytes\":9223372036854775807"),
    );
    bad(&saved, "no state of it", forge("\"virtio-0\":", "\"virtio-99\":"));
    bad(&saved, "reads up to 1", forge("\"serial\":{\"version\":1", "\"serial\":{\"version\":2"));
    bad(&saved, "cannot be decoded", forge("\"written_by\":", "\"written_by\":7,\"x\":"));
    bad(&saved, "not of whole pages", forge("\"extents\":[{\"start\":", "\"extents\":[{\"start\":1"));
}

#[test]
fn a_disk_that_is_not_the_one_that_was_there_is_refused() {
    let disk = disk_file(2);
    let mut vm = Setup::new("shell").disk(disk.try_clone().unwrap(), false).boot();
    assert!(vm.run("store,0,2,1").contains("ok store"));
    let saved = vm.snapshot("a", &[]);
    let refused = |restore: Restore| Vm::spawn().restore(restore).unwrap_err();
    let failure = refused(saved.restore());
    assert!(failure.message.contains("none is given"), "{failure}");
    let failure = refused(saved.restore().disk("rw0", &disk_file(3)));
    assert!(failure.message.contains("it is another disk"), "{failure}");
    let failure = refused(saved.restore().disk("rw0", &disk).disk("rw77", &disk_file(3)));
    assert!(failure.message.contains("no such slot"), "{failure}");
    let failure = refused(saved.restore().disk("rw0", &disk).vsock());
    assert!(failure.message.contains("had none"), "{failure}");
}

#[test]
fn a_killed_writer_says_nothing_and_the_vm_goes_on() {
    let mut vm = shell();
    // The report does not fit its pipe, so the writer stands still at its last step.
    let (mut report, mut theirs) = std::io::pipe().unwrap();
    let room = nix::fcntl::fcntl(theirs.as_fd(), nix::fcntl::FcntlArg::F_GETPIPE_SZ).unwrap();
    let filler = vec![b'.'; usize::try_from(room).unwrap()];
    theirs.write_all(&filler).unwrap();
    let mut copy = report.try_clone().unwrap();
    let pending =
        vm.begin_snapshot_with("a", &[], 60_000, (report.try_clone().unwrap(), theirs.into())).unwrap();
    assert_eq!(vm.metrics().snapshots.writing, 1);
    let pid = Pid::from_raw(i32::try_from(pending.times.pid).unwrap());
    kill(pid, Signal::SIGKILL).unwrap();
    let mut said = Vec::new();
    copy.read_to_end(&mut said).unwrap();
    assert!(said == filler, "no report, and the pipe is at its end");
    assert!(report.read(&mut [0]).unwrap() == 0);
    assert!(vm.run("load,0,2").contains("seed=1\n"));
    while vm.metrics().snapshots.writing > 0 {}
    assert_eq!((vm.metrics().snapshots.taken, vm.metrics().snapshots.failed), (1, 1));
    let mut copy = vm.snapshot("b", &[]).restore().run();
    assert!(copy.run("load,0,2").contains("seed=1\n"));
}

#[test]
fn a_snapshot_that_cannot_begin_leaves_the_vm_running() {
    let mut vm = shell();
    let config = || SnapshotConfig {
        state: FdIndex(0),
        memory: FdIndex(1),
        report: FdIndex(2),
        procfs: FdIndex(3),
        layer_id: "a".into(),
        deadline_ms: 1000,
        disks: Vec::new(),
    };
    let (_reader, report) = std::io::pipe().unwrap();
    let (empty, full) = (file(b""), file(b"full"));
    let (procfs, other) = (File::open("/proc").unwrap(), File::open("/").unwrap());
    let mut refused = |config, fds: [&dyn AsFd; 4]| {
        let failure = vm.call_with(Call::Snapshot(config), &fds.map(AsFd::as_fd)).unwrap_err();
        assert_eq!(failure.code, FailureCode::InvalidArgument, "{failure}");
        assert_eq!(vm.state(), VmState::Running);
        failure.message
    };
    let said = refused(config(), [&empty, &full, &report, &procfs]);
    assert!(said.contains("memory: the file is not empty"), "{said}");
    let said = refused(config(), [&empty, &empty, &report, &other]);
    assert!(said.contains("procfs"), "{said}");
    let said =
        refused(SnapshotConfig { layer_id: "../a".into(), ..config() }, [&empty, &empty, &report, &procfs]);
    assert!(said.contains("layer_id"), "{said}");
    let said = refused(SnapshotConfig { deadline_ms: 0, ..config() }, [&empty, &empty, &report, &procfs]);
    assert!(said.contains("deadline_ms"), "{said}");
}

#[test]
fn a_vm_that_has_not_run_has_no_snapshot() {
    let mut vm = Setup::new("hello").configure();
    let failure = vm.begin_snapshot("a", &[]).map(|_| ()).unwrap_err();
    assert_eq!(failure.code, FailureCode::WrongState, "{failure}");
    vm.boot();
    vm.line("ok hello");
}
