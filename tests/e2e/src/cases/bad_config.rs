//! Specifications that cannot be carried out fail with one clear error.

use std::fs;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use spore_harness::call::Output;

use super::bad_command::one_error;
use super::{Case, expect_contains, expect_equal};
use spore_harness::bed::Subject;

pub(crate) const CASES: &[Case] = &[
    Case::new("bad_config::good_one_runs", good_one_runs),
    Case::new("bad_config::without_process", without_process),
    Case::new("bad_config::unknown_mount_type", unknown_mount_type),
];

/// Shows that what the other cases break was whole.
fn good_one_runs(subject: &Subject) -> Result<()> {
    let output = run(subject, |_| {})?;
    ensure!(output.success(), "{output}");
    expect_equal("standard output", &output.text().as_str(), &"it runs\n")
}

fn without_process(subject: &Subject) -> Result<()> {
    let output = run(subject, |spec| spec["process"] = Value::Null)?;
    expect_equal("status of ctr", &output.code(), &1)?;
    expect_contains("standard error", &output.errors(), "process")?;
    one_error(subject, &output)
}

fn unknown_mount_type(subject: &Subject) -> Result<()> {
    let mount = json!({ "destination": "/mnt", "type": "no-such-file-system", "source": "none" });
    let output = run(subject, |spec| {
        if let Some(mounts) = spec["mounts"].as_array_mut() {
            mounts.push(mount.clone());
        }
    })?;
    expect_equal("status of ctr", &output.code(), &1)?;
    if subject.is_spore() {
        expect_contains("standard error", &output.errors(), "no-such-file-system")?;
    }
    one_error(subject, &output)
}

/// `ctr run --config` with containerd's own specification, changed.
pub(super) fn run(subject: &Subject, change: impl FnOnce(&mut Value)) -> Result<Output> {
    let text = subject.must(&["oci", "spec"])?;
    let mut spec: Value = serde_json::from_str(&text).context("reading the output of ctr oci spec")?;
    spec["process"]["args"] = json!(["/bin/sh", "-c", "echo it runs"]);
    spec["process"]["terminal"] = json!(false);
    spec["root"] = json!({ "path": subject.bed.rootfs() });
    let (id, runtime) = (subject.id("config"), subject.runtime.id());
    spec["linux"]["cgroupsPath"] =
        json!(format!("/{}/{id}", subject.with(|it| Ok(it.namespace().to_owned()))?));
    change(&mut spec);
    let file = tempfile::NamedTempFile::new_in("/srv/bed")?;
    fs::write(file.path(), serde_json::to_vec(&spec)?)?;
    subject
        .ctr(&["run", "--rm", "--runtime", runtime, "--config", &file.path().to_string_lossy(), &id])?
        .run()
}
