//! Disks: what is written is what is read, on both sides.

#![allow(clippy::unwrap_used, clippy::expect_used)] // Helpers of tests fail as tests do.

use std::fs::File;
use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;

use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use spore_guests::{checksum, pattern_bytes};
use spore_native::{Setup, Vm, disk_file, file_with};
use spore_vmm::api::{BlkMetrics, Call, EndReason, FailureCode, Reply};

/// Runs a command that must succeed, and returns its `sum=` where it prints one.
fn done(vm: &mut Vm, command: &str) -> String {
    let text = vm.run(command);
    let name = command.split(',').next().unwrap();
    assert!(text.contains(&format!("ok {name}\n")), "{command}: {text}");
    text.lines().find_map(|line| line.strip_prefix("sum=")).unwrap_or_default().to_owned()
}

/// Runs a command that must fail, and returns why.
fn fails(vm: &mut Vm, command: &str) -> String {
    let text = vm.run(command);
    let why = text.lines().find_map(|line| line.strip_prefix("failed ")?.split_once(": "));
    why.unwrap_or_else(|| panic!("{command}: {text}")).1.to_owned()
}

fn read(file: &File, offset: u64, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    file.read_exact_at(&mut bytes, offset).unwrap();
    bytes
}

fn metrics(vm: &mut Vm, serial: &str) -> BlkMetrics {
    let metrics = vm.metrics().blk;
    metrics
        .iter()
        .find(|disk| disk.serial == serial)
        .unwrap_or_else(|| panic!("{serial} in {metrics:?}"))
        .clone()
}

#[test]
fn what_the_guest_writes_is_in_the_file() {
    let disk = disk_file(32);
    let mut vm = Setup::new("shell").disk(disk.try_clone().unwrap(), false).boot();
    // Whole requests, a part of one, a single sector at the very end.
    for (sector, count, seed) in [(0, 16384, 1), (16385, 1023, 2), (65535, 1, 3)] {
        let sum = done(&mut vm, &format!("disk-write,rw0,{sector},{count},{seed}"));
        done(&mut vm, "disk-flush,rw0");
        let expected = pattern_bytes(seed, sector * 512, count * 512);
        assert!(read(&disk, sector * 512, count * 512) == expected, "sector {sector}");
        assert_eq!(sum, format!("{:016x}", checksum(&expected)));
        done(&mut vm, &format!("disk-check,rw0,{sector},{count},{seed}"));
    }
    assert_eq!(read(&disk, 16384 * 512, 512), [0; 512], "the sector between is untouched");
    let counted = metrics(&mut vm, "rw0");
    assert_eq!((counted.written_bytes, counted.flushes, counted.errors), ((16384 + 1023 + 1) * 512, 3, 0));
    assert_eq!(counted.read_bytes, (16384 + 1023 + 1) * 512);
}

#[test]
fn what_is_in_the_file_the_guest_reads() {
    let content = pattern_bytes(9, 0, 8 << 20);
    let mut vm = Setup::new("shell").disk(file_with(&content), true).boot();
    assert_eq!(done(&mut vm, "disk-sum,ro0,0,16384"), format!("{:016x}", checksum(&content)));
    done(&mut vm, "disk-check,ro0,7,100,9");
}

/// A size that is no multiple of a sector: the rest is not there for the guest.
#[test]
fn a_file_that_ends_inside_a_sector() {
    let mut file = file_with(&pattern_bytes(9, 0, 8192));
    file.write_all_at(&[1; 100], 8192).unwrap();
    file.flush().unwrap();
    let mut vm = Setup::new("shell").boot();
    match vm.attach(&file, true) {
        Ok(serial) => {
            done(&mut vm, &format!("disk-wait,{serial},16"));
            done(&mut vm, &format!("disk-check,{serial},0,16,9"));
        }
        Err(failure) => assert_eq!(failure.code, FailureCode::InvalidArgument, "{failure}"),
    }
}

