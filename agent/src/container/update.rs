//! Limits of a container that runs are changed.

use libcgroups::common::{
    AnyCgroupManager, CgroupConfig, CgroupManager, ControllerOpt, create_cgroup_manager,
};
use oci_spec::runtime::LinuxResources;

use super::block_io;
use super::cgroup::Cgroup;

/// Writes what `resources` names into the cgroup; the rest stays. Blocking.
pub fn apply(cgroup: &Cgroup, mut resources: LinuxResources) -> Result<(), String> {
    block_io::make_guests_own(&mut resources)?;
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
