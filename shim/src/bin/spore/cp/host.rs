//! What is made on the host with names that a guest gave: each in a directory that is open, and
//! never through a link, so that nothing lands outside of where the copy goes.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{OFlag, open, openat, renameat};
use nix::sys::stat::{Mode, UtimensatFlags, fchmod, futimens, mkdirat, utimensat};
use nix::sys::time::TimeSpec;
use nix::unistd::{Gid, Uid, UnlinkatFlags, fchown, fchownat, symlinkat, unlinkat};
use spore_agent_api::v1::files::Attributes;

use super::Options;
use crate::failure::Failure;

const DIRECTORY: OFlag = OFlag::O_RDONLY.union(OFlag::O_DIRECTORY).union(OFlag::O_CLOEXEC);
/// Nobody else looks in before a file or directory is complete.
const PRIVATE: Mode = Mode::S_IRWXU;
/// What is kept of a mode unless owners are kept too: no set-id bits, which would be the caller's.
const PLAIN_BITS: u32 = 0o1777;

/// A directory of the host.
pub(super) struct Directory {
    fd: OwnedFd,
    path: PathBuf,
}

/// A file that has no name yet. Dropping it takes it away.
pub(super) struct Draft<'a> {
    directory: &'a Directory,
    temporary: OsString,
    file: File,
    published: bool,
}

fn failed(operation: &'static str, path: &Path) -> impl FnOnce(Errno) -> Failure + use<> {
    let failed = Failure::host(operation, path);
    move |error| failed(error.into())
}

impl Directory {
    /// One that the caller named: links in it are followed.
    pub(super) fn open(path: &Path) -> Result<Self, Failure> {
        let fd = open(path, DIRECTORY, Mode::empty()).map_err(failed("open directory", path))?;
        Ok(Self { fd, path: path.into() })
    }

    pub(super) fn path(&self, name: &[u8]) -> PathBuf {
        self.path.join(OsStr::from_bytes(name))
    }

    /// A directory in this one, and whether it was missing.
    pub(super) fn directory(&self, name: &[u8]) -> Result<(Self, bool), Failure> {
        let path = self.path(name);
        let made = match mkdirat(&self.fd, OsStr::from_bytes(name), PRIVATE) {
            Ok(()) => true,
            Err(Errno::EEXIST) => false,
            Err(error) => return Err(failed("make directory", &path)(error)),
        };
        let fd = openat(&self.fd, OsStr::from_bytes(name), DIRECTORY | OFlag::O_NOFOLLOW, Mode::empty())
            .map_err(failed("open directory", &path))?;
        Ok((Self { fd, path }, made))
    }

    pub(super) fn draft(&self) -> Result<Draft<'_>, Failure> {
        let temporary: OsString = super::draft_name().into();
        let flags = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let mode = Mode::S_IRUSR | Mode::S_IWUSR;
        let file = openat(&self.fd, temporary.as_os_str(), flags, mode)
            .map_err(failed("create a file in", &self.path))?;
        Ok(Draft { directory: self, temporary, file: file.into(), published: false })
    }

    /// Makes a link, in place of what has the name unless that is a directory.
    pub(super) fn link(
        &self,
        name: &[u8],
        target: &[u8],
        found: &Attributes,
        options: Options,
    ) -> Result<(), Failure> {
        let (path, name) = (self.path(name), OsStr::from_bytes(name));
        match unlinkat(&self.fd, name, UnlinkatFlags::NoRemoveDir) {
            Ok(()) | Err(Errno::ENOENT) => {}
            Err(error) => return Err(failed("replace", &path)(error)),
        }
        let made = symlinkat(OsStr::from_bytes(target), &self.fd, name).and_then(|()| {
            if options.archive {
                let (uid, gid) = owner(found);
                fchownat(&self.fd, name, uid, gid, nix::fcntl::AtFlags::AT_SYMLINK_NOFOLLOW)?;
            }
            let (accessed, modified) = times(found);
            utimensat(&self.fd, name, &accessed, &modified, UtimensatFlags::NoFollowSymlink)
        });
        made.map_err(failed("make link", &path))
    }

    /// Gives the directory what the container's has.
    pub(super) fn finish(&self, found: &Attributes, options: Options) -> Result<(), Failure> {
        dress(&self.fd, found, options).map_err(failed("set attributes of", &self.path))
    }
}

