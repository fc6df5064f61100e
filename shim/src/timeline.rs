//! When the phases of a sandbox happened, for `make bench`: one JSON line per sandbox in
//! the file that the configuration's `timeline` names. Times are CLOCK_MONOTONIC
//! nanoseconds of the host.

use std::fs::OpenOptions;
use std::io::Write;
use std::path::Path;

use nix::time::{ClockId, clock_gettime};
use serde_json::{Map, Value};

/// Environment variable by which `start` tells the daemon when it began.
pub(crate) const START_VARIABLE: &str = "SPORE_SHIM_START_NS";

/// CLOCK_MONOTONIC in nanoseconds.
pub(crate) fn now_ns() -> u64 {
    clock_gettime(ClockId::CLOCK_MONOTONIC).map_or(0, |time| {
        let seconds = u64::try_from(time.tv_sec()).unwrap_or(0);
        seconds * 1_000_000_000 + u64::try_from(time.tv_nsec()).unwrap_or(0)
    })
}

/// Collected facts; written once.
#[derive(Debug, Default)]
pub(crate) struct Timeline(Map<String, Value>);

impl Timeline {
    /// Records that `event` happens now. The first time counts.
    pub(crate) fn mark(&mut self, event: &'static str) {
        self.set(event, now_ns());
    }

    pub(crate) fn set(&mut self, key: &'static str, value: impl Into<Value>) {
        self.0.entry(key).or_insert(value.into());
    }

    /// The last one counts.
    pub(crate) fn put(&mut self, key: &'static str, value: impl Into<Value>) {
        self.0.insert(key.into(), value.into());
    }

    /// Appends the line. One `write(2)` with O_APPEND: lines of concurrent shims do not mix.
    pub(crate) fn write(&self, path: &Path) -> std::io::Result<()> {
        let mut line = serde_json::to_string(&self.0)?;
        line.push('\n');
        OpenOptions::new().append(true).create(true).open(path)?.write_all(line.as_bytes())
    }
}

/// Resident KiB of a process (RssAnon + RssFile of `/proc/<pid>/status`).
pub(crate) fn rss_kib(pid: u32) -> Option<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    Some(field(&status, "RssAnon:")? + field(&status, "RssFile:")?)
}

/// Resident KiB of a VMM beside guest memory, and of guest memory: mappings of at least
/// half the guest's size that are not file-backed count as guest memory.
pub(crate) fn vmm_rss_kib(pid: u32, memory_mib: u64) -> Option<(u64, u64)> {
    let smaps = std::fs::read_to_string(format!("/proc/{pid}/smaps")).ok()?;
    let (mut own, mut guest, mut size) = (0, 0, 0);
    for line in smaps.lines() {
        if let Some(kib) = field(line, "Size:") {
            size = kib;
        } else if let Some(kib) = field(line, "Rss:") {
            // The split around the 32-bit hole makes two mappings of one guest.
            let threshold = (memory_mib.min(3072) * 1024) / 2;
            *(if size >= threshold { &mut guest } else { &mut own }) += kib;
        }
    }
    Some((own, guest))
}

fn field(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find(|line| line.starts_with(name))?;
    line.split_whitespace().nth(1)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_appended_whole_and_the_first_mark_counts() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("timeline");
        let mut timeline = Timeline::default();
        timeline.set("id", "web");
        timeline.mark("create_ns");
        timeline.set("create_ns", 1u64);
        timeline.write(&path).unwrap();
        timeline.write(&path).unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        let lines: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert_eq!(lines.len(), 2);
        assert_eq!(lines[0]["id"], "web");
        assert!(lines[0]["create_ns"].as_u64().unwrap() > 1);
    }

    #[test]
    fn our_own_memory_is_found() {
        assert!(rss_kib(std::process::id()).unwrap() > 100);
        let (own, _) = vmm_rss_kib(std::process::id(), 1024).unwrap();
        assert!(own > 100);
    }
}
