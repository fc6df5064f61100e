//! Deltas: what a snapshot writes, what it refers to, and that every page is found again.

#![allow(clippy::unwrap_used, clippy::expect_used)] // Helpers of tests fail as tests do.

use spore_native::process::resident_anonymous;
use spore_native::{Saved, Setup, Vm};

const MIB: u64 = 1 << 20;
/// More than a guest's own code, stack and rings.
const OWN: u64 = MIB;

fn store(vm: &mut Vm, at: u64, mib: u64, seed: u64) {
    assert!(vm.run(&format!("store,{at},{mib},{seed}")).contains("ok store"));
}

/// The seeds of `mib` MiB, one each.
fn seeds(vm: &mut Vm, mib: u64) -> Vec<u64> {
    let seed = |at| {
        let said = vm.run(&format!("load,{at},1"));
        said.lines()
            .find_map(|line| line.strip_prefix("seed="))
            .unwrap_or_else(|| panic!("{said}"))
            .parse()
            .unwrap()
    };
    (0..mib).map(seed).collect()
}

fn ids(saved: &Saved) -> Vec<&str> {
    saved.done.layers.iter().map(|layer| &*layer.id).collect()
}

fn guest() -> Vm {
    Setup::new("shell").memory_mib(128).boot()
}

#[test]
fn a_full_snapshot_holds_what_was_written_and_no_zeroes() {
    let mut vm = guest();
    store(&mut vm, 0, 8, 3);
    let saved = vm.snapshot("a", &[]);
    assert!((8 * MIB..8 * MIB + OWN).contains(&saved.done.memory_bytes), "{:?}", saved.done);
    assert_eq!(seeds(&mut saved.restore().run(), 9), [3, 3, 3, 3, 3, 3, 3, 3, 0]);
}

#[test]
fn a_delta_of_a_delta_has_every_page() {
    let mut vm = guest();
    store(&mut vm, 0, 8, 1);
    let first = vm.snapshot("a", &[]);
    drop(vm);
    let mut vm = first.restore().run();
    store(&mut vm, 2, 2, 2);
    let second = vm.snapshot("b", &first.layers);
    assert!((2 * MIB..2 * MIB + OWN).contains(&second.done.memory_bytes), "{:?}", second.done);
    drop(vm);
    let mut vm = second.restore().run();
    store(&mut vm, 3, 2, 3);
    let third = vm.snapshot("c", &second.layers);
    assert_eq!(ids(&third), ["a", "b", "c"]);
    assert!((2 * MIB..2 * MIB + OWN).contains(&third.done.memory_bytes), "{:?}", third.done);
    let expected = [1, 1, 2, 3, 3, 1, 1, 1, 0];
    assert_eq!(seeds(&mut vm, 9), expected);
    assert_eq!(seeds(&mut third.restore().run(), 9), expected);
    assert_eq!(seeds(&mut second.restore().run(), 9), [1, 1, 2, 2, 1, 1, 1, 1, 0]);
    assert_eq!(seeds(&mut first.restore().run(), 9), [1, 1, 1, 1, 1, 1, 1, 1, 0]);
}

#[test]
fn later_snapshots_of_one_vm_each_stand_alone() {
    let mut vm = guest();
    store(&mut vm, 0, 4, 1);
    let first = vm.snapshot("a", &[]);
    store(&mut vm, 2, 4, 2);
    let second = vm.snapshot("b", &[]);
    assert_eq!((ids(&first), ids(&second)), (vec!["a"], vec!["b"]));
    assert_eq!(seeds(&mut first.restore().run(), 7), [1, 1, 1, 1, 0, 0, 0]);
    assert_eq!(seeds(&mut second.restore().run(), 7), [1, 1, 2, 2, 2, 2, 0]);
}

#[test]
fn a_restored_vm_that_wrote_nothing_more_writes_almost_nothing() {
    let mut vm = guest();
    store(&mut vm, 0, 32, 5);
    let first = vm.snapshot("a", &[]);
    let mut vm = first.restore().run();
    assert!(resident_anonymous(vm.pid()).unwrap() < 8 * 1024, "a restore reads no memory");
    let second = vm.snapshot("b", &first.layers);
    assert!(second.done.memory_bytes < OWN, "{:?}", second.done);
    drop(first.state);
    assert_eq!(seeds(&mut second.restore().run(), 33)[30..], [5, 5, 0]);
}

#[test]
fn memory_that_was_given_back_is_zero_in_the_copy() {
    let mut vm = guest();
    store(&mut vm, 0, 16, 5);
    let first = vm.snapshot("a", &[]);
    let mut vm = first.restore().run();
    // 8 MiB of the restored file mapping go back to the host, and a part of them is written anew.
    assert!(vm.run("report,8").contains("ok report"));
    store(&mut vm, 1, 1, 6);
    let expected = [0, 6, 0, 0, 0, 0, 0, 0, 5];
    let second = vm.snapshot("b", &first.layers);
    assert!(second.done.memory_bytes < MIB + OWN, "{:?}", second.done);
    assert_eq!(seeds(&mut vm, 9), expected);
    assert_eq!(seeds(&mut second.restore().run(), 9), expected);
}

#[test]
fn scattered_pages_make_a_bounded_number_of_extents() {
    let mut vm = guest();
    store(&mut vm, 0, 64, 5);
    let first = vm.snapshot("a", &[]);
    let mut vm = first.restore().run();
    // Every other page of 32 MiB.
    assert!(vm.run("scatter,0,32").contains("ok scatter"));
    let second = vm.snapshot("b", &first.layers);
    assert!(second.done.extents <= 512, "{:?}", second.done);
    let mut copy = second.restore().run();
    assert!(copy.run("scattered,0,32,5").contains("ok scattered"));
}
