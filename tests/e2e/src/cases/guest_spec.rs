//! What of a specification only Spore can be asked for here: Debian's runc is older than some fields, and its kernel has other policies.

use anyhow::{Result, ensure};
use serde_json::json;
use spore_harness::bed::Subject;

use super::bad_config::run;
use super::{Case, expect_equal};

// Alone, because the root directory is one that others use.
pub(crate) const CASES: &[Case] = &[
    Case::new("guest_spec::confinement_of_the_host_has_no_effect", confinement)
        .spore_only()
        .since("2.")
        .alone(),
    Case::new("guest_spec::domainname_and_personality", domainname).spore_only().since("2.").alone(),
];

/// The profiles that engines put into every specification, and SELinux's labels.
fn confinement(subject: &Subject) -> Result<()> {
    let output = run(subject, |spec| {
        spec["process"]["apparmorProfile"] = json!("docker-default");
        spec["process"]["selinuxLabel"] = json!("system_u:system_r:container_t:s0:c1,c2");
        spec["linux"]["mountLabel"] = json!("system_u:object_r:container_file_t:s0:c1,c2");
    })?;
    ensure!(output.success(), "{output}");
    expect_equal("standard output", &output.text().as_str(), &"it runs\n")
}

fn domainname(subject: &Subject) -> Result<()> {
    let output = run(subject, |spec| {
        spec["hostname"] = json!("web-1");
        spec["domainname"] = json!("spore.test");
        spec["linux"]["personality"] = json!({ "domain": "LINUX32" });
        spec["process"]["args"] =
            json!(["/bin/sh", "-c", "hostname; cat /proc/sys/kernel/domainname; uname -m"]);
    })?;
    ensure!(output.success(), "{output}");
    expect_equal("names and machine", &output.text().as_str(), &"web-1\nspore.test\ni686\n")
}
