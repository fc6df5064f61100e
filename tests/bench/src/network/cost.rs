//! What traffic costs, from outside: the machine's CPU time, and of a VMM the exits of its guest and the
//! wake-ups of its event loop, for each frame that its interface moves.
//!
//! Exits and injected interrupts are KVM's own counts in debugfs
//! (`/sys/kernel/debug/kvm/PID-DESCRIPTOR`); where there is no debugfs, there are no such figures.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use nix::mount::{MsFlags, mount};
use nix::unistd::Pid;
use spore_harness::processes;

use super::yard::Member;

const DEBUG: &str = "/sys/kernel/debug";

/// Of one measurement.
pub(super) struct Cost {
    /// Seconds that the machine's CPUs were not idle.
    pub(super) cpu_s: f64,
    /// For each frame.
    pub(super) exits: Option<f64>,
    pub(super) interrupts: Option<f64>,
    pub(super) wakeups: Option<f64>,
}

#[derive(Clone, Copy)]
struct Counts {
    busy: f64,
    frames: f64,
    exits: Option<f64>,
    interrupts: Option<f64>,
    wakeups: Option<f64>,
}

/// Does something, and looks at the counters before and after.
pub(super) fn costing<T>(member: &Member, act: impl FnOnce() -> Result<T>) -> Result<(T, Cost)> {
    let before = Counts::of(member)?;
    let done = act()?;
    let after = Counts::of(member)?;
    let frames = (after.frames - before.frames).max(1.0);
    let each = |of: fn(&Counts) -> Option<f64>| Some((of(&after)? - of(&before)?) / frames);
    let cost = Cost {
        cpu_s: after.busy - before.busy,
        exits: each(|counts| counts.exits),
        interrupts: each(|counts| counts.interrupts),
        wakeups: each(|counts| counts.wakeups),
    };
    Ok((done, cost))
}

impl Counts {
    fn of(member: &Member) -> Result<Self> {
        let machine = member.vmm.and_then(machine);
        let count = |name: &str| number(&fs::read_to_string(machine.as_ref()?.join(name)).ok()?);
        Ok(Self {
            busy: processes::busy_seconds()?,
            frames: member.space.within(frames)?,
            exits: count("exits"),
            interrupts: count("irq_injections"),
            wakeups: member.vmm.and_then(wakeups),
        })
    }
}

fn number(text: &str) -> Option<f64> {
    text.trim().parse().ok()
}

/// KVM's directory of a process's machine.
fn machine(vmm: Pid) -> Option<PathBuf> {
    let kvm = Path::new(DEBUG).join("kvm");
    if !kvm.exists() {
        mount(Some("debugfs"), DEBUG, Some("debugfs"), MsFlags::empty(), None::<&str>).ok()?;
    }
    let prefix = format!("{vmm}-");
    let mut entries = fs::read_dir(kvm).ok()?.flatten();
    entries.find(|entry| entry.file_name().to_string_lossy().starts_with(&prefix)).map(|entry| entry.path())
}

/// How often the process's first thread, its event loop, has waited for something.
fn wakeups(vmm: Pid) -> Option<f64> {
    let status = fs::read_to_string(format!("/proc/{vmm}/task/{vmm}/status")).ok()?;
    number(status.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"))?)
}

/// Frames that the thread's namespace has received and sent by its interface.
fn frames() -> Result<f64> {
    let text = fs::read_to_string("/proc/thread-self/net/dev")?;
    let line = text.lines().find_map(|line| line.trim_start().strip_prefix("eth0:")).context("no eth0")?;
    let fields: Vec<f64> = line.split_whitespace().map_while(|word| word.parse().ok()).collect();
    // Bytes, packets and six more received; then the same sent.
    fields.get(1).zip(fields.get(9)).map(|(received, sent)| received + sent).context("net/dev")
}
