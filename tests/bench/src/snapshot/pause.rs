//! For how long a snapshot stops a machine.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use spore_native::Vm;
use spore_vmm::api::{Call, Reply};

use super::kernel::Memory;
use super::{COPIES, guest, ms, ms_of_ns, row};
use crate::report::Row;
use crate::stats::Sample;

const MEMORY_MIB: u64 = 2048;
/// Written by the guest, beside the few pages that it needs itself; whether in huge pages; what the pause is to take at most, ms.
const GUESTS: [(u64, bool, Option<f64>); 5] = [
    (0, false, None),
    (64, false, Some(3.0)),
    (256, false, None),
    (1024, false, None),
    (1024, true, Some(2.0)),
];
/// A snapshot's pause is at most so much of a bare fork and the saving of state.
const TARGET: f64 = 1.3;
const PIECE: usize = 1 << 20;

#[derive(Default)]
struct Times {
    pause: Vec<f64>,
    quiesce: Vec<f64>,
    save: Vec<f64>,
    fork: Vec<f64>,
    bare: Vec<f64>,
    followed: Vec<f64>,
    durable: Vec<f64>,
}

pub(super) fn rows(rounds: usize) -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    for (written, huge_pages, target) in GUESTS {
        let mut vm = guest(MEMORY_MIB, written, huge_pages)?;
        let alone = Memory::new(MEMORY_MIB, written, huge_pages)?;
        let mut times = Times::default();
        for round in 0..=rounds {
            let bare = alone.fork()?;
            // KVM follows a fork: it walks through what it knows of all of a guest's memory.
            let (machine, _) = alone.machine()?;
            let followed = alone.fork()?;
            drop(machine);
            let begun = Instant::now();
            let pending = vm.begin_snapshot(&format!("{written}-{round}"), &[])?;
            let taken = pending.times.clone();
            drop(pending.saved());
            if round > 0 {
                times.durable.push(ms(begun.elapsed()));
                times.pause.push(ms_of_ns(taken.pause_ns));
                times.quiesce.push(ms_of_ns(taken.quiesce_ns));
                times.save.push(ms_of_ns(taken.save_ns));
                times.fork.push(ms_of_ns(taken.fork_ns));
                times.bare.push(ms(bare));
                times.followed.push(ms(followed) + ms_of_ns(taken.save_ns));
            }
        }
        let pages = if huge_pages { " in huge pages" } else { "" };
        let what = format!("live snapshot, {written} MiB written{pages}");
        let reference = Sample::new(times.followed.clone());
        rows.push(
            row(&format!("{what}: pause, beside a fork with a bare KVM VM, and saving"), &times.pause)
                .against(&reference, Some(TARGET)),
        );
        if let Some(target) = target {
            rows.push(row(&format!("{what}: pause"), &times.pause).at_most(target));
        }
        rows.push(row(&format!("{what}: of that quiescing"), &times.quiesce));
        rows.push(row(&format!("{what}: of that saving"), &times.save));
        rows.push(row(&format!("{what}: of that fork"), &times.fork));
        rows.push(row(&format!("{what}: a fork of as much memory without KVM"), &times.bare));
        rows.push(row(&format!("{what}: until durable"), &times.durable));
        let copies: Vec<_> = (0..COPIES).map(|_| full_copy(&mut vm)).collect::<Result<_>>()?;
        let copied = Sample::new(copies.clone());
        rows.push(row(&format!("{what}: pause, beside a full copy's"), &times.pause).against(&copied, None));
    }
    Ok(rows)
}

/// The plain way: the machine stands still while all of its memory is copied to a file, which is not even made durable.
fn full_copy(vm: &mut Vm) -> Result<f64> {
    let (from, to) = (memory_of(vm.pid())?, File::open(format!("/proc/{}/mem", vm.pid()))?);
    let mut file = tempfile::tempfile().context("make a file")?;
    let mut piece = vec![0; PIECE];
    let begun = Instant::now();
    ensure!(vm.call(Call::Pause)? == Reply::Done, "it does not pause");
    for at in from.step_by(PIECE) {
        to.read_exact_at(&mut piece, at).context("read the guest's memory")?;
        file.write_all(&piece).context("write the guest's memory")?;
    }
    ensure!(vm.call(Call::Resume)? == Reply::Done, "it does not resume");
    Ok(ms(begun.elapsed()))
}

/// Where the guest's memory is in its VMM: a mapping that large there is one of.
fn memory_of(pid: u32) -> Result<std::ops::Range<u64>> {
    let maps = fs::read_to_string(format!("/proc/{pid}/maps"))?;
    let size = MEMORY_MIB << 20;
    let found = maps.lines().find_map(|line| {
        let (start, end) = line.split_whitespace().next()?.split_once('-')?;
        let (start, end) = (u64::from_str_radix(start, 16).ok()?, u64::from_str_radix(end, 16).ok()?);
        (end - start >= size).then_some(start..start + size)
    });
    found.context("the VMM has no mapping of the guest's memory")
}
