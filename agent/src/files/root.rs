//! A container's root directory, and what lies below it.

use std::ffi::OsStr;
use std::fmt::Display;
use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use nix::errno::Errno;
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, open, openat, openat2};
use nix::sys::stat::{FileStat, Mode, fstat};
use spore_agent_api::files::{MAX_PATH, is_name};

use crate::container::life::Container;
use crate::container::process::Status;
use crate::error::{AgentError, Result};

/// How often a path is resolved anew while others rename what it leads through.
const RESOLVE_ATTEMPTS: usize = 64;

/// See the module. It keeps the container's file systems busy: it lives for one call, or for as
/// long as the container.
#[derive(Debug)]
pub struct Root {
    dir: OwnedFd,
    /// How errors name it.
    name: String,
}

/// A directory and the name of an entry in it, which need not exist.
#[derive(Debug)]
pub struct Place<'a> {
    pub dir: OwnedFd,
    pub name: &'a OsStr,
}

impl Root {
    /// What the container's first process has as its root, with the mounts that it sees.
    pub fn of(container: &Container) -> Result<Self> {
        let name = container.name_of("");
        let ended = || {
            AgentError::FailedPrecondition(format!(
                "{name}: is stopped: its files can be reached until its first process ends"
            ))
        };
        let status = || container.init.status();
        if status() == Status::Stopped {
            return Err(ended());
        }
        let path = format!("/proc/{}/root", container.init.pid());
        let opened =
            open(path.as_str(), OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty());
        // Until it is reaped the pid is its own. A process that has ended has no root.
        match opened {
            _ if status() == Status::Stopped => Err(ended()),
            Err(Errno::ENOENT | Errno::ESRCH) => Err(ended()),
            Err(error) => Err(AgentError::internal(format!("{name}: open its root"), error.desc())),
            Ok(dir) => Ok(Self { dir, name }),
        }
    }

    /// Any directory as a root.
    pub fn at(dir: OwnedFd, name: impl Into<String>) -> Self {
        Self { dir, name: name.into() }
    }

    /// What went wrong, in the API's terms: "container "web": read "/etc/x": No such file".
    pub fn failed(&self, verb: &str, path: &[u8]) -> impl Fn(Errno) -> AgentError + use<> {
        let what = format!("{}: {verb} \"{}\"", self.name, path.escape_ascii());
        move |error| because(&what, error)
    }

    pub fn refused(&self, verb: &str, path: &[u8], why: impl Display) -> AgentError {
        AgentError::InvalidArgument(format!("{}: {verb} \"{}\": {why}", self.name, path.escape_ascii()))
    }

