//! A container's counters as containerd, `ctr tasks metrics` and `docker stats` decode them:
//! `io.containerd.cgroups.v2.Metrics`, from the files of the guest's cgroup v2
//! (Linux `Documentation/admin-guide/cgroup-v2.rst`).
//!
//! The text comes from the guest: what cannot be read counts as 0, lists are bounded.

use std::collections::HashMap;

use containerd_shim_protos::cgroups_v2::metrics::{
    CPUStat, HugeTlbStat, IOEntry, IOStat, MemoryEvents, MemoryStat, Metrics, NetworkStat, PidsStat,
};
use protobuf::MessageField;

use crate::network::mirror::Counters;

/// Most disks that are told.
const MOST_DISKS: usize = 64;

pub(crate) fn metrics(files: &HashMap<String, String>, network: Vec<Counters>) -> Metrics {
    let has = |name: &str| files.contains_key(name);
    Metrics {
        pids: some(has("pids.current"), || PidsStat {
            current: number(files, "pids.current"),
            limit: limit(files, "pids.max", 0),
            ..Default::default()
        }),
        cpu: some(has("cpu.stat"), || cpu(files)),
        memory: some(has("memory.stat"), || memory(files)),
        memory_events: some(has("memory.events"), || memory_events(files)),
        io: some(has("io.stat"), || IOStat { usage: io(text(files, "io.stat")), ..Default::default() }),
        hugetlb: huge(files).into_iter().collect(),
        network: network.into_iter().map(interface).collect(),
        ..Default::default()
    }
}

/// The host's own counters, of the interface that the guest's is joined to.
fn interface(counters: Counters) -> NetworkStat {
    NetworkStat {
        name: counters.name,
        rx_bytes: counters.rx_bytes,
        rx_packets: counters.rx_packets,
        rx_errors: counters.rx_errors,
        rx_dropped: counters.rx_dropped,
        tx_bytes: counters.tx_bytes,
        tx_packets: counters.tx_packets,
        tx_errors: counters.tx_errors,
        tx_dropped: counters.tx_dropped,
        ..Default::default()
    }
}

fn some<T>(present: bool, make: impl FnOnce() -> T) -> MessageField<T> {
    present.then(make).into()
}

fn text<'a>(files: &'a HashMap<String, String>, name: &str) -> &'a str {
    files.get(name).map_or("", String::as_str)
}

fn number(files: &HashMap<String, String>, name: &str) -> u64 {
    text(files, name).trim().parse().unwrap_or(0)
}

/// A limit; `unlimited` stands for "max".
fn limit(files: &HashMap<String, String>, name: &str, unlimited: u64) -> u64 {
    match text(files, name).trim() {
        "max" => unlimited,
        number => number.parse().unwrap_or(0),
    }
}

/// A value of a file with one "name value" a line.
fn field(text: &str, name: &str) -> u64 {
    let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    value.and_then(|value| value.trim().parse().ok()).unwrap_or(0)
}

fn cpu(files: &HashMap<String, String>) -> CPUStat {
    let value = |name| field(text(files, "cpu.stat"), name);
    CPUStat {
        usage_usec: value("usage_usec"),
        user_usec: value("user_usec"),
        system_usec: value("system_usec"),
        nr_periods: value("nr_periods"),
        nr_throttled: value("nr_throttled"),
        throttled_usec: value("throttled_usec"),
        nr_bursts: value("nr_bursts"),
        burst_usec: value("burst_usec"),
        ..Default::default()
    }
}

fn memory(files: &HashMap<String, String>) -> MemoryStat {
    let value = |name| field(text(files, "memory.stat"), name);
    MemoryStat {
        anon: value("anon"),
        file: value("file"),
        kernel_stack: value("kernel_stack"),
        slab: value("slab"),
        sock: value("sock"),
        shmem: value("shmem"),
        file_mapped: value("file_mapped"),
        file_dirty: value("file_dirty"),
        file_writeback: value("file_writeback"),
        anon_thp: value("anon_thp"),
        inactive_anon: value("inactive_anon"),
        active_anon: value("active_anon"),
        inactive_file: value("inactive_file"),
        active_file: value("active_file"),
        unevictable: value("unevictable"),
        slab_reclaimable: value("slab_reclaimable"),
        slab_unreclaimable: value("slab_unreclaimable"),
        pgfault: value("pgfault"),
        pgmajfault: value("pgmajfault"),
        workingset_refault: value("workingset_refault_anon").saturating_add(value("workingset_refault_file")),
        workingset_activate: value("workingset_activate_anon")
            .saturating_add(value("workingset_activate_file")),
        workingset_nodereclaim: value("workingset_nodereclaim"),
        pgrefill: value("pgrefill"),
        pgscan: value("pgscan"),
        pgsteal: value("pgsteal"),
        pgactivate: value("pgactivate"),
        pgdeactivate: value("pgdeactivate"),
        pglazyfree: value("pglazyfree"),
        pglazyfreed: value("pglazyfreed"),
        thp_fault_alloc: value("thp_fault_alloc"),
        thp_collapse_alloc: value("thp_collapse_alloc"),
        usage: number(files, "memory.current"),
        usage_limit: limit(files, "memory.max", u64::MAX),
        swap_usage: number(files, "memory.swap.current"),
        swap_limit: limit(files, "memory.swap.max", u64::MAX),
        max_usage: number(files, "memory.peak"),
        ..Default::default()
    }
}

