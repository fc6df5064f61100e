//! What machines of one snapshot take of the host's memory, each, by how many there are.

use std::fs;

use anyhow::{Context, Result, ensure};
use spore_native::{Restore, Vm};

use super::guest;
use crate::report::Row;
use crate::stats::Sample;

const MEMORY_MIB: u64 = 2048;
const WRITTEN_MIB: u64 = 64;
const COUNTS: [usize; 4] = [1, 10, 50, 100];
/// Of these each has written something, too: single MiB, far apart, where nothing was before.
const WRITERS: usize = 10;
const PLACES_MIB: std::ops::Range<u64> = 256..320;
const APART_MIB: usize = 8;
/// Of an idle one, beside what its guest wrote.
const TARGET_KIB: f64 = 1536.0;

pub(super) fn rows() -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    for (what, huge_pages) in [("restored", false), ("restored, huge pages", true)] {
        let saved = guest(MEMORY_MIB, WRITTEN_MIB, huge_pages)?.snapshot("a", &[]);
        let restore = || Restore { huge_pages, ..saved.restore() }.run();
        rows.extend(of(what, !huge_pages, restore)?);
    }
    let mut source = guest(MEMORY_MIB, WRITTEN_MIB, false)?;
    let mut zygote = source.zygote("z", &[])?;
    rows.extend(of("cloned", true, || Restore::inherited().run_in(zygote.fork()))?);
    Ok(rows)
}

/// Of machines as `make` makes them.
fn of(kind: &str, bounded: bool, mut make: impl FnMut() -> Vm) -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    let mut vms: Vec<Vm> = Vec::new();
    for count in COUNTS {
        while vms.len() < count {
            let mut vm = make();
            // It has run, and is idle.
            ensure!(vm.run("hello").contains("ok hello"), "the guest does not answer");
            vms.push(vm);
        }
        let what = format!("{kind}, {count} alive");
        let [unique, proportional] = each(&what, &vms)?;
        // What one alone has of the files is shared with nobody.
        let bounded = bounded && count > 1;
        rows.extend([if bounded { unique.at_most(TARGET_KIB) } else { unique }, proportional]);
        if count == WRITERS {
            for vm in &mut vms {
                for at in PLACES_MIB.step_by(APART_MIB) {
                    ensure!(
                        vm.run(&format!("store,{at},1,9")).contains("ok store"),
                        "the guest does not write"
                    );
                }
            }
            rows.extend(each(&format!("{what}, each has written 8 MiB in 8 places"), &vms)?);
            vms.clear();
        }
    }
    Ok(rows)
}

fn each(what: &str, vms: &[Vm]) -> Result<[Row; 2]> {
    let memory = vms.iter().map(|vm| memory_of(vm.pid())).collect::<Result<Vec<_>>>()?;
    let (unique, proportional) = memory.into_iter().unzip();
    let row = |kind: &str, values| Row::new(&format!("{what}: {kind}, each"), "KiB", &Sample::new(values));
    Ok([row("unique", unique), row("proportional", proportional)])
}

/// KiB that are the process's own, and its part of all that it has.
fn memory_of(pid: u32) -> Result<(f64, f64)> {
    let path = format!("/proc/{pid}/smaps_rollup");
    let text = fs::read_to_string(&path).with_context(|| format!("reading {path}"))?;
    let kib = |key: &str| -> Result<f64> {
        let value = text
            .lines()
            .find_map(|line| line.strip_prefix(key)?.trim().strip_suffix(" kB")?.trim().parse().ok());
        value.with_context(|| format!("{path} has no {key}"))
    };
    Ok((kib("Private_Clean:")? + kib("Private_Dirty:")?, kib("Pss:")?))
}
