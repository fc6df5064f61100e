//! Everything that a container's run could leave behind on the ground, counted and compared
//! before and after.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Result, bail};

use crate::network::stock;
use crate::wait;

/// containerd and shims tidy up after they have answered; this is what they may take.
const SETTLE: Duration = Duration::from_secs(30);

/// Directories of which no file may stay.
const WATCHED: &[&str] = &["/run", "/tmp", "/var/lib/spore", "/dev/shm", "/sys/fs/cgroup"];

/// Boot templates: one for each size of machine, made by whichever container is the first of it. Half-made ones are counted.
const TEMPLATES: &str = "/var/lib/spore/templates";

/// What exists: how often each line is true.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Inventory(BTreeMap<String, usize>);

impl Inventory {
    /// Takes stock. `more` are directories beside [`WATCHED`].
    pub fn take(more: &[PathBuf]) -> Result<Self> {
        let mut found = Self::default();
        processes(&mut found)?;
        for line in fs::read_to_string("/proc/self/mountinfo")?.lines() {
            // Fields: id, parent, device, root, mount point, …, "-", type, source.
            let fields: Vec<_> = line.split(' ').collect();
            let kind = fields.iter().position(|field| *field == "-").and_then(|at| fields.get(at + 1));
            found.add(format!("mount {} {}", fields.get(4).unwrap_or(&""), kind.unwrap_or(&"")));
        }
        for line in fs::read_to_string("/proc/net/unix")?.lines().skip(1) {
            if let Some(name) = line.split_whitespace().nth(7) {
                found.add(format!("unix socket {name}"));
            }
        }
        for device in fs::read_dir("/sys/block")?.flatten() {
            if let Ok(file) = fs::read_to_string(device.path().join("loop/backing_file")) {
                found.add(format!("loop device {} of {}", device.file_name().to_string_lossy(), file.trim()));
            }
        }
        stock::everywhere()?.into_iter().for_each(|line| found.add(line));
        for directory in WATCHED.iter().map(Path::new).chain(more.iter().map(PathBuf::as_path)) {
            files(directory, &mut found);
        }
        Ok(found)
    }

    /// What is here and was not in `before`.
    pub fn beyond(&self, before: &Self) -> Vec<String> {
        let more = |(line, count): (&String, &usize)| {
            let more = count.saturating_sub(before.0.get(line).copied().unwrap_or(0));
            (more > 0).then(|| if more > 1 { format!("{line} ({more} times)") } else { line.clone() })
        };
        self.0.iter().filter_map(more).collect()
    }

    fn add(&mut self, line: String) {
        *self.0.entry(line).or_default() += 1;
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
fn processes(found: &mut Inventory) -> Result<()> {
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
        found.add(format!("process {pid} of {} {}", start_time(&entry.path()), command.trim()));
    }
    Ok(())
}

/// In clock ticks since the machine started: with it a process id means one process.
fn start_time(process: &Path) -> String {
    let stat = fs::read_to_string(process.join("stat")).unwrap_or_default();
    // Field 22 of proc_pid_stat(5); the second, in parentheses, may hold anything.
    let rest = stat.rsplit(") ").next().unwrap_or_default();
    rest.split_whitespace().nth(19).unwrap_or("?").to_owned()
}

fn is_zombie(process: &Path) -> bool {
    fs::read_to_string(process.join("stat"))
        .is_ok_and(|stat| stat.rsplit(") ").next().is_some_and(|rest| rest.starts_with('Z')))
}

/// Every path below `directory`; of cgroups only the directories.
fn files(directory: &Path, found: &mut Inventory) {
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        let path = entry.path();
        if directory == Path::new(TEMPLATES) && !entry.file_name().as_encoded_bytes().starts_with(b".") {
            continue;
        }
        let is_directory = entry.file_type().is_ok_and(|kind| kind.is_dir());
        if is_directory || !path.starts_with("/sys") {
            found.add(format!("file {}", path.display()));
        }
        if is_directory {
            files(&path, found);
        }
    }
}
