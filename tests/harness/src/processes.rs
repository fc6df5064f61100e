//! Processes of the ground, by what their command lines and their parents' say: which VMM and which
//! shim are a container's, and what they use.

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::wait;

const APPEAR: Duration = Duration::from_secs(60);
/// Of /proc/stat, proc(5): USER_HZ.
const TICKS: f64 = 100.0;

/// Waits for a process whose command line contains all of `words`.
pub fn process(words: &[&str]) -> Result<Pid> {
    wait::until(&format!("a process {words:?} appears"), APPEAR, || find(words))
}

/// As [`process`], without waiting.
pub fn find(words: &[&str]) -> Option<Pid> {
    processes().find(|(_, command)| words.iter().all(|word| command.contains(word))).map(|(pid, _)| pid)
}

fn processes() -> impl Iterator<Item = (Pid, String)> {
    fs::read_dir("/proc").into_iter().flatten().flatten().filter_map(|entry| {
        let pid = Pid::from_raw(entry.file_name().to_str()?.parse().ok()?);
        Some((pid, command_of(pid)?))
    })
}

fn command_of(pid: Pid) -> Option<String> {
    let command = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
    Some(String::from_utf8_lossy(&command).replace('\0', " "))
}

/// Waits for a process whose command line contains `word` and whose parent's contains all of
/// `words_of_parent`; both.
pub fn child_and_parent(word: &str, words_of_parent: &[&str]) -> Result<(Pid, Pid)> {
    wait::until(&format!("a child {word:?} of {words_of_parent:?} appears"), APPEAR, || {
        find_child(word, words_of_parent)
    })
}

/// As [`child_and_parent`], without waiting.
pub fn find_child(word: &str, words_of_parent: &[&str]) -> Option<(Pid, Pid)> {
    processes().find_map(|(child, command)| {
        let parent = parent(child).filter(|_| command.contains(word))?;
        let command = command_of(parent)?;
        words_of_parent.iter().all(|word| command.contains(word)).then_some((child, parent))
    })
}

fn parent(pid: Pid) -> Option<Pid> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("PPid:"))?;
    Some(Pid::from_raw(line.trim().parse().ok()?))
}

/// SIGKILL.
pub fn kill_hard(pid: Pid) -> Result<()> {
    kill(pid, Signal::SIGKILL).with_context(|| format!("killing process {pid}"))
}

/// SIGSTOP; returns when it stands still.
pub fn halt(pid: Pid) -> Result<()> {
    kill(pid, Signal::SIGSTOP).with_context(|| format!("stopping process {pid}"))?;
    let stopped = || {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
        status.lines().any(|line| line.starts_with("State:\tT")).then_some(())
    };
    wait::until("the process stands still", APPEAR, stopped)
}

/// What a process uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Use {
    pub descriptors: usize,
    pub threads: usize,
    /// Resident memory in KiB, that of a guest included.
    pub resident_kib: u64,
}

impl Use {
    pub fn of(pid: Pid) -> Result<Self> {
        let count =
            |what: &str| Ok::<_, std::io::Error>(fs::read_dir(format!("/proc/{pid}/{what}"))?.count());
        let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
        let resident = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let resident = resident.and_then(|text| text.split_whitespace().next()?.parse().ok());
        Ok(Self {
            descriptors: count("fd")?,
            threads: count("task")?,
            resident_kib: resident.with_context(|| format!("process {pid} has no memory"))?,
        })
    }
}

/// Seconds since the machine started that its CPUs were not idle; a guest's time is a user's.
pub fn busy_seconds() -> Result<f64> {
    let text = fs::read_to_string("/proc/stat")?;
    let line = text.lines().next().and_then(|line| line.strip_prefix("cpu ")).context("/proc/stat")?;
    let ticks: Vec<f64> = line.split_whitespace().map_while(|word| word.parse().ok()).collect();
    // user, nice, system; then idle and iowait; then irq, softirq, steal.
    Ok((ticks.iter().take(3).sum::<f64>() + ticks.iter().skip(5).take(3).sum::<f64>()) / TICKS)
}
