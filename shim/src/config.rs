//! What the operator decides (`/etc/spore/config.toml`), what a container may ask for
//! (`io.spore.*` annotations), and the VM size class that follows from both and from
//! the OCI limits. The exact limit is the guest cgroup's; the class only has to hold it.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;
use spore_vmm::api::{MAX_MEMORY_MIB, MAX_VCPUS, MIN_MEMORY_MIB};

/// Where the configuration is looked for, unless `SPORE_CONFIG` names another file.
pub(crate) const PATH: &str = "/etc/spore/config.toml";
/// Environment variable that names another configuration file (tests, several installs).
pub(crate) const PATH_VARIABLE: &str = "SPORE_CONFIG";

const PREFIX: &str = "io.spore.";
const ALLOWED: [&str; 10] = [
    // See `crate::clone`.
    "clone-from",
    "vcpus",
    "memory_mib",
    "writable_size_mib",
    "export_changes",
    "debug",
    "network_rx_bytes_per_second",
    "network_rx_packets_per_second",
    "network_tx_bytes_per_second",
    "network_tx_packets_per_second",
];
/// Bytes of memory below which a container's init cannot be held.
pub(crate) const LEAST_MEMORY: u64 = 4 << 20;
/// Memory that the guest's kernel and agent need beside the container's.
pub(crate) const GUEST_OVERHEAD_MIB: u64 = 64;
/// Smallest class that is chosen from a limit.
const SMALLEST_CLASS_MIB: u64 = 128;
const MIN_WRITABLE_MIB: u64 = 16;
const MAX_WRITABLE_MIB: u64 = 16 * 1024 * 1024;

#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("configuration {path}: cannot be read: {source}")]
    Read { path: PathBuf, source: std::io::Error },
    #[error("configuration {path}: {detail}; see shim/README.md for the keys")]
    Parse { path: PathBuf, detail: String },
    #[error("configuration {path}: {key} is {found}, allowed is {allowed}")]
    Value { path: PathBuf, key: &'static str, found: String, allowed: String },
    #[error(
        "annotation {name}: not one that a container may set; allowed are io.spore.{}",
        ALLOWED.join(", io.spore.")
    )]
    AnnotationNotAllowed { name: String },
    #[error("annotation {name}: value {found:?} is not allowed, expected {allowed}")]
    AnnotationValue { name: String, found: String, allowed: String },
    #[error(
        "linux.resources.cpu.cpus names CPU {last}; the container's machine has CPUs 0 to {}: name lower ones{}",
        vcpus - 1,
        if *vcpus < MAX_VCPUS { ", or raise io.spore.vcpus" } else { "" }
    )]
    Cpuset { last: u64, vcpus: u8 },
}

/// `config.toml`; every key is optional.
#[derive(Debug, Clone, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    pub kernel: PathBuf,
    pub initramfs: PathBuf,
    pub vmm: PathBuf,
    /// The server of volumes, started for a sandbox that has some.
    pub file_server: PathBuf,
    /// vCPUs of a container without CPU limits.
    pub(crate) vcpus: u8,
    /// Memory of a container without a memory limit.
    pub(crate) memory_mib: u64,
    /// Appended to the VMM's default kernel command line.
    pub(crate) kernel_args: String,
    pub state_dir: PathBuf,
    pub run_dir: PathBuf,
    /// Size of a new writable layer.
    pub(crate) writable_size_mib: u64,
    /// Whether clients that commit, diff or copy see what a container changed.
    pub(crate) export_changes: bool,
    /// Whether guests are restored from templates of booted ones.
    pub(crate) boot_templates: bool,
    /// Whether guests' memory comes in huge pages.
    pub(crate) huge_pages: bool,
    /// From VMM start until the agent answers.
    pub(crate) boot_deadline_s: u64,
    pub(crate) debug: bool,
    /// A file that gets one JSON line of times per sandbox.
    pub(crate) timeline: Option<PathBuf>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            kernel: "/usr/local/lib/spore/vmlinux".into(),
            initramfs: "/usr/local/lib/spore/initramfs".into(),
            vmm: "/usr/local/libexec/spore/spore-vmm".into(),
            file_server: "/usr/local/libexec/spore/spore-fs".into(),
            vcpus: 1,
            memory_mib: 256,
            kernel_args: String::new(),
            state_dir: "/var/lib/spore".into(),
            run_dir: "/run/spore".into(),
            writable_size_mib: 10240,
            export_changes: true,
            boot_templates: true,
            huge_pages: false,
            boot_deadline_s: 60,
            debug: false,
            timeline: None,
        }
    }
}

