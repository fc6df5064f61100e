//! PID 1 of the outer machine and of the probe guest.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::mount::{MsFlags, mount};
use nix::sys::reboot::{RebootMode, reboot};

use super::{execute, modules, stage};
use crate::ground::PROBE_GREETING;
use crate::host::initramfs::{JOB, MODULES};
use crate::host::machine::{PORT_FILES, PORT_OUTPUT};
use crate::job::{Job, PAYLOAD, Record};
use crate::wait;

const DEVICES: Duration = Duration::from_secs(30);

/// Runs the machine's life and powers it off, whatever happens.
pub fn main() -> ! {
    if let Err(error) = live() {
        eprintln!("spore-testbed: init: {error:#}");
    }
    nix::unistd::sync();
    // PID 1 must not return: should the machine refuse to be off, it waits for its host.
    loop {
        let Err(error) = reboot(RebootMode::RB_POWER_OFF);
        eprintln!("spore-testbed: init: power off: {error}");
        nix::unistd::pause();
    }
}

fn live() -> Result<()> {
    stage::mount_kernel_views(Path::new("/"))?;
    if !Path::new(JOB).exists() {
        println!("{PROBE_GREETING}");
        return Ok(());
    }
    let job: Job = serde_json::from_slice(&fs::read(JOB)?).context("reading the job")?;
    modules::load_all(Path::new(MODULES))?;
    let mut output = port(PORT_OUTPUT)?;
    let outcome = stand_and_run(&job, &output);
    if let Err(error) = &outcome {
        output.write_all(&Record::Failed { reason: format!("{error:#}") }.to_line())?;
    }
    outcome
}

fn stand_and_run(job: &Job, output: &File) -> Result<()> {
    let files = port(PORT_FILES)?;
    let root = Path::new("/root");
    mount_disk("root", root, "ext4", MsFlags::empty(), "noinit_itable")?;
    mount_disk("payload", &root.join(&PAYLOAD[1..]), "ext4", MsFlags::MS_RDONLY, "")?;
    for view in ["dev", "proc", "sys"] {
        let to = root.join(view);
        mount(Some(&Path::new("/").join(view)), &to, None::<&str>, MsFlags::MS_MOVE, None::<&str>)
            .with_context(|| format!("moving /{view} to {}", to.display()))?;
    }
    stage::enter(root)?;
    stage::furnish()?;
    execute::run(job, output, &files)
}

fn mount_disk(serial: &str, at: &Path, kind: &str, flags: MsFlags, options: &str) -> Result<()> {
    let disk = wait::until(&format!("disk \"{serial}\" appears"), DEVICES, || disk(serial))?;
    mount(Some(&disk), at, Some(kind), flags, Some(options))
        .with_context(|| format!("mounting {} (\"{serial}\") at {}", disk.display(), at.display()))
}

fn disk(serial: &str) -> Option<PathBuf> {
    fs::read_dir("/sys/block").ok()?.flatten().find_map(|entry| {
        let found = fs::read_to_string(entry.path().join("serial")).ok()?;
        let node = Path::new("/dev").join(entry.file_name());
        (found.trim() == serial && node.exists()).then_some(node)
    })
}

/// Opens a virtio port by its name.
fn port(name: &str) -> Result<File> {
    let find = || {
        fs::read_dir("/sys/class/virtio-ports").ok()?.flatten().find_map(|entry| {
            let found = fs::read_to_string(entry.path().join("name")).ok()?;
            let node = Path::new("/dev").join(entry.file_name());
            (found.trim() == name && node.exists()).then_some(node)
        })
    };
    let node = wait::until(&format!("virtio port \"{name}\" appears"), DEVICES, find)?;
    match File::options().read(true).write(true).open(&node) {
        Ok(file) => Ok(file),
        Err(error) => bail!("opening {}: {error}", node.display()),
    }
}
