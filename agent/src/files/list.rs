//! A directory's entries, a page at a time.
//!
//! A page is found by name, not by the kernel's position: that holds across calls whatever the
//! file system is, and whatever comes and goes meanwhile.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;

use nix::dir::Dir;
use nix::errno::Errno;
use nix::fcntl::AtFlags;
use nix::sys::stat::fstatat;
use spore_agent_api::files::{MAX_ENTRIES, is_name};
use spore_agent_api::v1::files::Entry;

use super::attributes::attributes;
use super::root::Root;
use crate::error::{AgentError, Result};

/// Most names that one directory may have to be listed: a page reads them all.
const MAX_NAMES: usize = 4 * 1024 * 1024;

/// The first names after `after`, and whether there are more. A `limit` of 0 is the most.
pub fn list(root: &Root, path: &[u8], after: &[u8], limit: u32) -> Result<(Vec<Entry>, bool)> {
    const VERB: &str = "list";
    let limit = usize::try_from(limit).unwrap_or(usize::MAX);
    if limit > MAX_ENTRIES {
        return Err(root.refused(VERB, path, format!("{limit} entries, at most {MAX_ENTRIES} are allowed")));
    }
    let limit = if limit == 0 { MAX_ENTRIES } else { limit };
    let directory = root.directory(VERB, path)?;
    let failed = root.failed(VERB, path);
    let mut dir = Dir::from_fd(directory).map_err(&failed)?;
    // The smallest names so far, and one more to know that there are others.
    let mut names = BTreeSet::<Vec<u8>>::new();
    for (count, entry) in dir.iter().enumerate() {
        if count >= MAX_NAMES {
            let what = format!("{VERB} \"{}\"", path.escape_ascii());
            return Err(AgentError::FailedPrecondition(format!(
                "{what}: it has more than {MAX_NAMES} entries"
            )));
        }
        let entry = entry.map_err(&failed)?;
        let name = entry.file_name().to_bytes();
        if !is_name(name) || name <= after {
            continue;
        }
        if names.len() > limit {
            if names.last().is_some_and(|last| name >= last.as_slice()) {
                continue;
            }
            names.pop_last();
        }
        names.insert(name.to_vec());
    }
    let more = names.len() > limit;
    let mut entries = Vec::with_capacity(names.len().min(limit));
    for name in names.into_iter().take(limit) {
        match fstatat(&dir, OsStr::from_bytes(&name), AtFlags::AT_SYMLINK_NOFOLLOW) {
            Ok(stat) => {
                let attributes = Some(attributes(&stat)).into();
                entries.push(Entry { name, attributes, ..Default::default() });
            }
            // Gone since.
            Err(Errno::ENOENT) => {}
            Err(error) => return Err(failed(error)),
        }
    }
    Ok((entries, more))
}
