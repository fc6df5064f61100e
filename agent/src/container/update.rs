//! Limits of a container that runs are changed.

use libcgroups::common::{
    AnyCgroupManager, CgroupConfig, CgroupManager, ControllerOpt, create_cgroup_manager,
};
use oci_spec::runtime::LinuxResources;

use super::cgroup::Cgroup;

/// The weight that cgroup v2 has for a `blockIO.weight` of the specification; its file.
const IO_WEIGHT: &str = "io.weight";

/// Puts `blockIO.weight` where libcgroups takes it as it stands: what that makes of one above 16 itself is
/// beyond its integers. Says what is wrong with it.
pub fn own_io_weight(resources: &mut LinuxResources) -> Result<(), String> {
    let Some(block_io) = resources.block_io_mut() else { return Ok(()) };
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
    unified.entry(IO_WEIGHT.into()).or_insert_with(|| converted.to_string());
    Ok(())
}

/// Writes what `resources` names into the cgroup; the rest stays. Blocking.
pub fn apply(cgroup: &Cgroup, mut resources: LinuxResources) -> Result<(), String> {
    own_io_weight(&mut resources)?;
    let resources = &resources;
    let text = |error: &dyn std::error::Error| crate::runtime::chain(error);
    let manager: AnyCgroupManager = create_cgroup_manager(CgroupConfig {
        cgroup_path: cgroup.name().to_owned(),
        systemd_cgroup: false,
        container_name: String::new(),
    })
    .map_err(|error| text(&error))?;
    let options =
        ControllerOpt { resources, disable_oom_killer: false, oom_score_adj: None, freezer_state: None };
    manager.apply(&options).map_err(|error| text(&error))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn owned(block_io: &str) -> Result<serde_json::Value, String> {
        let text = format!("{{\"blockIO\":{block_io}}}");
        let mut resources: LinuxResources = serde_json::from_str(&text).unwrap();
        own_io_weight(&mut resources).map(|()| serde_json::to_value(resources).unwrap())
    }

    #[test]
    fn a_weight_of_input_and_output_is_the_second_versions() {
        for (weight, converted) in [(10, "1"), (16, "61"), (17, "71"), (500, "4950"), (1000, "10000")] {
            let resources = owned(&format!("{{\"weight\":{weight}}}")).unwrap();
            assert_eq!(resources["unified"][IO_WEIGHT], converted, "{weight}");
            assert!(resources["blockIO"].get("weight").is_none_or(serde_json::Value::is_null));
        }
    }

    #[test]
    fn a_weight_that_is_none_is_refused_and_0_is_no_weight() {
        for weight in [1, 9, 1001, 65535] {
            assert!(owned(&format!("{{\"weight\":{weight}}}")).unwrap_err().contains("10 to 1000"));
        }
        assert!(owned("{\"weight\":0}").unwrap().get("unified").is_none_or(serde_json::Value::is_null));
    }
}
