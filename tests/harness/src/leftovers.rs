//! Everything that a container's run could leave behind on the ground, as sets that are
//! compared before and after.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Result, bail};

use crate::wait;

/// containerd and shims tidy up after they have answered; this is what they may take.
const SETTLE: Duration = Duration::from_secs(30);

/// Directories of which no file may stay.
const WATCHED: &[&str] =
    &["/run", "/tmp", "/var/lib/spore", "/var/lib/containerd", "/dev/shm", "/sys/fs/cgroup"];

/// What exists, one line for each thing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Inventory(BTreeSet<String>);

impl Inventory {
    /// Takes stock. `more` are directories beside [`WATCHED`].
    pub fn take(more: &[PathBuf]) -> Result<Self> {
        let mut found = BTreeSet::new();
        processes(&mut found)?;
        for line in fs::read_to_string("/proc/self/mountinfo")?.lines() {
            // Fields: id, parent, device, root, mount point, …, "-", type, source.
            let fields: Vec<_> = line.split(' ').collect();
            let kind = fields.iter().position(|field| *field == "-").and_then(|at| fields.get(at + 1));
            found.insert(format!("mount {} {}", fields.get(4).unwrap_or(&""), kind.unwrap_or(&"")));
        }
        for line in fs::read_to_string("/proc/net/unix")?.lines().skip(1) {
            if let Some(name) = line.split_whitespace().nth(7) {
                found.insert(format!("unix socket {name}"));
            }
        }
        for device in fs::read_dir("/sys/block")?.flatten() {
            if let Ok(file) = fs::read_to_string(device.path().join("loop/backing_file")) {
                found.insert(format!(
                    "loop device {} of {}",
                    device.file_name().to_string_lossy(),
                    file.trim()
                ));
            }
        }
        for directory in WATCHED.iter().map(Path::new).chain(more.iter().map(PathBuf::as_path)) {
            files(directory, &mut found);
        }
        Ok(Self(found))
    }

    /// What is here and was not in `before`.
    pub fn beyond(&self, before: &Self) -> Vec<String> {
        self.0.difference(&before.0).cloned().collect()
    }
}

/// Waits until nothing exists that `before` does not have; fails with the list of what stays.
pub fn none_since(before: &Inventory, more: &[PathBuf]) -> Result<()> {
    let mut left = Vec::new();
    let settled = wait::until("nothing is left behind", SETTLE, || {
        left = Inventory::take(more).ok()?.beyond(before);
        left.is_empty().then_some(())
    });
    if settled.is_err() {
        bail!("left behind, {} s after the end: {}", SETTLE.as_secs(), left.join("; "));
    }
    Ok(())
}

/// Processes by id, start time and name; kernel threads come and go as the kernel pleases.
fn processes(found: &mut BTreeSet<String>) -> Result<()> {
    let own = std::process::id().to_string();
    for entry in fs::read_dir("/proc")?.flatten() {
        let pid = entry.file_name().to_string_lossy().into_owned();
        if !pid.bytes().all(|byte| byte.is_ascii_digit()) || pid == own {
            continue;
        }
        let Ok(command) = fs::read(entry.path().join("cmdline")) else { continue };
        if command.is_empty() && !is_zombie(&entry.path()) {
            continue;
        }
        let command = String::from_utf8_lossy(&command).replace('\0', " ");
        found.insert(format!("process {pid} {}", command.trim()));
    }
    Ok(())
}

fn is_zombie(process: &Path) -> bool {
    fs::read_to_string(process.join("stat"))
        .is_ok_and(|stat| stat.rsplit(") ").next().is_some_and(|rest| rest.starts_with('Z')))
}

/// Every path below `directory`; of cgroups only the directories.
fn files(directory: &Path, found: &mut BTreeSet<String>) {
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        let path = entry.path();
        let is_directory = entry.file_type().is_ok_and(|kind| kind.is_dir());
        if is_directory || !path.starts_with("/sys") {
            found.insert(format!("file {}", path.display()));
        }
        if is_directory {
            files(&path, found);
        }
    }
}
