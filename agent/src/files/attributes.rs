//! What a file is, apart from its content.

use std::fs::Permissions;
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::PermissionsExt;

use nix::fcntl::{AT_FDCWD, AtFlags, readlinkat};
use nix::sys::stat::{FileStat, UtimensatFlags, fstat, utimensat};
use nix::sys::time::TimeSpec;
use nix::unistd::{Gid, Uid, fchownat};
use spore_agent_api::files::MODE_BITS;
use spore_agent_api::v1::files::{Attributes, attributes::Kind};

use super::root::{Root, errno, reopened};
use crate::error::Result;

const SECOND: i64 = 1_000_000_000;
/// What stat(2) counts blocks in.
const BLOCK: u64 = 512;

/// What SetAttributes changes; nothing else.
#[derive(Debug, Clone, Copy, Default)]
pub struct Changes {
    pub owner: Option<(u32, u32)>,
    pub mode: Option<u32>,
    /// Access and modification, nanoseconds since the epoch.
    pub times: Option<(i64, i64)>,
}

/// The attributes, and a link's target unless it was followed.
pub fn stat(root: &Root, path: &[u8], follow: bool) -> Result<(Attributes, Vec<u8>)> {
    let found = root.find("stat", path, follow)?;
    let failed = root.failed("stat", path);
    let stat = fstat(&found).map_err(&failed)?;
    let target = match stat.st_mode & libc::S_IFMT {
        libc::S_IFLNK => readlinkat(&found, "").map_err(&failed)?.into_vec(),
        _ => Vec::new(),
    };
    Ok((attributes(&stat), target))
}

/// Changes attributes, the owner first: a change of it takes set-id bits away.
pub fn change(root: &Root, path: &[u8], follow: bool, changes: Changes) -> Result<()> {
    const VERB: &str = "change attributes of";
    if let Some(mode) = changes.mode {
        check_mode(root, VERB, path, mode)?;
    }
    let found = root.find(VERB, path, follow)?;
    let failed = root.failed(VERB, path);
    if let Some(owner) = changes.owner {
        set_owner(found.as_fd(), owner).map_err(&failed)?;
    }
    let again = reopened(&found);
    if let Some(mode) = changes.mode {
        std::fs::set_permissions(&again, Permissions::from_mode(mode))
            .map_err(|error| failed(errno(&error)))?;
    }
    if let Some((accessed, modified)) = changes.times {
        let (accessed, modified) = (time_spec(accessed), time_spec(modified));
        utimensat(AT_FDCWD, &again, &accessed, &modified, UtimensatFlags::FollowSymlink).map_err(&failed)?;
    }
    Ok(())
}

pub fn check_mode(root: &Root, verb: &str, path: &[u8], mode: u32) -> Result<()> {
    if mode & !MODE_BITS == 0 {
        return Ok(());
    }
    Err(root.refused(verb, path, format!("mode {mode:#o}: 0 to {MODE_BITS:#o} are allowed")))
}

/// Of what the descriptor names, also when it names a link.
pub fn set_owner(file: impl AsFd, (uid, gid): (u32, u32)) -> nix::Result<()> {
    fchownat(file, "", Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)), AtFlags::AT_EMPTY_PATH)
}

pub fn attributes(stat: &FileStat) -> Attributes {
    let kind = match stat.st_mode & libc::S_IFMT {
        libc::S_IFREG => Kind::FILE,
        libc::S_IFDIR => Kind::DIRECTORY,
        libc::S_IFLNK => Kind::SYMLINK,
        libc::S_IFIFO => Kind::FIFO,
        libc::S_IFSOCK => Kind::SOCKET,
        libc::S_IFCHR => Kind::CHARACTER_DEVICE,
        libc::S_IFBLK => Kind::BLOCK_DEVICE,
        _ => Kind::OTHER,
    };
    Attributes {
        kind: kind.into(),
        mode: stat.st_mode & MODE_BITS,
        uid: stat.st_uid,
        gid: stat.st_gid,
        size: u64::try_from(stat.st_size).unwrap_or(0),
        allocated: u64::try_from(stat.st_blocks).unwrap_or(0).saturating_mul(BLOCK),
        accessed_ns: nanoseconds(stat.st_atime, stat.st_atime_nsec),
        modified_ns: nanoseconds(stat.st_mtime, stat.st_mtime_nsec),
        changed_ns: nanoseconds(stat.st_ctime, stat.st_ctime_nsec),
        links: stat.st_nlink,
        device: stat.st_dev,
        inode: stat.st_ino,
        special: stat.st_rdev,
        ..Default::default()
    }
}

fn nanoseconds(seconds: i64, nanoseconds: i64) -> i64 {
    seconds.saturating_mul(SECOND).saturating_add(nanoseconds)
}

fn time_spec(nanoseconds: i64) -> TimeSpec {
    TimeSpec::new(nanoseconds.div_euclid(SECOND), nanoseconds.rem_euclid(SECOND))
}
