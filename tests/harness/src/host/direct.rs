//! The host as the ground: the same programs, in mount, pid, IPC, network and cgroup
//! namespaces of their own, over a private copy of the same root file system. The host's own
//! containerd, if any, is neither seen nor touched. Shared with the host are its modules,
//! its cgroups and `/dev`, where one case takes `/dev/kvm` away for a while.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::relay::{OVERHEAD, Outcome, Relay};
use super::rootfs::Root;
use super::run::Finished;
use crate::inside::stage::MODULES;
use crate::job::{Job, Record};
use crate::wait;

/// Runs the job in namespaces on the host's kernel.
pub fn run(root: &Root, payload: &Path, init: &Path, run_directory: &Path, job: &Job) -> Result<Finished> {
    for module in MODULES {
        // Fails where the module is built in or for another CPU, which is no fault.
        Command::new("modprobe").args(["-q", module]).status().ok();
    }
    let disk = run_directory.join("root.img");
    let copied = Command::new("cp")
        .args(["--sparse=always", "--reflink=auto"])
        .arg(root.disk())
        .arg(&disk)
        .status()
        .context("starting cp")?;
    if !copied.success() {
        bail!("copying {} to {}: {copied}", root.disk().display(), disk.display());
    }
    let description = run_directory.join("job.json");
    fs::write(&description, serde_json::to_vec(job)?)?;
    let mount_point = run_directory.join("root");
    fs::create_dir(&mount_point)?;
    let files = run_directory.join("files.tar");
    let mut ground = Command::new("setpriv")
        .args([
            "--pdeathsig",
            "KILL",
            "--",
            "unshare",
            "--mount",
            "--pid",
            "--ipc",
            "--uts",
            "--net",
            "--cgroup",
        ])
        .args(["--fork", "--kill-child", "--propagation", "private", "--"])
        .arg(init)
        .arg("stage")
        .arg("--job")
        .arg(&description)
        .arg("--disk")
        .arg(&disk)
        .arg("--payload")
        .arg(payload)
        .arg("--root")
        .arg(&mount_point)
        .arg("--files")
        .arg(&files)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .context("starting setpriv and unshare (util-linux)")?;
    let Some(output) = ground.stdout.take() else { bail!("the ground has no standard output") };
    let end = Instant::now() + Duration::from_secs(job.deadline_s) + OVERHEAD;
    let outcome = Relay::start(output).wait(end, |record| {
        if let Record::Started { kernel, .. } = record {
            eprintln!("test bed: ground is up on kernel {kernel}");
        }
    })?;
    if outcome.is_none() {
        ground.kill()?;
    }
    let status = wait::child("the ground's namespaces end", &mut ground, Duration::from_secs(30))?;
    match outcome {
        Some(Outcome::Ended(status)) => Ok(Finished { status, files: Some(files) }),
        Some(Outcome::Failed(reason)) => bail!("the ground could not run the job: {reason}"),
        Some(Outcome::Silent) => bail!("the ground ended ({status}) before its job did"),
        None => bail!("the ground did not end within {} s and was killed", job.deadline_s),
    }
}
