//! Input and output of a container: its weight, in the words of cgroup v2. Limits of a device are refused.
//!
//! A spec names devices by number, and means the host's: the same number is another disk here, or none.

use oci_spec::runtime::{LinuxBlockIo, LinuxResources};

/// The weight that cgroup v2 has for a `blockIO.weight` of the specification; its file.
const WEIGHT: &str = "io.weight";
const MEND: &str = "is a device of the host, and the disks of a virtual machine are others; leave it out, linux.resources.blockIO.weight \
                    can be set";

/// Puts `blockIO.weight` where libcgroups takes it as it stands: what that makes of one above 16 itself is
/// beyond its integers. Says what cannot be had.
pub fn make_guests_own(resources: &mut LinuxResources) -> Result<(), String> {
    check_files(resources)?;
    let Some(block_io) = resources.block_io_mut() else { return Ok(()) };
    check_devices(block_io)?;
    let Some(weight) = block_io.weight() else { return Ok(()) };
    block_io.set_weight(None);
    match weight {
        // Clients say so when nobody has asked for one.
        0 => return Ok(()),
        10..=1000 => {}
        _ => return Err(format!("linux.resources.blockIO.weight is {weight}; 10 to 1000 are allowed")),
    }
    // runc's conversion, of 10..=1000 to 1..=10000.
    let converted = 1 + (u32::from(weight) - 10) * 9999 / 990;
    let unified = resources.unified_mut().get_or_insert_default();
    unified.entry(WEIGHT.into()).or_insert_with(|| converted.to_string());
    Ok(())
}

fn check_devices(block_io: &LinuxBlockIo) -> Result<(), String> {
    let weights = block_io.weight_device().iter().flatten();
    let weights = weights.map(|device| ("weightDevice", device.major(), device.minor()));
    let throttles = [
        ("throttleReadBpsDevice", block_io.throttle_read_bps_device()),
        ("throttleWriteBpsDevice", block_io.throttle_write_bps_device()),
        ("throttleReadIOPSDevice", block_io.throttle_read_iops_device()),
        ("throttleWriteIOPSDevice", block_io.throttle_write_iops_device()),
    ];
    let throttles = throttles.iter().flat_map(|(name, devices)| {
        devices.iter().flatten().map(|device| (*name, device.major(), device.minor()))
    });
    match weights.chain(throttles).next() {
        Some((name, major, minor)) => Err(format!("linux.resources.blockIO.{name}: {major}:{minor} {MEND}")),
        None => Ok(()),
    }
}

/// The same as lines of a cgroup's files.
fn check_files(resources: &LinuxResources) -> Result<(), String> {
    let is_device = |word: &&str| {
        let number = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
        word.split_once(':').is_some_and(|(major, minor)| number(major) && number(minor))
    };
    for (file, lines) in resources.unified().iter().flatten().filter(|(file, _)| file.starts_with("io.")) {
        if let Some(device) = lines.split_whitespace().find(is_device) {
            return Err(format!("linux.resources.unified, {file}: {device} {MEND}"));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn owned(resources: &Value) -> Result<Value, String> {
        let mut resources: LinuxResources = serde_json::from_value(resources.clone()).unwrap();
        make_guests_own(&mut resources).map(|()| serde_json::to_value(resources).unwrap())
    }

    #[test]
    fn a_weight_of_input_and_output_is_the_second_versions() {
        for (weight, converted) in [(10, "1"), (16, "61"), (17, "71"), (500, "4950"), (1000, "10000")] {
            let resources = owned(&json!({ "blockIO": { "weight": weight } })).unwrap();
            assert_eq!(resources["unified"][WEIGHT], converted, "{weight}");
            assert!(resources["blockIO"].get("weight").is_none_or(Value::is_null));
        }
    }

    #[test]
    fn a_weight_that_is_none_is_refused_and_0_is_no_weight() {
        for weight in [1, 9, 1001, 65535] {
            assert!(owned(&json!({ "blockIO": { "weight": weight } })).unwrap_err().contains("10 to 1000"));
        }
        let none = owned(&json!({ "blockIO": { "weight": 0 } })).unwrap();
        assert!(none.get("unified").is_none_or(Value::is_null));
    }

    #[test]
    fn a_device_of_the_host_is_refused_by_the_field_that_names_it() {
        for name in [
            "throttleReadBpsDevice",
            "throttleWriteBpsDevice",
            "throttleReadIOPSDevice",
            "throttleWriteIOPSDevice",
        ] {
            let limit = json!({ "blockIO": { name: [{ "major": 8, "minor": 16, "rate": 1048576 }] } });
            let refused = owned(&limit).unwrap_err();
            assert!(refused.contains(&format!("blockIO.{name}: 8:16 is a device of the host")), "{refused}");
            // Docker's engine, when nobody has asked for one.
            owned(&json!({ "blockIO": { "weight": 0, name: [] } })).unwrap();
        }
        let weight = json!({ "blockIO": { "weightDevice": [{ "major": 254, "minor": 0, "weight": 300 }] } });
        assert!(owned(&weight).unwrap_err().contains("weightDevice: 254:0"));
    }

    #[test]
    fn so_it_is_in_a_cgroups_own_words() {
        let refused = owned(&json!({ "unified": { "io.max": "8:0 rbps=1048576" } })).unwrap_err();
        assert!(refused.contains("unified, io.max: 8:0 is a device of the host"), "{refused}");
        assert!(owned(&json!({ "unified": { "io.weight": "default 100\n8:0 50" } })).is_err());
        owned(&json!({ "unified": { "io.weight": "default 100", "memory.high": "1:2" } })).unwrap();
    }
}