#[test]
fn a_read_only_slot_refuses_writes() {
    let content = pattern_bytes(9, 0, 1 << 20);
    let disk = file_with(&content);
    let mut vm = Setup::new("shell").disk(disk.try_clone().unwrap(), true).boot();
    assert!(vm.run("disks").contains("disk ro0 slot=2 sectors=2048 read-only=true"));
    for command in ["disk-write,ro0,0,8,1", "disk-discard,ro0,0,8", "disk-zero,ro0,0,8"] {
        let why = fails(&mut vm, command);
        assert!(why == "I/O error" || why == "unsupported", "{command}: {why}");
    }
    assert!(read(&disk, 0, 1 << 20) == content);
    done(&mut vm, "disk-check,ro0,0,2048,9");
    assert!(metrics(&mut vm, "ro0").errors > 0);
}

#[test]
fn requests_beyond_the_end_are_errors() {
    let mut vm = Setup::new("shell").disk(disk_file(1), false).boot();
    for command in [
        "disk-sum,rw0,2048,1",
        "disk-write,rw0,2047,2,1",
        "disk-sum,rw0,18014398509481983,1",
        "disk-discard,rw0,2040,16",
        "disk-zero,rw0,2040,16",
    ] {
        assert_eq!(fails(&mut vm, command), "I/O error", "{command}");
    }
    done(&mut vm, "disk-sum,rw0,2047,1");
    assert_eq!(metrics(&mut vm, "rw0").errors, 5);
}

#[test]
fn discarded_and_zeroed_sectors_read_as_zero() {
    let disk = disk_file(4);
    let mut vm = Setup::new("shell").disk(disk.try_clone().unwrap(), false).boot();
    done(&mut vm, "disk-write,rw0,0,8192,4");
    done(&mut vm, "disk-zero,rw0,16,1000");
    done(&mut vm, "disk-discard,rw0,4096,1024");
    let content = read(&disk, 0, 4 << 20);
    let mut expected = pattern_bytes(4, 0, 4 << 20);
    expected[16 * 512..1016 * 512].fill(0);
    expected[4096 * 512..5120 * 512].fill(0);
    assert!(content == expected, "the file differs");
    assert_eq!(done(&mut vm, "disk-sum,rw0,0,8192"), format!("{:016x}", checksum(&expected)));
    assert!(metrics(&mut vm, "rw0").discards > 0);
}

/// A disk attached while the guest runs: an interrupt through the I/O APIC, the new
/// capacity, a new configuration generation, and data.
#[test]
fn a_disk_is_attached_to_a_running_guest() {
    let mut vm = Setup::new("shell").boot();
    for (seed, serial) in [(20, "ro0"), (21, "rw0"), (22, "ro1")] {
        let content = pattern_bytes(seed, 0, 3 << 20);
        vm.begin(&format!("disk-irq,{serial}"));
        vm.nth_line("waiting", usize::try_from(seed).unwrap() - 20);
        assert_eq!(vm.attach(&file_with(&content), serial.starts_with("ro")).unwrap(), serial);
        let text = vm.finish();
        assert!(text.contains("capacity=6144 generation-changed=true"), "{text}");
        done(&mut vm, &format!("disk-check,{serial},0,6144,{seed}"));
    }
}

#[test]
fn disks_are_attached_before_boot_too() {
    let mut vm = Setup::new("shell").disk(file_with(&pattern_bytes(1, 0, 1 << 20)), true).configure();
    assert_eq!(vm.attach(&file_with(&pattern_bytes(2, 0, 2 << 20)), true).unwrap(), "ro1");
    assert_eq!(vm.attach(&disk_file(1), false).unwrap(), "rw0");
    vm.boot();
    done(&mut vm, "disk-check,ro0,0,2048,1");
    done(&mut vm, "disk-check,ro1,0,4096,2");
    done(&mut vm, "disk-write,rw0,0,2048,3");
}

/// A disk attached while the guest is paused is there when it goes on.
#[test]
fn a_disk_is_attached_to_a_paused_guest() {
    let mut vm = Setup::new("shell").boot();
    vm.run("disks");
    vm.call(Call::Pause).unwrap();
    let serial = vm.attach(&file_with(&pattern_bytes(2, 0, 1 << 20)), true).unwrap();
    assert_eq!(vm.call(Call::Resume), Ok(Reply::Done));
    done(&mut vm, &format!("disk-wait,{serial},2048"));
    done(&mut vm, &format!("disk-check,{serial},0,2048,2"));
}