/// CPU and memory limits of the OCI spec.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Limits {
    /// CPU time per period, both in microseconds.
    pub(crate) quota: Option<(u64, u64)>,
    /// The last CPU of the cpuset: the guest's cgroup has the same numbers.
    pub(crate) last_cpu: Option<u64>,
    /// Bytes.
    pub(crate) memory: Option<u64>,
}

/// The machine of one sandbox.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Machine {
    pub(crate) vcpus: u8,
    pub(crate) memory_mib: u64,
    pub(crate) huge_pages: bool,
    pub(crate) writable_size_mib: u64,
    pub(crate) export_changes: bool,
    pub(crate) debug: bool,
    pub(crate) network: NetworkLimits,
}

/// How much of one kind may pass in a second; 0: any amount.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Rate {
    pub(crate) bytes: u64,
    pub(crate) packets: u64,
}

/// What the container may receive and send by each of its interfaces.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct NetworkLimits {
    pub(crate) received: Rate,
    pub(crate) sent: Rate,
}

impl Config {
    /// Reads the file; a missing one means defaults, unless it was named explicitly.
    pub fn load() -> Result<Self, ConfigError> {
        match std::env::var_os(PATH_VARIABLE) {
            Some(path) => Self::read(Path::new(&path)),
            None if Path::new(PATH).exists() => Self::read(Path::new(PATH)),
            None => Ok(Self::default()),
        }
    }

