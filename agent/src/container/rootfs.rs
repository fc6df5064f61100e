//! A container's root file system: EROFS images below, an ext4 disk on top, joined by
//! overlayfs. Blocking; called from worker threads.

use std::fs;
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use nix::errno::Errno;
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, open, openat2};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::stat::{Mode, mkdirat};

use super::disks::{Disks, Kind};
use crate::changes;
use crate::error::{AgentError, Result};

/// Most images that one root is joined from: all read-only slots of a guest.
const MAX_LOWER: usize = 12;

const MAX_PASSWD: u64 = 1024 * 1024;

/// A mounted root. [`Rootfs::unmount`] gives everything back; so does dropping it.
#[derive(Debug)]
pub struct Rootfs {
    disks: Arc<Disks>,
    acquired: Vec<String>,
    target: PathBuf,
    mounted: bool,
    changes: Changes,
}

/// Where a container's changes are.
#[derive(Debug, Clone, Default)]
pub struct Changes {
    /// The overlay's upper directory.
    pub upper: PathBuf,
    /// The directory below it that [`upper_like`] took its mode and owner from.
    pub like: PathBuf,
    /// It was made for this container; before that there were no changes.
    pub fresh: bool,
    /// What was in a fresh one before the container ran: its mount points.
    pub prepared: Option<changes::Fingerprint>,
}

impl Rootfs {
    /// Mounts `lower` (uppermost first) and `writable` as one tree at `target`.
    pub fn mount(disks: &Arc<Disks>, lower: &[String], writable: &str, target: &Path) -> Result<Self> {
        if lower.is_empty() || lower.len() > MAX_LOWER {
            let found = lower.len();
            return Err(AgentError::InvalidArgument(format!(
                "rootfs: {found} read-only disks, 1 to {MAX_LOWER} are allowed"
            )));
        }
        if writable.is_empty() {
            return Err(AgentError::InvalidArgument("rootfs: no writable disk is named".into()));
        }
        let mut rootfs = Self {
            disks: Arc::clone(disks),
            acquired: Vec::new(),
            target: target.into(),
            mounted: false,
            changes: Changes::default(),
        };
        let mut layers = Vec::new();
        for serial in lower {
            layers.push(rootfs.acquire(serial, Kind::Image)?);
        }
        let writable = rootfs.acquire(writable, Kind::Writable)?;
        let top = layers.first().ok_or_else(|| AgentError::Internal("rootfs: no layer".into()))?;
        let failed = |what: &Path, error: io::Error| {
            AgentError::internal(format!("rootfs: {}", what.display()), error)
        };
        let upper = writable.join("upper");
        let work = writable.join("work");
        let fresh = upper_like(top, &upper).map_err(|error| failed(&upper, error))?;
        rootfs.changes = Changes { upper, like: top.clone(), fresh, prepared: None };
        let upper = &rootfs.changes.upper;
        create_dir(&work).map_err(|error| failed(&work, error))?;
        fs::create_dir_all(target).map_err(|error| failed(target, error))?;

        let lower: Vec<_> = layers.iter().map(|path| path.display().to_string()).collect();
        // Whatever the kernel's defaults: the upper directory alone says what was changed, for it is
        // exported (see `changes`).
        let options = format!(
            "redirect_dir=off,metacopy=off,lowerdir={},upperdir={},workdir={}",
            lower.join(":"),
            upper.display(),
            work.display()
        );
        mount(Some("overlay"), target, Some("overlay"), MsFlags::empty(), Some(options.as_str())).map_err(
            |error| AgentError::internal(format!("rootfs: mount overlay ({options})"), error.desc()),
        )?;
        rootfs.mounted = true;
        Ok(rootfs)
    }

    /// To be called when everything is mounted in it and nothing has run.
    pub fn note_prepared(&mut self) {
        if self.changes.fresh {
            self.changes.prepared = changes::fingerprint(&self.changes.upper);
        }
    }

    /// Where it is mounted, in the guest's own mount namespace.
    pub fn root(&self) -> &Path {
        &self.target
    }

    pub fn changes(&self) -> Changes {
        self.changes.clone()
    }

    fn acquire(&mut self, serial: &str, kind: Kind) -> Result<PathBuf> {
        let path = self.disks.acquire(serial, kind)?;
        self.acquired.push(serial.into());
        Ok(path)
    }

