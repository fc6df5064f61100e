//! From a snapshot to a machine whose guest runs.

use std::io::Read;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use spore_native::{Restore, Saved, Vm};
use spore_vmm::api::{Call, Reply};

use super::kernel::Memory;
use super::{COPIES, first_word, guest, ms, row};
use crate::report::Row;
use crate::stats::Sample;

/// Size of the machine and what its guest has written, MiB.
const MACHINES: [(u64, u64); 5] = [(64, 0), (2048, 0), (2048, 64), (2048, 1024), (16384, 64)];
/// The size of which a full copy is read as well.
const COPIED_MIB: u64 = 2048;
/// Beyond what the kernel takes for memory slots.
const TARGET_MS: f64 = 10.0;
pub(super) const MANY: usize = 100;
#[allow(clippy::cast_precision_loss)] // 100
pub(super) const COUNT: f64 = MANY as f64;
/// Forks and VMs of which the reference is the mean.
pub(super) const REFERENCES: u32 = 20;
pub(super) const IN_FLIGHT: usize = 20;

pub(super) fn rows(rounds: usize) -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    for (memory, written) in MACHINES {
        let (what, saved) =
            (format!("restore, {memory} MiB, {written} MiB written"), speaking(memory, written)?);
        // Nothing is written to it: this process is forked to start VMMs.
        let alone = Memory::new(memory, 0, false)?;
        let (mut spawned, mut called, mut whole, mut beyond) = (vec![], vec![], vec![], vec![]);
        for round in 0..=rounds {
            let (_, slots) = alone.machine()?;
            let begun = Instant::now();
            let mut vm = Vm::spawn();
            let there = Instant::now();
            let called_at = restored(&mut vm, saved.restore())?;
            let runs = first_word(&vm)?;
            if round > 0 {
                spawned.push(ms(there - begun));
                called.push(ms(called_at - there));
                whole.push(ms(runs - begun));
                beyond.push((ms(runs - there) - ms(slots)).max(0.0));
            }
        }
        rows.push(
            row(&format!("{what}: from the call to the guest's first word, less memory slots"), &beyond)
                .at_most(TARGET_MS),
        );
        rows.push(row(&format!("{what}: of that the call"), &called));
        rows.push(row(&format!("{what}: starting the VMM before it"), &spawned));
        // A full copy of the largest takes as many times longer as it is larger.
        let copies = if memory == COPIED_MIB { COPIES } else { 0 };
        let copies: Vec<_> = (0..copies).map(|_| full_copy(&saved, memory)).collect::<Result<_>>()?;
        let all = row(&format!("{what}: all of it, beside reading a full copy"), &whole);
        rows.push(all.against(&Sample::new(copies), None));
    }
    rows.extend(many(rounds)?);
    Ok(rows)
}

/// A snapshot of a guest that says something all the time.
fn speaking(memory_mib: u64, written_mib: u64) -> Result<Saved> {
    Ok(speaker(memory_mib, written_mib)?.snapshot("a", &[]))
}

/// A guest that says something all the time.
pub(super) fn speaker(memory_mib: u64, written_mib: u64) -> Result<Vm> {
    let mut vm = guest(memory_mib, written_mib, false)?;
    vm.begin("count");
    let console = vm.console.clone().context("no console")?;
    ensure!(
        console.wait(spore_native::DEADLINE, |text| text.contains("count 1\n").then_some(())).is_some(),
        "it does not count"
    );
    Ok(vm)
}

/// Restores and resumes; when the first was answered.
pub(super) fn restored(vm: &mut Vm, what: Restore) -> Result<Instant> {
    vm.restore(what).context("restore")?;
    let answered = Instant::now();
    ensure!(vm.call(Call::Resume)? == Reply::Done, "it does not resume");
    Ok(answered)
}

/// The plain way: all of the memory is read into a new machine's. The file is in the page cache.
fn full_copy(saved: &Saved, memory_mib: u64) -> Result<f64> {
    let begun = Instant::now();
    let mut left = usize::try_from(memory_mib << 20)?;
    let mut memory = Vec::with_capacity(left);
    for (_, file) in &saved.layers {
        let mut file = file.try_clone()?;
        std::io::Seek::rewind(&mut file)?;
        file.take(left as u64).read_to_end(&mut memory)?;
        left = left.saturating_sub(memory.len());
    }
    // A full copy has the zeroes too.
    memory.resize(usize::try_from(memory_mib << 20)?, 0);
    let last = memory.last().copied();
    ensure!(last.is_some(), "an empty machine");
    Ok(ms(begun.elapsed()))
}

/// [`MANY`] machines, [`IN_FLIGHT`] of them being made at a time; each has said its first word and stands still.
pub(super) fn at_once(make: impl Fn() -> Result<Vm> + Sync) -> Result<Vec<Vm>> {
    let (next, vms) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
    let panicked = || anyhow::anyhow!("a worker panicked");
    std::thread::scope(|scope| {
        let work = || -> Result<()> {
            while next.fetch_add(1, Ordering::Relaxed) < MANY {
                let mut vm = make()?;
                first_word(&vm)?;
                ensure!(vm.call(Call::Pause)? == Reply::Done, "it does not pause");
                vms.lock().map_err(|_| panicked())?.push(vm);
            }
            Ok(())
        };
        let workers: Vec<_> = (0..IN_FLIGHT).map(|_| scope.spawn(work)).collect();
        workers.into_iter().try_for_each(|worker| worker.join().map_err(|_| panicked())?)
    })?;
    vms.into_inner().map_err(|_| panicked())
}

/// Many of one snapshot, several at a time.
fn many(rounds: usize) -> Result<Vec<Row>> {
    const MEMORY_MIB: u64 = 2048;
    let saved = speaking(MEMORY_MIB, 64)?;
    let alone = Memory::new(MEMORY_MIB, 64, false)?;
    let (mut each, mut kernel) = (Vec::new(), Vec::new());
    for round in 0..=rounds.min(COPIES) {
        let reference = ms(alone.fork_and_build(REFERENCES)?);
        let begun = Instant::now();
        let vms = at_once(|| {
            let mut vm = Vm::spawn();
            restored(&mut vm, saved.restore())?;
            Ok(vm)
        })?;
        if round > 0 {
            each.push(ms(begun.elapsed()) / COUNT);
            kernel.push(reference);
        }
        drop(vms);
    }
    let name = format!(
        "restore, {MANY} of one snapshot with {IN_FLIGHT} in flight: each, beside a fork and a bare KVM VM"
    );
    Ok(vec![row(&name, &each).against(&Sample::new(kernel), None)])
}
