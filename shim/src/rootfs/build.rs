//! Makes EROFS images from directories. The work is done by two short-lived processes, so
//! that a killed shim leaves no mount: `image-build` serialises builders of one image and
//! publishes the finished file; its child `image-mkfs` mounts the layers read-only in a
//! mount namespace of its own and becomes `mkfs.erofs`. Both end with their parent.
//!
//! mkfs.erofs runs without compression: its input is then read once and written once, and
//! the guest reads pages that are the host's page cache.

use std::fs::{File, OpenOptions};
use std::io::{self, BufRead, Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::prctl;
use nix::sys::signal::Signal;
use serde::{Deserialize, Serialize};

use super::images::is_erofs;
use super::lock::KeyLock;
use super::temporary;

pub(crate) const SUBCOMMAND: &str = "image-build";
pub(crate) const MKFS_SUBCOMMAND: &str = "image-mkfs";
/// Marks a failure for lack of space, for the parent.
pub(super) const DISK_FULL: &str = "no space left on device";
/// Build time in the superblock: a constant in the far future. mkfs.erofs takes it from
/// SOURCE_DATE_EPOCH and lowers later file times to it, of which there are none.
const EPOCH: &str = "16725225600";
/// The superblock's UUID: images of equal content are equal.
const UUID: &str = "53706f72-6520-4552-4f46-5320696d6167";
const JOB_CAP: u64 = 1 << 20;

/// What to make.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Job {
    pub(super) input: Input,
    /// Appears at once and complete, or not at all.
    pub(super) target: PathBuf,
    /// Make it even if there is one.
    pub(super) replace: bool,
    /// An existing directory to mount on, inside the private namespace.
    pub(super) mount_point: PathBuf,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Input {
    /// The merged view of overlay layers, uppermost first.
    Merged(Vec<PathBuf>),
    /// One directory as it is, whiteouts and opaque marks included.
    Tree(PathBuf),
}

/// `image-build`, the job on standard input.
pub(crate) fn main() -> Result<(), String> {
    die_with_parent()?;
    let job = read_job()?;
    build(&job)
}

pub(super) fn die_with_parent() -> Result<(), String> {
    prctl::set_pdeathsig(Signal::SIGKILL).map_err(|error| format!("PDEATHSIG: {error}"))
}

fn read_job() -> Result<Job, String> {
    let mut text = String::new();
    io::stdin().take(JOB_CAP).read_to_string(&mut text).map_err(|error| format!("read the job: {error}"))?;
    serde_json::from_str(&text).map_err(|error| format!("read the job: {error}"))
}

fn build(job: &Job) -> Result<(), String> {
    let dir = job.target.parent().unwrap_or(Path::new("/"));
    let fail = |operation: &str, path: &Path, error: io::Error| {
        let full = if error.raw_os_error() == Some(libc::ENOSPC) { DISK_FULL } else { "" };
        format!("{}: {operation}: {error} {full}", path.display())
    };
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(&job.mount_point)
        .map_err(|error| fail("create", &job.mount_point, error))?;
    let _lock = KeyLock::acquire(&job.target).map_err(|error| fail("lock", &job.target, error))?;
    if !job.replace && is_erofs(&job.target) {
        return Ok(());
    }
    let name = job.target.file_name().unwrap_or_default().to_string_lossy();
    let temporary = temporary::Temporary::of_helper(dir, &name);
    mkfs(job, temporary.path())?;
    File::open(temporary.path())
        .and_then(|file| file.sync_all())
        .map_err(|error| fail("sync", temporary.path(), error))?;
    temporary.publish(&job.target).map_err(|error| fail("rename", &job.target, error))
}

fn mkfs(job: &Job, output: &Path) -> Result<(), String> {
    OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(output)
        .map_err(|error| format!("{}: create: {error}", output.display()))?;
    let mut child = Command::new("/proc/self/exe")
        .arg(MKFS_SUBCOMMAND)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|error| format!("start {MKFS_SUBCOMMAND}: {error}"))?;
    let inner = Job { target: output.into(), ..job.clone() };
    let text = serde_json::to_vec(&inner).map_err(|error| error.to_string())?;
    if let Some(mut stdin) = child.stdin.take() {
        stdin.write_all(&text).map_err(|error| format!("pass the job on: {error}"))?;
    }
    let said = read_messages(&mut child);
    let status = child.wait().map_err(|error| format!("wait for mkfs.erofs: {error}"))?;
    if status.success() && is_erofs(output) {
        return Ok(());
    }
    let tail = said[said.len().saturating_sub(4)..].join(" | ");
    // mkfs.erofs does not always name ENOSPC; ask the file system.
    let full = if tail.to_lowercase().contains(DISK_FULL) || is_full(output) { DISK_FULL } else { "" };
    Err(format!("mkfs.erofs: {status}: {tail} {full}"))
}