    /// Creates the process's working directory when the image lacks it, as runc does.
    pub fn create_cwd(&self, cwd: &Path) -> Result<()> {
        mkdir_in_root(&self.target, cwd).map_err(|error| {
            AgentError::internal(format!("create process.cwd \"{}\"", cwd.display()), error.desc())
        })
    }

    /// The container's `/etc/passwd`; empty when there is none. At most 1 MiB is read.
    pub fn passwd(&self) -> String {
        let read = || -> io::Result<String> {
            let root =
                open(&self.target, OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty())?;
            let how = OpenHow::new()
                .flags(OFlag::O_RDONLY | OFlag::O_CLOEXEC | OFlag::O_NONBLOCK)
                .resolve(ResolveFlag::RESOLVE_IN_ROOT);
            let mut bytes = Vec::new();
            fs::File::from(openat2(&root, "/etc/passwd", how)?).take(MAX_PASSWD).read_to_end(&mut bytes)?;
            Ok(String::from_utf8_lossy(&bytes).into_owned())
        };
        read().unwrap_or_default()
    }

    /// Unmounts the tree and gives the disks back; goes on after an error and returns the first.
    pub fn unmount(&mut self) -> Result<()> {
        let mut first = Ok(());
        if std::mem::take(&mut self.mounted) {
            let gone = umount2(&self.target, MntFlags::empty())
                .or_else(|_busy| umount2(&self.target, MntFlags::MNT_DETACH));
            if let Err(error) = gone {
                first = Err(AgentError::internal(format!("unmount {}", self.target.display()), error.desc()));
            }
        }
        for serial in std::mem::take(&mut self.acquired) {
            first = first.and(self.disks.release(&serial));
        }
        first
    }
}

impl Drop for Rootfs {
    fn drop(&mut self) {
        if let Err(error) = self.unmount() {
            crate::say!("{error}");
        }
    }
}

fn create_dir(path: &Path) -> io::Result<()> {
    match fs::create_dir(path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        other => other,
    }
}

/// The merged tree shows the upper directory's own mode and owner at `/`; a new one takes
/// those of the image. Whether it is new.
fn upper_like(image: &Path, upper: &Path) -> io::Result<bool> {
    if upper.exists() {
        return Ok(false);
    }
    let like = fs::metadata(image)?;
    fs::create_dir(upper)?;
    std::os::unix::fs::chown(upper, Some(like.uid()), Some(like.gid()))?;
    fs::set_permissions(upper, fs::Permissions::from_mode(like.mode() & 0o7777))?;
    Ok(true)
}

/// `mkdir -p` inside `root`: links are followed as inside the container, never out of it.
fn mkdir_in_root(root: &Path, path: &Path) -> nix::Result<()> {
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let top = open(root, flags, Mode::empty())?;
    let inside = |path: &Path| -> nix::Result<OwnedFd> {
        openat2(&top, path, OpenHow::new().flags(flags).resolve(ResolveFlag::RESOLVE_IN_ROOT))
    };
    let mut done = PathBuf::from("/");
    for component in path.components() {
        let Component::Normal(name) = component else { continue };
        let parent = inside(&done)?;
        done.push(name);
        match inside(&done) {
            Ok(_exists) => {}
            Err(Errno::ENOENT) => match mkdirat(&parent, name, Mode::from_bits_truncate(0o755)) {
                Ok(()) | Err(Errno::EEXIST) => {}
                Err(error) => return Err(error),
            },
            Err(error) => return Err(error),
        }
    }
    inside(&done).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn directories_are_made_inside_the_root_even_through_links() {
        let outside = tempfile::tempdir().unwrap();
        let root = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink(outside.path(), root.path().join("link")).unwrap();
        mkdir_in_root(root.path(), Path::new("/a/b/c")).unwrap();
        assert!(root.path().join("a/b/c").is_dir());
        mkdir_in_root(root.path(), Path::new("/")).unwrap();
        // The link is absolute: inside the root it points to a path that is not there.
        assert!(mkdir_in_root(root.path(), Path::new("/link/x")).is_err());
        assert_eq!(fs::read_dir(outside.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_rootfs_needs_a_layer_and_a_writable_disk() {
        let disks = Arc::default();
        let error = Rootfs::mount(&disks, &[], "rw0", Path::new("/nowhere")).unwrap_err();
        assert!(error.to_string().contains("0 read-only disks, 1 to 12"), "{error}");
        let error = Rootfs::mount(&disks, &["ro0".into()], "", Path::new("/nowhere")).unwrap_err();
        assert!(error.to_string().contains("no writable disk"), "{error}");
    }
}
