//! What Update may ask for: limits that the container's machine can keep.

use oci_spec::runtime::LinuxResources;

use crate::config::{Machine, cpuset_last};
use crate::error::Error;

/// Less than this a container's init cannot be held in.
const LEAST_MEMORY: i64 = 4 * 1024 * 1024;

/// Checks an OCI linux.resources object against the machine.
pub(super) fn checked(json: &[u8], machine: &Machine) -> Result<Vec<u8>, Error> {
    let resources: LinuxResources = serde_json::from_slice(json)
        .map_err(|error| Error::Invalid(format!("update: linux.resources: malformed: {error}")))?;
    if let Some(limit) = resources.memory().as_ref().and_then(|memory| memory.limit()) {
        let most = i64::try_from(machine.memory_mib << 20).unwrap_or(i64::MAX);
        if limit > most {
            return Err(Error::Invalid(format!(
                "update: memory limit {limit}: the container's machine has {most} bytes; start the container with a \
                 higher limit or with io.spore.memory_mib"
            )));
        }
        if (0..LEAST_MEMORY).contains(&limit) {
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
    serde_json::to_vec(&resources)
        .map_err(|error| Error::Invalid(format!("update: linux.resources: {error}")))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn machine() -> Machine {
        Machine { vcpus: 2, memory_mib: 256, writable_size_mib: 64, debug: false }
    }

    fn refusal(resources: serde_json::Value) -> String {
        checked(&serde_json::to_vec(&resources).unwrap(), &machine()).unwrap_err().to_string()
    }

    #[test]
    fn limits_within_the_machine_pass_and_keep_what_was_not_named() {
        let resources =
            json!({ "memory": { "limit": 64 << 20 }, "cpu": { "cpus": "0-1", "quota": 200_000 } });
        let passed = checked(&serde_json::to_vec(&resources).unwrap(), &machine()).unwrap();
        let passed: serde_json::Value = serde_json::from_slice(&passed).unwrap();
        assert_eq!(passed["memory"]["limit"], 64 << 20);
        assert!(passed["pids"].is_null());
        checked(b"{\"memory\":{\"limit\":-1}}", &machine()).unwrap();
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