fn memory_events(files: &HashMap<String, String>) -> MemoryEvents {
    let value = |name| field(text(files, "memory.events"), name);
    MemoryEvents {
        low: value("low"),
        high: value("high"),
        max: value("max"),
        oom: value("oom"),
        oom_kill: value("oom_kill"),
        oom_group_kill: value("oom_group_kill"),
        ..Default::default()
    }
}

/// "254:0 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=0 dios=0" a disk.
fn io(text: &str) -> Vec<IOEntry> {
    let entry = |line: &str| {
        let mut words = line.split_whitespace();
        let (major, minor) = words.next()?.split_once(':')?;
        let values: HashMap<&str, u64> = words
            .filter_map(|word| word.split_once('='))
            .filter_map(|(name, value)| Some((name, value.parse().ok()?)))
            .collect();
        let value = |name| values.get(name).copied().unwrap_or(0);
        Some(IOEntry {
            major: major.parse().ok()?,
            minor: minor.parse().ok()?,
            rbytes: value("rbytes"),
            wbytes: value("wbytes"),
            rios: value("rios"),
            wios: value("wios"),
            ..Default::default()
        })
    };
    text.lines().filter_map(entry).take(MOST_DISKS).collect()
}

fn huge(files: &HashMap<String, String>) -> Option<HugeTlbStat> {
    files.contains_key("hugetlb.2MB.current").then(|| HugeTlbStat {
        current: number(files, "hugetlb.2MB.current"),
        max: limit(files, "hugetlb.2MB.max", u64::MAX),
        pagesize: "2MB".into(),
        ..Default::default()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn files(of: &[(&str, &str)]) -> HashMap<String, String> {
        of.iter().map(|(name, text)| ((*name).to_owned(), (*text).to_owned())).collect()
    }

    #[test]
    fn counters_are_read_by_their_whole_names() {
        let told = metrics(
            &files(&[
                ("cpu.stat", "usage_usec 30\nuser_usec 20\nsystem_usec 10\n"),
                (
                    "memory.stat",
                    "anon 5\nfile 7\nfile_mapped 3\nworkingset_refault_anon 1\nworkingset_refault_file 2\n",
                ),
                ("memory.current", "4096\n"),
                ("memory.max", "max\n"),
                ("pids.current", "2\n"),
                ("pids.max", "max\n"),
                ("io.stat", "254:0 rbytes=512 wbytes=1024 rios=1 wios=2 dbytes=0 dios=0\n254:16 \n"),
            ]),
            vec![Counters { name: "eth0".into(), rx_bytes: 7, tx_packets: 3, ..Counters::default() }],
        );
        let [eth0] = &told.network[..] else { panic!("{:?}", told.network) };
        assert_eq!((eth0.name.as_str(), eth0.rx_bytes, eth0.tx_packets), ("eth0", 7, 3));
        assert_eq!((told.cpu.usage_usec, told.cpu.system_usec), (30, 10));
        assert_eq!((told.memory.file, told.memory.file_mapped, told.memory.workingset_refault), (7, 3, 3));
        assert_eq!((told.memory.usage, told.memory.usage_limit), (4096, u64::MAX));
        assert_eq!((told.pids.current, told.pids.limit), (2, 0));
        assert_eq!((told.io.usage.len(), told.io.usage[0].major, told.io.usage[0].wbytes), (2, 254, 1024));
        assert!(told.hugetlb.is_empty() && told.memory_events.is_none());
    }

    #[test]
    fn a_guests_nonsense_counts_as_nothing() {
        let disks = "7:7 rbytes=1\n".repeat(10_000);
        let told = metrics(
            &files(&[
                ("cpu.stat", "usage_usec -1\nuser_usec\nsystem_usec99"),
                (
                    "memory.stat",
                    "\u{1b}[2J\nworkingset_refault_anon 18446744073709551615\nworkingset_refault_file 1\n",
                ),
                ("memory.current", "99999999999999999999999"),
                ("io.stat", &disks),
            ]),
            Vec::new(),
        );
        assert_eq!((told.cpu.usage_usec, told.cpu.user_usec, told.cpu.system_usec), (0, 0, 0));
        assert_eq!((told.memory.usage, told.io.usage.len()), (0, MOST_DISKS));
    }
}
