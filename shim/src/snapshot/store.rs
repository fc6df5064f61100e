//! What there is in a store.

use std::collections::HashSet;
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use rustix::fs::{Mode, OFlags, openat};

use super::error::{FileError, StoreError, host};
use super::manifest::{FILE, MAX_BYTES, Manifest, ManifestError, Purpose, SnapshotId};
use super::{DIRECTORY, Draft, Opened};
use crate::rootfs::{lock, temporary};

/// Shortest part of an id that stands for it.
const MIN_PREFIX: usize = 4;

/// See the module above. Making one touches nothing.
#[derive(Clone)]
pub struct Store {
    root: PathBuf,
    /// Told of every step of what changes the store, for tests that end there.
    #[cfg(test)]
    pub(super) on_step: fn(&str),
}

impl std::fmt::Debug for Store {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Store").field("root", &self.root).finish_non_exhaustive()
    }
}

/// A snapshot in a store.
#[derive(Debug, Clone)]
pub struct Entry {
    pub manifest: Manifest,
    /// When it came into this store.
    pub arrived: SystemTime,
}

/// Oldest first.
#[derive(Debug, Default)]
pub struct Listing {
    pub entries: Vec<Entry>,
    /// Those that cannot be used, and why. They can be removed.
    pub broken: Vec<(SnapshotId, StoreError)>,
}

impl Store {
    pub fn new(state_dir: &Path) -> Self {
        Self {
            root: state_dir.join(DIRECTORY),
            #[cfg(test)]
            on_step: |_| {},
        }
    }

    pub fn root(&self) -> &Path {
        &self.root
    }

    pub(super) fn path(&self, id: SnapshotId) -> PathBuf {
        self.root.join(id.to_string())
    }

    #[allow(clippy::unused_self)]
    pub(super) fn step(&self, _what: &str) {
        #[cfg(test)]
        (self.on_step)(_what);
    }

    pub(super) fn make_root(&self) -> Result<(), StoreError> {
        let made = std::fs::DirBuilder::new().recursive(true).mode(0o700).create(&self.root);
        made.map_err(host("make", &self.root))
    }

    /// Begins a snapshot, after what killed processes left has been removed.
    pub fn begin(&self) -> Result<Draft, StoreError> {
        self.make_root()?;
        self.sweep();
        Draft::new(self.clone())
    }

    /// Removes what killed processes left half-made or half-removed.
    pub fn sweep(&self) {
        temporary::sweep(&self.root);
    }

