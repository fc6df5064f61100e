//! What Update may ask for: limits that the container's machine can keep, and what of the
//! machine's memory they leave to the host.

use oci_spec::runtime::LinuxResources;

use crate::config::{GUEST_OVERHEAD_MIB, LEAST_MEMORY, Machine, cpuset_last};
use crate::error::Error;

/// Limits that the machine can keep.
#[derive(Debug)]
pub(super) struct Checked {
    /// An OCI linux.resources object.
    pub(super) resources: Vec<u8>,
    /// What the machine's balloon shall hold from now on; `None` when memory is not named.
    pub(super) balloon_mib: Option<u64>,
}

/// The memory that a machine has beyond `limit` bytes for its container and what the guest itself
/// needs. Without a limit all of it is the container's.
fn balloon_mib(limit: i64, machine: &Machine) -> u64 {
    let Ok(limit) = u64::try_from(limit) else { return 0 };
    let needed = limit.div_ceil(1 << 20).saturating_add(GUEST_OVERHEAD_MIB);
    machine.memory_mib.saturating_sub(needed)
}

/// Checks an OCI linux.resources object against the machine.
pub(super) fn checked(json: &[u8], machine: &Machine) -> Result<Checked, Error> {
    let resources: LinuxResources = serde_json::from_slice(json)
        .map_err(|error| Error::Invalid(format!("update: linux.resources: malformed: {error}")))?;
    let limit = resources.memory().as_ref().and_then(|memory| memory.limit());
    if let Some(limit) = limit {
        let most = i64::try_from(machine.memory_mib << 20).unwrap_or(i64::MAX);
        if limit > most {
            return Err(Error::Invalid(format!(
                "update: memory limit {limit}: the container's machine has {most} bytes; start the container with a \
                 higher limit or with io.spore.memory_mib"
            )));
        }
        if u64::try_from(limit).is_ok_and(|limit| limit < LEAST_MEMORY) {
            return Err(Error::Invalid(format!(
                "update: memory limit {limit}: at least {LEAST_MEMORY} bytes are needed"
            )));
        }
    }
    if let Some(cpu) = resources.cpu() {
        if let Some(cpus) = cpu.cpus() {
            let within = cpuset_last(cpus).is_some_and(|last| last < u64::from(machine.vcpus));
            if !cpus.is_empty() && !within {
                return Err(Error::Invalid(format!(
                    "update: cpuset {cpus:?}: the container's machine has CPUs 0 to {}",
                    machine.vcpus - 1
                )));
            }
        }
        if let (Some(quota), period) = (cpu.quota(), cpu.period().unwrap_or(100_000)) {
            let most = i64::try_from(period.saturating_mul(u64::from(machine.vcpus))).unwrap_or(i64::MAX);
            if quota > most {
                return Err(Error::Invalid(format!(
                    "update: CPU quota {quota} in {period}: the container's machine has {} CPUs, so at most {most}; \
                     start the container with a higher limit or with io.spore.vcpus",
                    machine.vcpus
                )));
            }
        }
    }
    let balloon_mib = limit.map(|limit| balloon_mib(limit, machine));
    let resources = serde_json::to_vec(&resources)
        .map_err(|error| Error::Invalid(format!("update: linux.resources: {error}")))?;
    Ok(Checked { resources, balloon_mib })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn machine() -> Machine {
        Machine {
            vcpus: 2,
            memory_mib: 256,
            huge_pages: false,
            writable_size_mib: 64,
            export_changes: true,
            debug: false,
            network: Default::default(),
        }
    }

    fn refusal(resources: serde_json::Value) -> String {
        checked(&serde_json::to_vec(&resources).unwrap(), &machine()).unwrap_err().to_string()
    }

    #[test]
    fn limits_within_the_machine_pass_and_keep_what_was_not_named() {
        let resources =
            json!({ "memory": { "limit": 64 << 20 }, "cpu": { "cpus": "0-1", "quota": 200_000 } });
        let passed = checked(&serde_json::to_vec(&resources).unwrap(), &machine()).unwrap();
        let passed: serde_json::Value = serde_json::from_slice(&passed.resources).unwrap();
        assert_eq!(passed["memory"]["limit"], 64 << 20);
        assert!(passed["pids"].is_null());
        checked(b"{\"memory\":{\"limit\":-1}}", &machine()).unwrap();
    }

    #[test]
    fn what_a_memory_limit_leaves_goes_to_the_balloon() {
        let balloon = |resources: serde_json::Value| {
            checked(&serde_json::to_vec(&resources).unwrap(), &machine()).unwrap().balloon_mib
        };
        let limit = |bytes: i64| balloon(json!({ "memory": { "limit": bytes } }));
        assert_eq!(limit(64 << 20), Some(256 - 64 - GUEST_OVERHEAD_MIB));
        assert_eq!(limit((64 << 20) - 1), Some(256 - 64 - GUEST_OVERHEAD_MIB));
        assert_eq!(limit(4 << 20), Some(256 - 4 - GUEST_OVERHEAD_MIB));
        assert_eq!(limit(192 << 20), Some(0), "the machine's class for this limit");
        assert_eq!(limit(256 << 20), Some(0), "more than fits beside the guest itself");
        assert_eq!(limit(-1), Some(0), "no limit");
        assert_eq!(balloon(json!({ "pids": { "limit": 7 } })), None, "memory is not named");
    }

    #[test]
    fn limits_beyond_the_machine_are_refused_with_its_size() {
        assert!(
            refusal(json!({ "memory": { "limit": 1u64 << 30 } })).contains("machine has 268435456 bytes")
        );
        assert!(refusal(json!({ "memory": { "limit": 1000 } })).contains("at least 4194304 bytes"));
        assert!(refusal(json!({ "cpu": { "cpus": "1-2" } })).contains("CPUs 0 to 1"));
        assert!(refusal(json!({ "cpu": { "cpus": "x" } })).contains("CPUs 0 to 1"));
        assert!(refusal(json!({ "cpu": { "quota": 300_000 } })).contains("so at most 200000"));
        assert!(refusal(json!({ "memory": 7 })).contains("malformed"));
    }
}