    /// Checks a path's form.
    fn check<'a>(&self, verb: &str, path: &'a [u8]) -> Result<&'a OsStr> {
        let shown = &path[..path.len().min(64)];
        if path.len() > MAX_PATH {
            let length = path.len();
            return Err(self.refused(verb, shown, format!("{length} bytes, at most {MAX_PATH} are allowed")));
        }
        if path.first() != Some(&b'/') {
            return Err(self.refused(verb, shown, "the path must begin with \"/\""));
        }
        if path.contains(&0) {
            return Err(self.refused(verb, shown, "the path contains a byte 0"));
        }
        Ok(OsStr::from_bytes(path))
    }

    fn resolve(&self, path: &OsStr, flags: OFlag) -> nix::Result<OwnedFd> {
        let how = OpenHow::new().flags(flags | OFlag::O_CLOEXEC).resolve(ResolveFlag::RESOLVE_IN_ROOT);
        for _ in 1..RESOLVE_ATTEMPTS {
            match openat2(&self.dir, path, how) {
                // Something on the way was renamed while ".." was looked up.
                Err(Errno::EAGAIN | Errno::EINTR) => {}
                other => return other,
            }
        }
        openat2(&self.dir, path, how)
    }

    /// A descriptor that names the file and opens nothing.
    pub fn find(&self, verb: &str, path: &[u8], follow: bool) -> Result<OwnedFd> {
        let name = self.check(verb, path)?;
        let flags = if follow { OFlag::O_PATH } else { OFlag::O_PATH | OFlag::O_NOFOLLOW };
        self.resolve(name, flags).map_err(self.failed(verb, path))
    }

    /// A directory, open for reading.
    pub fn directory(&self, verb: &str, path: &[u8]) -> Result<OwnedFd> {
        let found = self.find(verb, path, true)?;
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC | OFlag::O_NOFOLLOW;
        openat(&found, ".", flags, Mode::empty()).map_err(self.failed(verb, path))
    }

    /// A regular file, open as `access` says. Others could block, or be devices.
    pub fn file(&self, verb: &str, path: &[u8], access: OFlag) -> Result<(File, FileStat)> {
        let found = self.find(verb, path, true)?;
        let failed = self.failed(verb, path);
        let stat = fstat(&found).map_err(&failed)?;
        match stat.st_mode & libc::S_IFMT {
            libc::S_IFREG => {}
            libc::S_IFDIR => return Err(failed(Errno::EISDIR)),
            _ => {
                let what = format!("{}: {verb} \"{}\"", self.name, path.escape_ascii());
                return Err(AgentError::FailedPrecondition(format!("{what}: is not a regular file")));
            }
        }
        // Some files of /proc that are regular by name wait for content.
        let flags = access | OFlag::O_NONBLOCK | OFlag::O_NOCTTY | OFlag::O_CLOEXEC;
        let file = open(&reopened(&found), flags, Mode::empty()).map_err(&failed)?;
        Ok((file.into(), stat))
    }

    /// The directory that holds what `path` names, and the name; a last link is not followed.
    pub fn place<'a>(&self, verb: &str, path: &'a [u8]) -> Result<Place<'a>> {
        let (parent, name) = split(path);
        self.check(verb, path)?;
        if !is_name(name) {
            let why = if name.len() > 1 && name != b".." {
                "the name is too long"
            } else {
                "it names no entry of a directory"
            };
            return Err(self.refused(verb, path, why));
        }
        let parent = OsStr::from_bytes(if parent.is_empty() { b"/" } else { parent });
        let dir =
            self.resolve(parent, OFlag::O_PATH | OFlag::O_DIRECTORY).map_err(self.failed(verb, path))?;
        Ok(Place { dir, name: OsStr::from_bytes(name) })
    }
}

/// What leads to a descriptor's file again, whatever became of its name.
pub fn reopened(file: &OwnedFd) -> PathBuf {
    format!("/proc/self/fd/{}", file.as_raw_fd()).into()
}

/// A path's parent and last name, slashes at the end left out.
fn split(path: &[u8]) -> (&[u8], &[u8]) {
    let end = path.iter().rposition(|byte| *byte != b'/').map_or(0, |last| last + 1);
    let path = &path[..end];
    let start = path.iter().rposition(|byte| *byte == b'/').map_or(0, |slash| slash + 1);
    (&path[..start], &path[start..])
}

/// The API's codes for the kernel's.
pub fn because(what: &str, error: Errno) -> AgentError {
    let message = format!("{what}: {}", error.desc());
    match error {
        Errno::ENOENT => AgentError::NotFound(message),
        Errno::EEXIST => AgentError::AlreadyExists(message),
        Errno::EINVAL | Errno::ENAMETOOLONG => AgentError::InvalidArgument(message),
        Errno::EIO | Errno::ENOMEM | Errno::EMFILE | Errno::ENFILE | Errno::EBADF | Errno::EFAULT => {
            AgentError::Internal(message)
        }
        _ => AgentError::FailedPrecondition(message),
    }
}

/// An error of the standard library, which came from the kernel.
pub fn errno(error: &std::io::Error) -> Errno {
    error.raw_os_error().map_or(Errno::EIO, Errno::from_raw)
}
