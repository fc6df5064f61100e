//! PID 1 of the namespaces on the host.

use std::fs::{self, File};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use super::{execute, stage};
use crate::job::{Job, PAYLOAD};

/// Where everything of this run lies on the host.
#[derive(Debug, clap::Args)]
pub struct Paths {
    /// The job's description.
    #[arg(long)]
    pub job: PathBuf,
    /// This run's private copy of the root's disk image.
    #[arg(long)]
    pub disk: PathBuf,
    #[arg(long)]
    pub payload: PathBuf,
    /// Directory to mount the root at.
    #[arg(long)]
    pub root: PathBuf,
    /// Where the archive of results goes.
    #[arg(long)]
    pub files: PathBuf,
}

/// Stands the ground up in the namespaces that this process was started in, and runs the job.
pub fn main(paths: &Paths) -> Result<()> {
    if std::process::id() != 1 {
        bail!("\"stage\" is for the test bed itself: it must be PID 1 of its own namespaces");
    }
    let job: Job = serde_json::from_slice(&fs::read(&paths.job)?).context("reading the job")?;
    let files = File::create(&paths.files)?;
    let output = File::from(std::io::stdout().as_fd().try_clone_to_owned()?);
    mount_image(&paths.disk, &paths.root, "loop,noinit_itable")?;
    mount_image(&paths.payload, &paths.root.join(&PAYLOAD[1..]), "loop,ro")?;
    stage::mount_kernel_views(&paths.root)?;
    stage::enter(&paths.root)?;
    stage::furnish()?;
    execute::run(&job, &output, &files)
}

/// By mount(8), which finds a loop device and has it freed with the mount.
fn mount_image(image: &Path, at: &Path, options: &str) -> Result<()> {
    let mut command = Command::new("mount");
    command.args(["-t", "ext4", "-o", options]).arg(image).arg(at);
    let status = command.status().context("starting mount")?;
    if !status.success() {
        bail!("mounting {} at {}: {status}", image.display(), at.display());
    }
    Ok(())
}