    fn read(path: &Path) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(path)
            .map_err(|source| ConfigError::Read { path: path.into(), source })?;
        Self::parse(path, &text)
    }

    fn parse(path: &Path, text: &str) -> Result<Self, ConfigError> {
        let config: Self = toml::from_str(text).map_err(|error| ConfigError::Parse {
            path: path.into(),
            detail: error.to_string().trim().replace('\n', " "),
        })?;
        let value = |key, found: String, allowed: String| ConfigError::Value {
            path: path.into(),
            key,
            found,
            allowed,
        };
        if !(1..=MAX_VCPUS).contains(&config.vcpus) {
            return Err(value("vcpus", config.vcpus.to_string(), format!("1 to {MAX_VCPUS}")));
        }
        if !(MIN_MEMORY_MIB..=MAX_MEMORY_MIB).contains(&config.memory_mib) {
            let allowed = format!("{MIN_MEMORY_MIB} to {MAX_MEMORY_MIB}");
            return Err(value("memory_mib", config.memory_mib.to_string(), allowed));
        }
        if !(MIN_WRITABLE_MIB..=MAX_WRITABLE_MIB).contains(&config.writable_size_mib) {
            let allowed = format!("{MIN_WRITABLE_MIB} to {MAX_WRITABLE_MIB}");
            return Err(value("writable_size_mib", config.writable_size_mib.to_string(), allowed));
        }
        if !(1..=3600).contains(&config.boot_deadline_s) {
            return Err(value("boot_deadline_s", config.boot_deadline_s.to_string(), "1 to 3600".into()));
        }
        for (key, dir) in [("state_dir", &config.state_dir), ("run_dir", &config.run_dir)] {
            if !dir.is_absolute() {
                return Err(value(key, dir.display().to_string(), "an absolute path".into()));
            }
        }
        if !config.kernel_args.is_ascii() || config.kernel_args.contains(['\0', '\n']) {
            return Err(value(
                "kernel_args",
                format!("{:?}", config.kernel_args),
                "one line of ASCII".into(),
            ));
        }
        Ok(config)
    }

    pub(crate) fn boot_deadline(&self) -> Duration {
        Duration::from_secs(self.boot_deadline_s)
    }

    /// The machine for a container: annotations first, then limits, then defaults.
    pub(crate) fn machine(
        &self,
        annotations: &HashMap<String, String>,
        limits: &Limits,
    ) -> Result<Machine, ConfigError> {
        for name in annotations.keys() {
            if name.strip_prefix(PREFIX).is_some_and(|key| !ALLOWED.contains(&key)) {
                return Err(ConfigError::AnnotationNotAllowed { name: name.clone() });
            }
        }
        let number = |key: &str, min: u64, max: u64| -> Result<Option<u64>, ConfigError> {
            let name = format!("{PREFIX}{key}");
            let Some(text) = annotations.get(&name) else { return Ok(None) };
            match text.parse::<u64>() {
                Ok(value) if (min..=max).contains(&value) => Ok(Some(value)),
                _ => Err(ConfigError::AnnotationValue {
                    name,
                    found: text.clone(),
                    allowed: format!("a number from {min} to {max}"),
                }),
            }
        };
        let vcpus = number("vcpus", 1, u64::from(MAX_VCPUS))?
            .or_else(|| limits.vcpus())
            .map_or(self.vcpus, |count| u8::try_from(count).unwrap_or(MAX_VCPUS).clamp(1, MAX_VCPUS));
        if let Some(last) = limits.last_cpu.filter(|last| *last >= u64::from(vcpus)) {
            return Err(ConfigError::Cpuset { last, vcpus });
        }
        let memory_mib = number("memory_mib", MIN_MEMORY_MIB, MAX_MEMORY_MIB)?
            .or_else(|| limits.memory.map(|bytes| memory_class(bytes, host_memory_mib())))
            .unwrap_or(self.memory_mib);
        let writable_size_mib = number("writable_size_mib", MIN_WRITABLE_MIB, MAX_WRITABLE_MIB)?
            .unwrap_or(self.writable_size_mib);
        let rate = |direction: &str| -> Result<Rate, ConfigError> {
            let limit = |what: &str| number(&format!("network_{direction}_{what}_per_second"), 1, u64::MAX);
            Ok(Rate { bytes: limit("bytes")?.unwrap_or(0), packets: limit("packets")?.unwrap_or(0) })
        };
        let network = NetworkLimits { received: rate("rx")?, sent: rate("tx")? };
        let switch = |key: &str, default: bool| {
            let name = format!("{PREFIX}{key}");
            match annotations.get(&name).map(String::as_str) {
                None => Ok(default),
                Some("true" | "1") => Ok(true),
                Some("false" | "0") => Ok(false),
                Some(other) => Err(ConfigError::AnnotationValue {
                    name,
                    found: other.into(),
                    allowed: "\"true\" or \"false\"".into(),
                }),
            }
        };
        let export_changes = switch("export_changes", self.export_changes)?;
        let debug = switch("debug", self.debug)?;
        let huge_pages = self.huge_pages;
        Ok(Machine { vcpus, memory_mib, huge_pages, writable_size_mib, export_changes, debug, network })
    }
}

impl Limits {
    fn vcpus(&self) -> Option<u64> {
        let quota = || {
            let (quota, period) = self.quota.filter(|(_, period)| *period > 0)?;
            Some(quota.div_ceil(period).max(1))
        };
        self.last_cpu.map(|last| last.saturating_add(1)).or_else(quota)
    }
}

