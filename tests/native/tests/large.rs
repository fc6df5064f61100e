//! Machines with much memory, most of it untouched.

#![allow(clippy::unwrap_used, clippy::expect_used)] // Helpers of tests fail as tests do.

use std::fs;
use std::io::Write;

use spore_native::Setup;
use spore_native::process::resident_huge;

const MIB: u64 = 1 << 20;

/// What a process has dirtied in the page cache, as the kernel counts it for `balance_dirty_pages`: `write_bytes`.
fn dirtied(pid: u32) -> u64 {
    let io = fs::read_to_string(format!("/proc/{pid}/io")).unwrap();
    let line = io.lines().find_map(|line| line.strip_prefix("write_bytes: ")).unwrap();
    line.parse().unwrap()
}

/// Writers of files are made to wait when much of the page cache is dirty: a guest never is, for its writes are to no file.
#[test]
fn a_restored_guest_that_writes_much_dirties_no_file() {
    let mut source = Setup::new("shell").memory_mib(16 * 1024).boot();
    assert!(source.run("store,0,64,7").contains("ok store"));
    let saved = source.snapshot("a", &[]);
    drop(source);
    let mut vm = saved.restore().run();
    let before = dirtied(vm.pid());
    // The snapshot's pages, and others.
    assert!(vm.run("store,0,2048,8").contains("ok store"));
    assert!(vm.run("load,0,2048").contains("seed=8\n"));
    let after = dirtied(vm.pid());
    assert!(after - before < MIB, "{} bytes of files were dirtied", after - before);
    // It counts what goes to a file, on a disk.
    let own = dirtied(std::process::id());
    tempfile::tempfile_in(env!("CARGO_TARGET_TMPDIR")).unwrap().write_all(&vec![1; 8 << 20]).unwrap();
    assert!(dirtied(std::process::id()) - own >= 8 * MIB, "the kernel does not count what is dirtied");
}

#[test]
fn a_guest_gets_huge_pages_when_it_shall() {
    let never =
        fs::read_to_string("/sys/kernel/mm/transparent_hugepage/enabled").unwrap().contains("[never]");
    for huge_pages in [false, true] {
        let mut vm = Setup { huge_pages, ..Setup::new("shell").memory_mib(256) }.boot();
        assert!(vm.run("store,0,64,7").contains("ok store"));
        let huge = resident_huge(vm.pid()).unwrap();
        assert!(huge_pages && !never || huge == 0, "{huge} KiB of huge pages that nobody asked for");
        assert!(huge >= 32 * 1024 || !huge_pages || never, "{huge} KiB of 64 MiB are in huge pages");
        let mut copy = vm.snapshot("a", &[]).restore().run();
        assert!(copy.run("load,0,64").contains("seed=7\n"), "what huge pages hold is saved");
    }
}