    /// The ids that directories have, whatever is in these.
    pub(super) fn ids(&self) -> Result<Vec<SnapshotId>, StoreError> {
        let entries = match std::fs::read_dir(&self.root) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            other => other.map_err(host("list", &self.root))?,
        };
        let mut ids = Vec::new();
        for entry in entries {
            let entry = entry.map_err(host("list", &self.root))?;
            // Others are half-made, or not the store's.
            ids.extend(entry.file_name().to_str().and_then(|name| name.parse::<SnapshotId>().ok()));
        }
        ids.sort();
        Ok(ids)
    }

    /// All snapshots. Manifests are checked, files are not.
    pub fn list(&self) -> Result<Listing, StoreError> {
        let mut listing = Listing::default();
        for id in self.ids()? {
            match self.entry(id) {
                Ok(entry) => listing.entries.push(entry),
                // Removed while the list was being made.
                Err(StoreError::NoSuch { .. }) => {}
                Err(error) => listing.broken.push((id, error)),
            }
        }
        listing.entries.sort_by_key(|entry| (entry.arrived, entry.manifest.id));
        Ok(listing)
    }

    pub(super) fn entry(&self, id: SnapshotId) -> Result<Entry, StoreError> {
        let dir = self.directory(id)?;
        let metadata = dir.metadata().map_err(host("look at", &self.path(id)))?;
        let arrived = metadata.modified().map_err(host("look at", &self.path(id)))?;
        Ok(Entry { manifest: self.manifest(id, &dir)?, arrived })
    }

    /// A snapshot's directory, which is not removed while the descriptor is open.
    pub(super) fn directory(&self, id: SnapshotId) -> Result<File, StoreError> {
        let path = self.path(id);
        let none = || StoreError::NoSuch { wanted: id.to_string(), store: self.root.clone() };
        let flags = libc::O_DIRECTORY | libc::O_NOFOLLOW;
        let dir = match std::fs::OpenOptions::new().read(true).custom_flags(flags).open(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(none()),
            other => other.map_err(host("open", &path))?,
        };
        dir.lock_shared().map_err(host("lock", &path))?;
        if lock::is_still(&path, &dir).map_err(host("look at", &path))? { Ok(dir) } else { Err(none()) }
    }

    pub(super) fn manifest(&self, id: SnapshotId, dir: &File) -> Result<Manifest, StoreError> {
        let file =
            file_in(dir, FILE).map_err(|source| StoreError::File { id, file: FILE.to_owned(), source })?;
        let mut bytes = Vec::new();
        // One more than allowed, so that it shows.
        file.take(MAX_BYTES + 1)
            .read_to_end(&mut bytes)
            .map_err(host("read the manifest in", &self.path(id)))?;
        let manifest = Manifest::decode(&bytes).map_err(|source| StoreError::Manifest { id, source })?;
        if manifest.id != id {
            let (found, allowed) = (manifest.id.to_string(), "its directory's name is allowed");
            let source = ManifestError::Field { field: "the id", found, allowed };
            return Err(StoreError::Manifest { id, source });
        }
        Ok(manifest)
    }

    /// Opens a snapshot: its manifest and state are undamaged then, and every file is there and as long as it
    /// should be. The files stay usable whatever is removed later.
    pub fn open(&self, id: SnapshotId) -> Result<Opened, StoreError> {
        let dir = self.directory(id)?;
        Opened::new(self.manifest(id, &dir)?, &dir)
    }

    /// As [`Self::open`], and reads layers that were written to since the snapshot was made: those have no reason to be as they
    /// were. What a disk spoils by itself only [`Opened::verify`] finds, which reads all.
    pub(super) fn open_unchanged(&self, id: SnapshotId) -> Result<Opened, StoreError> {
        let (opened, made) = {
            // No longer: who removes the snapshot waits for it.
            let dir = self.directory(id)?;
            let opened = Opened::new(self.manifest(id, &dir)?, &dir)?;
            // Written when everything else was.
            let manifest = file_in(&dir, FILE).and_then(|file| Ok(file.metadata()?.modified()?));
            let bad = |source| StoreError::File { id, file: FILE.to_owned(), source };
            (opened, manifest.map_err(bad)?)
        };
        opened.verify_written_since(made)?;
        Ok(opened)
    }

    /// The snapshot that is meant by an id, the beginning of one, or a name.
    pub fn find(&self, wanted: &str) -> Result<SnapshotId, StoreError> {
        let ids = self.ids()?;
        if let Some(id) = ids.iter().find(|id| id.to_string() == wanted) {
            return Ok(*id);
        }
        let named = self.list()?.entries.into_iter();
        let mut meant: Vec<_> = named
            .filter(|entry| entry.manifest.purpose == Purpose::Template)
            .filter(|entry| entry.manifest.name.as_deref() == Some(wanted))
            .map(|entry| entry.manifest.id)
            .collect();
        // A name, which an archive brings with it, does not outrank an id.
        if wanted.len() >= MIN_PREFIX {
            meant.extend(ids.into_iter().filter(|id| id.to_string().starts_with(wanted)));
            meant.sort();
            meant.dedup();
        }
        match meant[..] {
            [id] => Ok(id),
            [] => Err(StoreError::NoSuch { wanted: wanted.to_owned(), store: self.root.clone() }),
            _ => Err(StoreError::Ambiguous { wanted: wanted.to_owned(), count: meant.len() }),
        }
    }

    /// The snapshot and those that it came from, as far as they are still there.
    pub fn lineage(&self, id: SnapshotId) -> Result<Vec<Manifest>, StoreError> {
        let (mut line, mut seen, mut next) = (Vec::new(), HashSet::new(), Some(id));
        while let Some(at) = next {
            if !seen.insert(at) {
                return Err(StoreError::Cycle { id, at });
            }
            match self.entry(at) {
                Err(StoreError::NoSuch { .. }) if at != id => break,
                entry => {
                    let manifest = entry?.manifest;
                    next = manifest.parent;
                    line.push(manifest);
                }
            }
        }
        Ok(line)
    }

    /// Removes a snapshot, a damaged one too. It is gone at once, its storage by and by; others keep the layers
    /// that they share with it, and who has it open keeps that.
    pub fn remove(&self, id: SnapshotId) -> Result<(), StoreError> {
        let path = self.path(id);
        let dir = self.directory(id)?;
        dir.lock().map_err(host("lock", &path))?;
        let doomed = temporary::Temporary::new(&self.root, &id.to_string());
        // The lock was free for a moment between shared and exclusive.
        match std::fs::rename(&path, doomed.path()) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(StoreError::NoSuch { wanted: id.to_string(), store: self.root.clone() });
            }
            other => other.map_err(host("remove", &path))?,
        }
        self.step("renamed away");
        sync_directory(&self.root)?;
        self.step("durably gone");
        drop(doomed);
        Ok(())
    }
}

pub(super) fn sync_directory(path: &Path) -> Result<(), StoreError> {
    File::open(path).and_then(|dir| dir.sync_all()).map_err(host("write back", path))
}

/// Opens a regular file of that name, and nothing that a name may lead to.
pub(super) fn file_in(dir: &File, name: &str) -> Result<File, FileError> {
    // Without O_NONBLOCK a fifo would keep us waiting.
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let file = match openat(dir, name, flags, Mode::empty()) {
        Ok(fd) => File::from(fd),
        Err(rustix::io::Errno::NOENT) => return Err(FileError::Missing),
        Err(rustix::io::Errno::LOOP | rustix::io::Errno::NXIO) => return Err(FileError::Kind),
        Err(error) => return Err(FileError::Read(error.into())),
    };
    if file.metadata()?.is_file() { Ok(file) } else { Err(FileError::Kind) }
}
