//! Writer of "newc" cpio archives that depend on nothing but their content.
//!
//! Entries are sorted by path, inode numbers count up, times, owners and device numbers
//! of the archive are zero. Format: the kernel's Documentation/driver-api/early-userspace/
//! buffer-format.rst (also the section "New ASCII Format" of cpio(5)).

use std::collections::BTreeMap;

use crate::error::{Error, Result};

const S_IFREG: u32 = 0o100_000;
const S_IFDIR: u32 = 0o040_000;
const S_IFCHR: u32 = 0o020_000;
const TRAILER: &str = "TRAILER!!!";
/// The kernel refuses longer names (PATH_MAX).
const MAX_NAME: usize = 4095;
/// Archives are padded to this, as by cpio(1).
const BLOCK: usize = 512;

#[derive(Debug, Clone, PartialEq, Eq)]
enum Node {
    Directory { mode: u32 },
    File { mode: u32, data: Vec<u8> },
    CharDevice { mode: u32, major: u32, minor: u32 },
}

/// An archive being put together; the order of calls does not matter.
#[derive(Debug, Default)]
pub(crate) struct Archive {
    nodes: BTreeMap<String, Node>,
}

impl Archive {
    pub(crate) fn new() -> Self {
        Self::default()
    }

    /// Adds a directory (0755 when it only exists as a parent).
    pub(crate) fn directory(&mut self, path: &str, mode: u32) -> Result<()> {
        let path = self.checked(path)?;
        if let Some(Node::Directory { mode: old }) = self.nodes.get_mut(&path) {
            *old = mode;
            return Ok(());
        }
        self.insert(path, Node::Directory { mode })
    }

    pub(crate) fn file(&mut self, path: &str, mode: u32, data: Vec<u8>) -> Result<()> {
        let path = self.checked(path)?;
        if u32::try_from(data.len()).is_err() {
            return Err(Error::Cpio { path, reason: "larger than 4 GiB" });
        }
        self.insert(path, Node::File { mode, data })
    }

    pub(crate) fn char_device(&mut self, path: &str, mode: u32, major: u32, minor: u32) -> Result<()> {
        let path = self.checked(path)?;
        self.insert(path, Node::CharDevice { mode, major, minor })
    }

    /// Validates `path` and makes its parents.
    fn checked(&mut self, path: &str) -> Result<String> {
        let relative = path.strip_prefix('/').unwrap_or(path);
        let bad = |reason| Err(Error::Cpio { path: path.to_owned(), reason });
        if relative.len() > MAX_NAME || relative.contains('\0') {
            return bad("name too long or with a NUL");
        }
        if relative.split('/').any(|part| part.is_empty() || part == "." || part == "..") {
            return bad("not a plain absolute path");
        }
        if relative == TRAILER {
            return bad("the name is reserved");
        }
        for (end, _) in relative.match_indices('/') {
            let parent = &relative[..end];
            match self.nodes.get(parent) {
                Some(Node::Directory { .. }) => {}
                Some(_) => return bad("its parent is not a directory"),
                None => self.insert(parent.to_owned(), Node::Directory { mode: 0o755 })?,
            }
        }
        Ok(relative.to_owned())
    }

    fn insert(&mut self, path: String, node: Node) -> Result<()> {
        if self.nodes.contains_key(&path) {
            return Err(Error::Cpio { path, reason: "added twice" });
        }
        self.nodes.insert(path, node);
        Ok(())
    }

    /// The finished archive.
    pub(crate) fn finish(self) -> Result<Vec<u8>> {
        let mut out = Vec::new();
        let mut inode = 0;
        // A parent sorts before its children as it is their prefix.
        for (path, node) in &self.nodes {
            inode += 1;
            match node {
                Node::Directory { mode } => header(&mut out, inode, S_IFDIR | mode, 2, &[], (0, 0), path)?,
                Node::File { mode, data } => header(&mut out, inode, S_IFREG | mode, 1, data, (0, 0), path)?,
                Node::CharDevice { mode, major, minor } => {
                    header(&mut out, inode, S_IFCHR | mode, 1, &[], (*major, *minor), path)?;
                }
            }
        }
        header(&mut out, 0, 0, 1, &[], (0, 0), TRAILER)?;
        out.resize(out.len().next_multiple_of(BLOCK), 0);
        Ok(out)
    }
}

fn header(
    out: &mut Vec<u8>,
    inode: u32,
    mode: u32,
    links: u32,
    data: &[u8],
    (major, minor): (u32, u32),
    name: &str,
) -> Result<()> {
    let too_large = |_| Error::Cpio { path: name.to_owned(), reason: "larger than 4 GiB" };
    let size = u32::try_from(data.len()).map_err(too_large)?;
    let name_size = u32::try_from(name.len() + 1).map_err(too_large)?;
    // uid, gid, mtime, the archive's device and the checksum stay zero.
    let fields = [inode, mode, 0, 0, links, 0, size, 0, 0, major, minor, name_size, 0];
    out.extend_from_slice(b"070701");
    for field in fields {
        out.extend_from_slice(format!("{field:08x}").as_bytes());
    }
    out.extend_from_slice(name.as_bytes());
    out.push(0);
    pad4(out);
    out.extend_from_slice(data);
    pad4(out);
    Ok(())
}

fn pad4(out: &mut Vec<u8>) {
    out.resize(out.len().next_multiple_of(4), 0);
}

#[cfg(test)]
#[path = "cpio_tests.rs"]
mod tests;
