//! The cgroup of a container, after libcontainer has made it: who is in it, signals to all,
//! removal. cgroup v2 only, which is what the guest mounts.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::errno::Errno;

use crate::sys;
use crate::wait::poll;

/// Of all cgroups.
pub const ROOT: &str = "/sys/fs/cgroup";
/// Killed processes are gone within this time, or one hangs in the kernel.
const KILL_DEADLINE: Duration = Duration::from_secs(10);

/// A process that the kernel does not freeze within this time waits for something uninterruptible.
const FREEZE_DEADLINE: Duration = Duration::from_secs(10);

/// A container's cgroup and all below it.
#[derive(Debug, Clone)]
pub struct Cgroup {
    /// Below the hierarchy's root, beginning with `/`.
    name: PathBuf,
    path: PathBuf,
}

impl Cgroup {
    /// `path` begins with `/` and names a directory below the hierarchy's root.
    pub fn new(path: &Path) -> Self {
        Self::below(Path::new(ROOT), path)
    }

    fn below(root: &Path, path: &Path) -> Self {
        Self { name: path.into(), path: root.join(path.strip_prefix("/").unwrap_or(path)) }
    }

    pub fn name(&self) -> &Path {
        &self.name
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn exists(&self) -> bool {
        self.path.exists()
    }

    /// The processes in it, as PID 1 numbers them.
    pub fn pids(&self) -> io::Result<Vec<u32>> {
        let mut pids = Vec::new();
        let mut directories = Vec::new();
        collect(&self.path, &mut directories);
        for directory in directories {
            match fs::read_to_string(directory.join("cgroup.procs")) {
                Ok(text) => pids.extend(text.lines().filter_map(|line| line.trim().parse::<u32>().ok())),
                Err(error) if gone(&error) => {}
                Err(error) => return Err(error),
            }
        }
        pids.sort_unstable();
        Ok(pids)
    }

    /// Sends a signal to every process in it.
    pub fn signal(&self, signal: i32) -> io::Result<()> {
        if signal == libc::SIGKILL {
            return self.kill();
        }
        for pid in self.pids()? {
            match sys::kill(pid.cast_signed(), signal) {
                Ok(()) | Err(Errno::ESRCH) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// Kills all of it at once, so that nothing can fork itself out of the way.
    pub fn kill(&self) -> io::Result<()> {
        match fs::write(self.path.join("cgroup.kill"), "1") {
            Err(error) if !gone(&error) => Err(error),
            _ => Ok(()),
        }
    }

    /// Freezes or thaws every process in it, and waits until all of them are. Blocking.
    pub fn freeze(&self, frozen: bool) -> io::Result<()> {
        let line = if frozen { "frozen 1" } else { "frozen 0" };
        fs::write(self.path.join("cgroup.freeze"), if frozen { "1" } else { "0" })?;
        let events = self.path.join("cgroup.events");
        let done = || match fs::read_to_string(&events) {
            Ok(text) => text.lines().any(|known| known == line).then_some(Ok(())),
            Err(error) => Some(Err(error)),
        };
        poll(FREEZE_DEADLINE, done).unwrap_or_else(|| {
            if frozen {
                // Half frozen is neither running nor paused.
                let _ = fs::write(self.path.join("cgroup.freeze"), "0");
            }
            Err(io::Error::new(io::ErrorKind::TimedOut, format!("not done within {FREEZE_DEADLINE:?}")))
        })
    }

    /// Kills what is left and removes it with all below. Blocking.
    pub fn remove(&self) -> io::Result<()> {
        let attempt = || {
            self.kill()?;
            let mut directories = Vec::new();
            collect(&self.path, &mut directories);
            let mut result = Ok(());
            for directory in directories.iter().rev() {
                result = fs::remove_dir(directory);
            }
            result
        };
        let busy = |error: &io::Error| error.raw_os_error() == Some(libc::EBUSY);
        // What is killed takes a moment to leave.
        let removed =
            poll(KILL_DEADLINE, || Some(attempt()).filter(|result| !result.as_ref().is_err_and(busy)));
        match removed.unwrap_or_else(attempt) {
            Err(error) if !gone(&error) => Err(error),
            // Parents stay: another container may be about to make its own below them.
            _ => Ok(()),
        }
    }
}

fn gone(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENODEV))
}

/// `directory` and every directory below it, parents first.
fn collect(directory: &Path, into: &mut Vec<PathBuf>) {
    let Ok(entries) = fs::read_dir(directory) else { return };
    into.push(directory.into());
    for entry in entries.flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            collect(&entry.path(), into);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pids_of_nested_cgroups_are_collected() {
        let root = tempfile::tempdir().unwrap();
        let nested = root.path().join("default/web/inner");
        fs::create_dir_all(&nested).unwrap();
        fs::write(root.path().join("default/web/cgroup.procs"), "12\n7\n").unwrap();
        fs::write(nested.join("cgroup.procs"), "9\n").unwrap();
        let cgroup = Cgroup::below(root.path(), Path::new("/default/web"));
        assert_eq!(cgroup.pids().unwrap(), [7, 9, 12]);
        assert!(Cgroup::below(root.path(), Path::new("/absent")).pids().unwrap().is_empty());
    }

    #[test]
    fn removal_of_what_is_gone_succeeds() {
        let root = tempfile::tempdir().unwrap();
        Cgroup::below(root.path(), Path::new("/default/web")).remove().unwrap();
    }
}
