//! How much a store holds, what may go, and whether there is room for more.

use std::collections::HashMap;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::{Duration, SystemTime};

use super::error::host;
use super::manifest::Purpose;
use super::{Entry, SnapshotId, Store, StoreError};

/// What the operator allows.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Policy {
    /// Most bytes of storage that all snapshots together may take.
    pub quota: Option<u64>,
    /// How old a snapshot may get, from its arrival in the store.
    pub max_age: Option<Duration>,
    /// Bytes that have to stay free on the file system.
    pub reserve: u64,
    /// What is removed to that end; all but hibernating tasks by default.
    pub only: Option<Purpose>,
    /// How many are removed at most.
    pub most: Option<usize>,
}

impl Policy {
    /// What may come into a store whose operator says nothing: it leaves so much room on the host's disk.
    pub const ADMITTED: Self =
        Self { quota: None, max_age: None, reserve: 512 << 20, only: None, most: None };
}

/// Storage that a snapshot's files take, in bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Size {
    /// What goes with it when it is removed.
    pub own: u64,
    /// What has names elsewhere too: in other snapshots, or in the file systems of images and containers.
    pub shared: u64,
}

/// What was removed.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Pruned {
    pub removed: Vec<SnapshotId>,
    /// Bytes of storage that only these had in the store. What others outside it have names for stays.
    pub freed: u64,
}

/// A file, whatever its names.
type Inode = (u64, u64);

/// Storage by file: its bytes, and in how many directories of the store it is.
#[derive(Default)]
struct Usage(HashMap<Inode, (u64, u32)>);

impl Usage {
    fn add(&mut self, dir: &Path) -> Vec<Inode> {
        let mut files = Vec::new();
        // What vanishes meanwhile takes no room.
        for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
            let Ok(metadata) = entry.metadata() else { continue };
            let inode = (metadata.dev(), metadata.ino());
            self.0.entry(inode).or_insert((metadata.blocks() * 512, 0)).1 += 1;
            files.push(inode);
        }
        files
    }

    fn total(&self) -> u64 {
        self.0.values().map(|(bytes, _)| bytes).sum()
    }

    /// Bytes that go with these files.
    fn remove(&mut self, files: &[Inode]) -> u64 {
        let mut freed = 0;
        for inode in files {
            if let Some((bytes, names)) = self.0.get_mut(inode) {
                *names -= 1;
                if *names == 0 {
                    freed += *bytes;
                    self.0.remove(inode);
                }
            }
        }
        freed
    }
}

impl Store {
    fn usage(&self) -> Result<(Usage, HashMap<SnapshotId, Vec<Inode>>), StoreError> {
        let (mut usage, mut files) = (Usage::default(), HashMap::new());
        for id in self.ids()? {
            files.insert(id, usage.add(&self.path(id)));
        }
        // What is being made takes room too.
        for entry in std::fs::read_dir(self.root()).into_iter().flatten().flatten() {
            if entry.file_name().as_encoded_bytes().starts_with(b".") {
                usage.add(&entry.path());
            }
        }
        Ok((usage, files))
    }

    /// What vanishes meanwhile takes no room.
    pub fn size(&self, id: SnapshotId) -> Size {
        let mut size = Size::default();
        for entry in std::fs::read_dir(self.path(id)).into_iter().flatten().flatten() {
            let Ok(metadata) = entry.metadata() else { continue };
            let part = if metadata.nlink() > 1 { &mut size.shared } else { &mut size.own };
            *part += metadata.blocks() * 512;
        }
        size
    }

    /// Whether anything may be too old. It reads no manifest, so that asking often costs little.
    fn has_aged(&self, policy: &Policy, now: SystemTime) -> Result<bool, StoreError> {
        let Some(max) = policy.max_age else { return Ok(false) };
        let arrived = |id| std::fs::metadata(self.path(id)).and_then(|dir| dir.modified());
        let is_old = |arrived| now.duration_since(arrived).unwrap_or_default() > max;
        // What vanishes meanwhile has not to be removed.
        Ok(self.ids()?.into_iter().any(|id| arrived(id).is_ok_and(is_old)))
    }

    /// Bytes of storage that the store takes; what several snapshots share counts once.
    pub fn used(&self) -> Result<u64, StoreError> {
        Ok(self.usage()?.0.total())
    }

    /// Removes what is too old, then the oldest until `needed` more bytes fit into the quota. Those of tasks that
    /// hibernate and broken ones stay.
    pub fn prune(&self, policy: &Policy, needed: u64, now: SystemTime) -> Result<Pruned, StoreError> {
        self.sweep();
        if policy.quota.is_none() && !self.has_aged(policy, now)? {
            return Ok(Pruned::default());
        }
        let (mut usage, files) = self.usage()?;
        let mut pruned = Pruned::default();
        let prunable = |entry: &Entry| {
            let purpose = entry.manifest.purpose;
            purpose != Purpose::Hibernation && policy.only.is_none_or(|only| only == purpose)
        };
        for entry in self.list()?.entries.into_iter().filter(prunable) {
            let age = now.duration_since(entry.arrived).unwrap_or_default();
            let old = policy.max_age.is_some_and(|max| age > max);
            let full = policy.quota.is_some_and(|quota| usage.total().saturating_add(needed) > quota);
            if !old && !full {
                continue;
            }
            if policy.most.is_some_and(|most| pruned.removed.len() >= most) {
                break;
            }
            let id = entry.manifest.id;
            match self.remove(id) {
                // Somebody else was faster.
                Ok(()) | Err(StoreError::NoSuch { .. }) => {}
                Err(error) => return Err(error),
            }
            pruned.freed += files.get(&id).map_or(0, |files| usage.remove(files));
            pruned.removed.push(id);
        }
        Ok(pruned)
    }

    /// Whether there is room for `needed` bytes. Others may take it before they are written; that then fails, and is undone.
    pub fn admit(&self, policy: &Policy, needed: u64) -> Result<(), StoreError> {
        self.make_root()?;
        if let Some(quota) = policy.quota {
            let used = self.used()?;
            if used.saturating_add(needed) > quota {
                return Err(StoreError::Quota { needed, used, quota });
            }
        }
        let stat = nix::sys::statvfs::statvfs(self.root())
            .map_err(|error| host("look at the file system of", self.root())(error.into()))?;
        let free = stat.blocks_available().saturating_mul(stat.fragment_size());
        if free < needed.saturating_add(policy.reserve) {
            let (reserve, path) = (policy.reserve, self.root().to_owned());
            return Err(StoreError::NoRoom { needed, free, reserve, path });
        }
        Ok(())
    }
}