impl Draft<'_> {
    pub(super) fn write(&self, data: &[u8], offset: u64) -> Result<(), Failure> {
        self.file.write_all_at(data, offset).map_err(Failure::host("write in", &self.directory.path))
    }

    /// Gives the file its size, its attributes and its name.
    pub(super) fn publish(
        mut self,
        name: &[u8],
        size: u64,
        found: &Attributes,
        options: Options,
    ) -> Result<(), Failure> {
        let (directory, path) = (&self.directory.fd, self.directory.path(name));
        self.file.set_len(size).map_err(Failure::host("set size of", &path))?;
        dress(&self.file, found, options).map_err(failed("set attributes of", &path))?;
        renameat(directory, self.temporary.as_os_str(), directory, OsStr::from_bytes(name))
            .map_err(failed("write", &path))?;
        self.published = true;
        Ok(())
    }
}

impl Drop for Draft<'_> {
    fn drop(&mut self) {
        if !self.published {
            let _ = unlinkat(&self.directory.fd, self.temporary.as_os_str(), UnlinkatFlags::NoRemoveDir);
        }
    }
}

fn owner(found: &Attributes) -> (Option<Uid>, Option<Gid>) {
    (Some(Uid::from_raw(found.uid)), Some(Gid::from_raw(found.gid)))
}

fn times(found: &Attributes) -> (TimeSpec, TimeSpec) {
    let time = |ns: i64| TimeSpec::new(ns.div_euclid(1_000_000_000), ns.rem_euclid(1_000_000_000));
    (time(found.accessed_ns), time(found.modified_ns))
}

/// The owner first: a change of it takes set-id bits away.
fn dress(file: impl std::os::fd::AsFd, found: &Attributes, options: Options) -> nix::Result<()> {
    let file = file.as_fd();
    let mut mode = found.mode & PLAIN_BITS;
    if options.archive {
        let (uid, gid) = owner(found);
        fchown(file, uid, gid)?;
        mode = found.mode;
    }
    fchmod(file, Mode::from_bits_truncate(mode))?;
    let (accessed, modified) = times(found);
    futimens(file, &accessed, &modified)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};

    use super::*;

    const OPTIONS: Options = Options { archive: false, follow: false };

    fn found(mode: u32) -> Attributes {
        Attributes { mode, modified_ns: 1_000_000_007, accessed_ns: -5, ..Default::default() }
    }

    #[test]
    fn a_file_appears_complete_or_not_at_all() {
        let home = tempfile::tempdir().unwrap();
        let directory = Directory::open(home.path()).unwrap();
        let draft = directory.draft().unwrap();
        draft.write(b"half", 0).unwrap();
        drop(draft);
        assert_eq!(std::fs::read_dir(home.path()).unwrap().count(), 0);
        let draft = directory.draft().unwrap();
        draft.write(b"end", 1 << 20).unwrap();
        draft.publish(b"f", (1 << 20) + 10, &found(0o4755), OPTIONS).unwrap();
        let metadata = std::fs::metadata(home.path().join("f")).unwrap();
        assert_eq!((metadata.len(), metadata.permissions().mode() & 0o7777), ((1 << 20) + 10, 0o755));
        assert_eq!((metadata.mtime(), metadata.mtime_nsec(), metadata.atime()), (1, 7, -1));
        assert!(metadata.blocks() * 512 < 1 << 20, "a hole stays one");
    }

    #[test]
    fn links_in_the_destination_lead_nowhere() {
        let home = tempfile::tempdir().unwrap();
        let (inside, outside) = (home.path().join("in"), home.path().join("out"));
        for path in [&inside, &outside] {
            std::fs::create_dir(path).unwrap();
        }
        std::fs::write(outside.join("kept"), b"kept").unwrap();
        let directory = Directory::open(&inside).unwrap();
        // A guest that first sends a link and then a directory or a file of its name.
        directory.link(b"trap", outside.as_os_str().as_bytes(), &found(0), OPTIONS).unwrap();
        assert!(directory.directory(b"trap").is_err());
        symlink(outside.join("kept"), inside.join("f")).unwrap();
        let draft = directory.draft().unwrap();
        draft.write(b"new", 0).unwrap();
        draft.publish(b"f", 3, &found(0o600), OPTIONS).unwrap();
        assert_eq!(std::fs::read(outside.join("kept")).unwrap(), b"kept");
        assert_eq!(std::fs::read(inside.join("f")).unwrap(), b"new");
        assert!(!std::fs::symlink_metadata(inside.join("f")).unwrap().is_symlink());
        // A directory is not replaced by what is none.
        let (_, made) = directory.directory(b"d").unwrap();
        assert!(made && !directory.directory(b"d").unwrap().1);
        assert!(directory.link(b"d", b"x", &found(0), OPTIONS).is_err());
        assert!(directory.draft().unwrap().publish(b"d", 0, &found(0o600), OPTIONS).is_err());
        assert_eq!(std::fs::read_dir(&outside).unwrap().count(), 1);
    }
}
