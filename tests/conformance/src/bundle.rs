//! A bundle with a configuration and a root of its own, for what no option of `ctr run` says.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use anyhow::Result;
use serde_json::{Value, json};
use spore_harness::bed::Subject;
use spore_harness::call::Call;

/// See the module.
pub(crate) struct Bundle {
    directory: PathBuf,
    pub(crate) id: String,
}

impl Bundle {
    pub(crate) fn new(subject: &Subject) -> Result<Self> {
        let id = subject.id("bundle");
        let bundle = Self { directory: PathBuf::from(format!("/srv/bed/{id}")), id };
        fs::create_dir_all(&bundle.directory)?;
        let mut cp = Command::new("cp");
        cp.arg("--archive").arg(subject.bed.rootfs()).arg(bundle.path("rootfs"));
        let output = Call::new(cp).run()?;
        anyhow::ensure!(output.success(), "{output}");
        Ok(bundle)
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    /// `ctr run` of a shell's script, with the default configuration as `edit` changes it.
    pub(crate) fn call(
        &self,
        subject: &Subject,
        script: &str,
        edit: impl FnOnce(&mut Value),
    ) -> Result<Call> {
        let mut spec: Value = serde_json::from_str(&subject.must(&["oci", "spec"])?)?;
        spec["root"] = json!({ "path": self.path("rootfs") });
        spec["process"]["args"] = json!(["/bin/sh", "-c", script]);
        spec["process"]["env"] = json!(["PATH=/usr/bin:/bin:/usr/sbin:/sbin"]);
        // The default is the namespace's own cgroup, which holds others.
        spec["linux"]["cgroupsPath"] = json!(format!("/bundles/{}", self.id));
        edit(&mut spec);
        let config = self.path("config.json");
        fs::write(&config, spec.to_string())?;
        let config = config.display().to_string();
        subject.ctr(&["run", "--rm", "--runtime", subject.runtime.id(), "--config", &config, &self.id])
    }
}

impl Drop for Bundle {
    fn drop(&mut self) {
        fs::remove_dir_all(&self.directory).ok();
    }
}
