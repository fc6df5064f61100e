//! The generation id: what a guest is told when it goes on from a snapshot.

#![allow(clippy::unwrap_used, clippy::expect_used)] // Helpers of tests fail as tests do.

use spore_native::{Setup, Vm};

fn id(line: &str) -> u128 {
    u128::from_str_radix(line.strip_prefix("generation ").unwrap(), 16).unwrap()
}

#[test]
fn every_copy_is_told_that_its_id_is_another() {
    let mut source = Setup::new("generation").boot();
    let first = id(&source.line("generation "));
    assert_ne!(first, 0);
    let saved = source.snapshot("a", &[]);
    let copies: Vec<Vm> = (0..2).map(|_| saved.restore().run()).collect();
    let mut ids: Vec<u128> = copies.iter().map(|copy| id(&copy.line("generation "))).collect();
    ids.push(first);
    ids.sort_unstable();
    ids.dedup();
    assert_eq!(ids.len(), 3, "each has one of its own");
    // The source waits on.
    assert_eq!(source.console.as_ref().unwrap().text().matches("generation ").count(), 1);
}
