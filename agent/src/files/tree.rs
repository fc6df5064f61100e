//! Directories, links and names: made, renamed, removed.

use std::ffi::{OsStr, OsString};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};

use nix::dir::Dir;
use nix::errno::Errno;
use nix::fcntl::{OFlag, RenameFlags, openat, renameat, renameat2};
use nix::sys::stat::{Mode, fchmod, mkdirat};
use nix::unistd::{UnlinkatFlags, symlinkat, unlinkat};
use spore_agent_api::files::{MAX_PATH, is_name};

use super::attributes::check_mode;
use super::root::Root;
use crate::error::{AgentError, Result};

/// Entries that one call removes: a large tree takes several, none of them long.
const REMOVE_BUDGET: u64 = 4096;
/// Directories below each other that are removed; each is held open.
const MAX_DEPTH: usize = 256;
/// Names that are read of a directory at a time.
const BATCH: usize = 256;
const DIRECTORY: OFlag =
    OFlag::O_RDONLY.union(OFlag::O_DIRECTORY).union(OFlag::O_NOFOLLOW).union(OFlag::O_CLOEXEC);
const PARENT_MODE: u32 = 0o755;

/// What Remove answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Removed {
    pub count: u64,
    pub done: bool,
}

/// Makes a directory; says whether it was missing.
pub fn make_directory(root: &Root, path: &[u8], mode: u32, parents: bool) -> Result<bool> {
    const VERB: &str = "make directory";
    check_mode(root, VERB, path, mode)?;
    if parents {
        // The root is there.
        if path.iter().all(|byte| *byte == b'/') {
            return root.find(VERB, path, true).map(|_| false);
        }
        let ends = path.iter().enumerate().filter(|(at, byte)| **byte == b'/' && *at > 0);
        for (at, _) in ends.filter(|(at, _)| path[at + 1..].iter().any(|byte| *byte != b'/')) {
            let parent = &path[..at];
            match root.directory(VERB, parent) {
                Err(AgentError::NotFound(_)) => match make_one(root, VERB, parent, PARENT_MODE) {
                    Ok(()) | Err(AgentError::AlreadyExists(_)) => {}
                    Err(error) => return Err(error),
                },
                other => drop(other?),
            }
        }
    }
    match make_one(root, VERB, path, mode) {
        Ok(()) => Ok(true),
        // Unless something else has the name.
        Err(AgentError::AlreadyExists(_)) if parents => root.directory(VERB, path).map(|_| false),
        Err(error) => Err(error),
    }
}

fn make_one(root: &Root, verb: &str, path: &[u8], mode: u32) -> Result<()> {
    let place = root.place(verb, path)?;
    let failed = root.failed(verb, path);
    mkdirat(&place.dir, place.name, Mode::S_IRWXU).map_err(&failed)?;
    let made = openat(&place.dir, place.name, DIRECTORY, Mode::empty()).map_err(&failed)?;
    // The umask has no say.
    fchmod(&made, Mode::from_bits_truncate(mode)).map_err(&failed)
}

pub fn link(root: &Root, path: &[u8], target: &[u8]) -> Result<()> {
    const VERB: &str = "make link";
    if target.is_empty() || target.len() > MAX_PATH || target.contains(&0) {
        let length = target.len();
        let why = format!("a target of {length} bytes; 1 to {MAX_PATH} are allowed, none of them 0");
        return Err(root.refused(VERB, path, why));
    }
    let place = root.place(VERB, path)?;
    symlinkat(OsStr::from_bytes(target), &place.dir, place.name).map_err(root.failed(VERB, path))
}

pub fn rename(root: &Root, from: &[u8], to: &[u8], replace: bool) -> Result<()> {
    const VERB: &str = "rename";
    let (old, new) = (root.place(VERB, from)?, root.place("rename to", to)?);
    let renamed = if replace {
        renameat(&old.dir, old.name, &new.dir, new.name)
    } else {
        renameat2(&old.dir, old.name, &new.dir, new.name, RenameFlags::RENAME_NOREPLACE)
    };
    renamed.map_err(|error| match error {
        Errno::EEXIST | Errno::ENOTEMPTY | Errno::EISDIR | Errno::ENOTDIR => {
            root.failed("rename to", to)(error)
        }
        _ => root.failed(VERB, from)(error),
    })
}