/// The smallest class that holds `bytes` and the guest itself. Classes are the powers of
/// two and their midpoints, and above the last of them that the host has, the host's own
/// size. A limit beyond the host's memory limits nothing: the largest class but that.
fn memory_class(bytes: u64, host_mib: u64) -> u64 {
    let need = bytes.div_ceil(1 << 20).saturating_add(GUEST_OVERHEAD_MIB);
    let most = host_mib.min(MAX_MEMORY_MIB);
    let mut class = SMALLEST_CLASS_MIB;
    while class < need {
        let next = if class.is_power_of_two() { class + class / 2 } else { (class / 3) * 4 };
        if next > most {
            return if need <= most { most } else { class };
        }
        class = next;
    }
    class
}

/// Whether there can be such a machine.
pub(crate) fn is_machine(vcpus: u8, memory_mib: u64) -> bool {
    (1..=MAX_VCPUS).contains(&vcpus) && (MIN_MEMORY_MIB..=MAX_MEMORY_MIB).contains(&memory_mib)
}

fn host_memory_mib() -> u64 {
    std::fs::read_to_string("/proc/meminfo")
        .ok()
        .and_then(|text| {
            let line = text.lines().find(|line| line.starts_with("MemTotal:"))?;
            line.split_whitespace().nth(1)?.parse::<u64>().ok()
        })
        .map_or(MAX_MEMORY_MIB, |kib| kib / 1024)
}

/// First and last CPU of each part of a cpuset list such as `0-3,8`.
fn cpuset(list: &str) -> Option<Vec<(u64, u64)>> {
    let parts = list.split(',').map(str::trim).filter(|part| !part.is_empty());
    let range = |part: &str| {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last) = (first.parse().ok()?, last.parse().ok()?);
        (first <= last).then_some((first, last))
    };
    parts.map(range).collect()
}