#[test]
fn full_slots_are_exhausted_and_still_work() {
    let mut vm = Setup::new("shell").boot();
    for kind in ["ro", "rw"] {
        for index in 0..12_u64 {
            let file = file_with(&pattern_bytes(index, 0, 64 << 10));
            assert_eq!(vm.attach(&file, kind == "ro").unwrap(), format!("{kind}{index}"));
        }
        let failure = vm.attach(&disk_file(1), kind == "ro").unwrap_err();
        assert_eq!(failure.code, FailureCode::Exhausted, "{failure}");
        assert!(failure.message.contains("12"), "{failure}");
    }
    for kind in ["ro", "rw"] {
        for index in 0..12 {
            done(&mut vm, &format!("disk-check,{kind}{index},0,128,{index}"));
        }
    }
}

/// Too many disks in `Configure` are refused whole, and nothing is kept of them.
#[test]
fn a_configuration_with_too_many_disks_is_refused() {
    let mut vm = Vm::spawn();
    let mut setup = Setup::new("hello");
    for _ in 0..13 {
        setup = setup.disk(disk_file(1), false);
    }
    let failure = vm.configure(setup).unwrap_err();
    assert_eq!(failure.code, FailureCode::InvalidArgument, "{failure}");
    assert!(failure.message.contains("12"), "{failure}");
    vm.configure(Setup::new("hello")).unwrap();
    vm.boot();
    assert_eq!(vm.ended(), EndReason::Shutdown);
}

#[test]
fn a_writable_disk_needs_a_writable_descriptor() {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(1 << 20).unwrap();
    let mut vm = Setup::new("shell").boot();
    let only_read = File::open(file.path()).unwrap();
    let failure = vm.attach(&only_read, false).unwrap_err();
    assert_eq!(failure.code, FailureCode::InvalidArgument, "{failure}");
    let only_write = File::options().write(true).open(file.path()).unwrap();
    let failure = vm.attach(&only_write, true).unwrap_err();
    assert_eq!(failure.code, FailureCode::InvalidArgument, "{failure}");
    assert_eq!(vm.attach(&only_read, true).unwrap(), "ro0");
}

/// A host that fails to write gives the guest an error status, not silence; a host that
/// recovers is used again.
#[test]
fn host_errors_become_error_statuses() {
    let memory: File =
        memfd_create(c"disk", MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING).unwrap().into();
    memory.set_len(1 << 20).unwrap();
    let mut vm = Setup::new("shell").disk(memory.try_clone().unwrap(), false).boot();
    done(&mut vm, "disk-write,rw0,0,2048,1");
    // From here on the kernel refuses writes to this file.
    fcntl(memory.as_fd(), FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_WRITE)).unwrap();
    assert_eq!(fails(&mut vm, "disk-write,rw0,0,8,2"), "I/O error");
    done(&mut vm, "disk-check,rw0,0,2048,1");
    // A file cut short under the VMM: reads past its end are errors, before it fine.
    let cut = file_with(&pattern_bytes(5, 0, 1 << 20));
    let serial = vm.attach(&cut, true).unwrap();
    done(&mut vm, &format!("disk-wait,{serial},2048"));
    cut.set_len(512 << 10).unwrap();
    assert_eq!(fails(&mut vm, &format!("disk-sum,{serial},1024,8")), "I/O error");
    done(&mut vm, &format!("disk-check,{serial},0,1024,5"));
    cut.set_len(1 << 20).unwrap();
    done(&mut vm, &format!("disk-sum,{serial},1024,1024"));
    assert_eq!(metrics(&mut vm, "rw0").errors, 1);
    assert_eq!(metrics(&mut vm, &serial).errors, 1);
}

#[test]
fn a_free_slot_has_no_sectors() {
    let mut vm = Setup::new("shell").boot();
    let text = vm.run("disks");
    assert_eq!(text.lines().filter(|line| line.contains("sectors=0 ")).count(), 24, "{text}");
    assert_eq!(fails(&mut vm, "disk-sum,ro0,0,1"), "I/O error");
    assert_eq!(fails(&mut vm, "disk-write,rw11,0,1,1"), "I/O error");
}