/// What mkfs.erofs says, to its end. An error ends it: of version 1.8 the writing thread can
/// fail (on a full disk, for one) and leave the others waiting for it for ever.
fn read_messages(child: &mut Child) -> Vec<String> {
    let Some(stderr) = child.stderr.take() else { return Vec::new() };
    let mut said = Vec::new();
    for line in io::BufReader::new(stderr.take(JOB_CAP)).split(b'\n').map_while(Result::ok) {
        let line = String::from_utf8_lossy(&line).trim().to_string();
        let fatal = line.contains("<E>");
        if !line.is_empty() {
            said.push(line);
        }
        if fatal {
            let _ = child.kill();
        }
    }
    said
}

fn is_full(path: &Path) -> bool {
    nix::sys::statvfs::statvfs(path)
        .is_ok_and(|stat| stat.blocks_available() * stat.fragment_size() < (1 << 16))
}

/// `image-mkfs`: mounts, then becomes mkfs.erofs.
pub(crate) fn mkfs_main() -> Result<(), String> {
    die_with_parent()?;
    let job = read_job()?;
    let input = match &job.input {
        Input::Tree(path) => path.clone(),
        Input::Merged(lowers) => match lowers.as_slice() {
            // One layer is its own merged view.
            [only] => only.clone(),
            _ => {
                mount_merged(lowers, &job.mount_point)?;
                job.mount_point.clone()
            }
        },
    };
    let null = File::open("/dev/null").map_err(|error| format!("/dev/null: {error}"))?;
    let error = Command::new("mkfs.erofs")
        // Whoever started containerd may lack sbin in its path.
        .env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
        .env("SOURCE_DATE_EPOCH", EPOCH)
        .args(["--quiet", "-U", UUID])
        .arg(&job.target)
        .arg(&input)
        .stdin(null)
        .exec();
    Err(format!("mkfs.erofs: cannot be run: {error}; install erofs-utils"))
}

fn mount_merged(lowers: &[PathBuf], mount_point: &Path) -> Result<(), String> {
    unshare(CloneFlags::CLONE_NEWNS).map_err(|error| format!("new mount namespace: {error}"))?;
    let none: Option<&str> = None;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)
        .map_err(|error| format!("make the mounts private: {error}"))?;
    // mount(2) takes at most a page of options: long lists are written relative to what
    // all layers have in common.
    let base = common_parent(lowers);
    std::env::set_current_dir(&base).map_err(|error| format!("{}: enter: {error}", base.display()))?;
    let mut options = b"lowerdir=".to_vec();
    for (index, lower) in lowers.iter().enumerate() {
        if index > 0 {
            options.push(b':');
        }
        let relative = lower.strip_prefix(&base).unwrap_or(lower);
        for &byte in relative.as_os_str().as_bytes() {
            if matches!(byte, b':' | b',' | b'\\') {
                options.push(b'\\');
            }
            options.push(byte);
        }
    }
    let options = std::ffi::OsStr::from_bytes(&options);
    let flags = MsFlags::MS_RDONLY | MsFlags::MS_NODEV | MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC;
    mount(Some("overlay"), mount_point, Some("overlay"), flags, Some(options)).map_err(|error| {
        format!("mount the overlay of {} layers of {}: {error}", lowers.len(), base.display())
    })
}

fn common_parent(paths: &[PathBuf]) -> PathBuf {
    let mut common =
        paths.first().and_then(|path| path.parent()).map_or_else(|| "/".into(), Path::to_path_buf);
    while !paths.iter().all(|path| path.starts_with(&common) && *path != common) {
        if !common.pop() {
            return "/".into();
        }
    }
    common
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_common_parent_contains_every_layer() {
        let paths = |list: &[&str]| list.iter().map(PathBuf::from).collect::<Vec<_>>();
        assert_eq!(common_parent(&paths(&["/s/2/fs", "/s/1/fs"])), Path::new("/s"));
        assert_eq!(common_parent(&paths(&["/s/1/fs", "/s/10/fs"])), Path::new("/s"));
        assert_eq!(common_parent(&paths(&["/a/fs", "/b/fs"])), Path::new("/"));
        assert_eq!(common_parent(&paths(&["/a/b", "/a/b/c"])), Path::new("/a"));
    }
}