/// The last CPU of a cpuset list.
pub(crate) fn cpuset_last(list: &str) -> Option<u64> {
    cpuset(list)?.into_iter().map(|(_, last)| last).max()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Config, ConfigError> {
        Config::parse(Path::new("/etc/spore/config.toml"), text)
    }

    fn annotations(pairs: &[(&str, &str)]) -> HashMap<String, String> {
        pairs.iter().map(|(k, v)| ((*k).to_string(), (*v).to_string())).collect()
    }

    #[test]
    fn an_empty_file_means_the_documented_defaults() {
        let config = parse("").unwrap();
        assert_eq!((config.vcpus, config.memory_mib, config.writable_size_mib), (1, 256, 10240));
        assert_eq!(config.boot_deadline(), Duration::from_secs(60));
        assert_eq!(config.state_dir, Path::new("/var/lib/spore"));
    }

    #[test]
    fn errors_name_the_file_the_key_and_what_is_allowed() {
        for (text, needle) in [
            ("vcpu = 2", "unknown field `vcpu`"),
            ("vcpus = 33", "vcpus is 33, allowed is 1 to 32"),
            ("memory_mib = 8", "memory_mib is 8, allowed is 64 to"),
            ("state_dir = \"var\"", "state_dir is var, allowed is an absolute path"),
            ("boot_deadline_s = 0", "boot_deadline_s is 0"),
            ("kernel_args = \"a\\nb\"", "one line of ASCII"),
            ("vcpus = ", "configuration /etc/spore/config.toml"),
        ] {
            let message = parse(text).unwrap_err().to_string();
            assert!(message.contains(needle), "{text}: {message}");
        }
    }

    #[test]
    fn limits_choose_the_class_and_annotations_overrule_them() {
        let config = Config::default();
        let limits = Limits { quota: Some((150_000, 100_000)), last_cpu: None, memory: Some(200 << 20) };
        let machine = config.machine(&HashMap::new(), &limits).unwrap();
        assert_eq!((machine.vcpus, machine.memory_mib), (2, 384));
        let wanted = annotations(&[("io.spore.vcpus", "4"), ("io.spore.memory_mib", "300"), ("other", "x")]);
        let machine = config.machine(&wanted, &limits).unwrap();
        assert_eq!((machine.vcpus, machine.memory_mib), (4, 300));
    }

    #[test]
    fn a_machine_has_the_cpus_that_its_container_s_set_names() {
        let config = Config::default();
        let limits = |last_cpu, quota| Limits { last_cpu, quota, memory: None };
        let vcpus = |limits: &Limits, set: &[(&str, &str)]| {
            config.machine(&annotations(set), limits).map(|it| it.vcpus)
        };
        assert_eq!(vcpus(&limits(cpuset_last("1"), None), &[]).unwrap(), 2);
        assert_eq!(vcpus(&limits(cpuset_last("0-2,5"), Some((50_000, 100_000))), &[]).unwrap(), 6);
        assert_eq!(vcpus(&limits(Some(1), None), &[("io.spore.vcpus", "4")]).unwrap(), 4);
        let refused = |limits: &Limits, set: &[(&str, &str)]| vcpus(limits, set).unwrap_err().to_string();
        let few = refused(&limits(Some(3), None), &[("io.spore.vcpus", "2")]);
        assert!(
            few.contains("CPU 3") && few.contains("0 to 1") && few.ends_with("raise io.spore.vcpus"),
            "{few}"
        );
        let none = refused(&limits(Some(u64::MAX), None), &[]);
        assert!(none.contains("0 to 31: name lower ones") && !none.contains("raise"), "{none}");
    }

    #[test]
    fn memory_classes_hold_the_limit_and_stop_at_the_host() {
        assert_eq!(memory_class(16 << 20, 1 << 20), 128);
        assert_eq!(memory_class(64 << 20, 1 << 20), 128);
        assert_eq!(memory_class(65 << 20, 1 << 20), 192);
        assert_eq!(memory_class(512 << 20, 1 << 20), 768);
        assert_eq!(memory_class(u64::MAX, 24_000), 16384);
        assert_eq!(memory_class(16_000 << 20, 24_000), 16384);
        for (limit, expected) in [(16_384, 24_000), (23_936, 24_000), (23_937, 16_384)] {
            assert_eq!(memory_class(limit << 20, 24_000), expected, "{limit} MiB on a host of 24000");
        }
        let last = MAX_MEMORY_MIB - GUEST_OVERHEAD_MIB;
        assert_eq!(memory_class(last << 20, u64::MAX), MAX_MEMORY_MIB);
    }

    #[test]
    fn annotations_that_are_host_policy_are_refused() {
        let config = Config::default();
        let refused = annotations(&[("io.spore.kernel_args", "init=/bin/sh")]);
        let message = config.machine(&refused, &Limits::default()).unwrap_err().to_string();
        assert!(message.contains("io.spore.kernel_args") && message.contains("allowed are"), "{message}");
        for (name, value) in
            [("io.spore.vcpus", "0"), ("io.spore.memory_mib", "lots"), ("io.spore.debug", "maybe")]
        {
            let message =
                config.machine(&annotations(&[(name, value)]), &Limits::default()).unwrap_err().to_string();
            assert!(message.contains(name) && message.contains(value), "{message}");
        }
    }

    #[test]
    fn rates_of_the_network_are_annotations() {
        let wanted = annotations(&[
            ("io.spore.network_rx_bytes_per_second", "1000000"),
            ("io.spore.network_tx_packets_per_second", "50"),
        ]);
        let machine = Config::default().machine(&wanted, &Limits::default()).unwrap();
        assert_eq!(machine.network.received, Rate { bytes: 1_000_000, packets: 0 });
        assert_eq!(machine.network.sent, Rate { bytes: 0, packets: 50 });
        let none = annotations(&[("io.spore.network_rx_bytes_per_second", "0")]);
        let message = Config::default().machine(&none, &Limits::default()).unwrap_err().to_string();
        assert!(message.contains("expected a number from 1"), "{message}");
    }

    #[test]
    fn a_cpuset_list_is_counted_or_ignored() {
        assert_eq!((cpuset_last("8,0-3"), cpuset_last("3-1"), cpuset_last("")), (Some(8), None, None));
        assert_eq!((cpuset_last("7"), cpuset_last("x")), (Some(7), None));
    }
}