pub fn remove(root: &Root, path: &[u8], recursive: bool) -> Result<Removed> {
    const VERB: &str = "remove";
    let place = root.place(VERB, path)?;
    match unlink(&place.dir, place.name) {
        Ok(()) => Ok(Removed { count: 1, done: true }),
        Err(Errno::ENOTEMPTY | Errno::EEXIST) if recursive => {
            remove_tree(place.dir, place.name, REMOVE_BUDGET).map_err(|(below, error)| match error {
                Errno::ELOOP => {
                    let why = format!("deeper than {MAX_DEPTH} directories; remove a part of it first");
                    root.refused(VERB, path, why)
                }
                error => root.failed(VERB, &[path, below.as_slice()].concat())(error),
            })
        }
        Err(error) => Err(root.failed(VERB, path)(error)),
    }
}

/// Removes a file, or an empty directory.
fn unlink(dir: &OwnedFd, name: &OsStr) -> nix::Result<()> {
    match unlinkat(dir, name, UnlinkatFlags::NoRemoveDir) {
        Err(Errno::EISDIR) => unlinkat(dir, name, UnlinkatFlags::RemoveDir),
        other => other,
    }
}

/// Removes a tree, at most `budget` entries of it, without following links or holding names of
/// more than a batch. An error comes with the path below `name`.
fn remove_tree(parent: OwnedFd, name: &OsStr, budget: u64) -> std::result::Result<Removed, (Vec<u8>, Errno)> {
    let mut count = 0;
    // Directories that are being emptied, each in the one before it; the first is not ours.
    let mut above = vec![(parent, name.to_owned())];
    let mut current = open_below(&above).map_err(|error| (Vec::new(), error))?;
    loop {
        let names = some_names(&current).map_err(|error| (below(&above, None), error))?;
        if names.is_empty() {
            let Some((dir, name)) = above.pop() else { return Ok(Removed { count, done: true }) };
            match unlinkat(&dir, name.as_os_str(), UnlinkatFlags::RemoveDir) {
                Ok(()) | Err(Errno::ENOENT) => count += 1,
                // Somebody puts things into it.
                Err(Errno::ENOTEMPTY | Errno::EEXIST) => return Ok(Removed { count, done: false }),
                Err(error) => {
                    above.push((dir, name));
                    return Err((below(&above, None), error));
                }
            }
            if above.is_empty() {
                return Ok(Removed { count, done: true });
            }
            current = dir;
            continue;
        }
        for name in names {
            if count >= budget {
                return Ok(Removed { count, done: false });
            }
            match unlink(&current, &name) {
                Ok(()) | Err(Errno::ENOENT) => count += 1,
                Err(Errno::ENOTEMPTY | Errno::EEXIST) => {
                    if above.len() >= MAX_DEPTH {
                        return Err((below(&above, Some(&name)), Errno::ELOOP));
                    }
                    above.push((current, name));
                    current = open_below(&above).map_err(|error| (below(&above, None), error))?;
                    break;
                }
                Err(error) => return Err((below(&above, Some(&name)), error)),
            }
        }
    }
}

fn open_below(above: &[(OwnedFd, OsString)]) -> nix::Result<OwnedFd> {
    let (dir, name) = above.last().ok_or(Errno::EINVAL)?;
    openat(dir, name.as_os_str(), DIRECTORY, Mode::empty())
}

fn below(above: &[(OwnedFd, OsString)], name: Option<&OsStr>) -> Vec<u8> {
    let names = above.iter().skip(1).map(|(_, name)| name.as_os_str()).chain(name);
    names.flat_map(|name| [b"/", name.as_bytes()].concat()).collect()
}

fn some_names(dir: &OwnedFd) -> nix::Result<Vec<OsString>> {
    let mut names = Vec::new();
    for entry in Dir::openat(dir, ".", DIRECTORY, Mode::empty())?.iter() {
        let name = entry?.file_name().to_bytes().to_vec();
        if is_name(&name) {
            names.push(OsString::from_vec(name));
        }
        if names.len() == BATCH {
            break;
        }
    }
    Ok(names)
}
