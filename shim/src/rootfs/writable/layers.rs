//! The files of a writable disk: one raw file, `writable.ext4`, until it is captured; from then on
//! that and deltas above it, of which only the last is written (`vmm/src/backend/disk`).
//!
//! `layers.json` beside them lists their names from the bottom up; without it there is the raw file alone. It comes
//! before anything that a guest writes to a new layer: [`Layers::add`] is durable before the
//! VMM gets the empty file to go on in. A layer that the list does not name was made by somebody who was killed before that, or has been
//! merged into another ([`merge`]), and is removed. One that it names and the VMM never switched to has nothing in it, and does no harm: an empty file, or one without a
//! header, is a layer that has nothing. Without the raw file there is no disk, whatever else is there.
//!
//! A captured layer is shared with snapshots by hard link. So a file with several names is never opened for
//! writing, whatever the list says: the list must have been lost.

mod merge;
mod rewind;

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

pub(crate) use self::rewind::Rewind;
use super::{DISK, host, publish, restoring};
use crate::rootfs::RootfsError;
use crate::rootfs::temporary::Temporary;
use crate::snapshot::{SnapshotId, digest, share};

pub(in crate::rootfs) const LIST: &str = "layers.json";
const VERSION: u32 = 1;
const PREFIX: &str = "layer-";
const SUFFIX: &str = ".delta";
/// What a VMM stacks at most.
const MAX: usize = crate::vm::MAX_DISK_LAYERS;
const MAX_LIST: u64 = 64 * 1024;

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct List {
    version: u32,
    /// From the bottom up.
    layers: Vec<String>,
}

/// Where the layers of a disk are, and what they are called.
#[derive(Debug, Clone)]
pub(crate) struct Layers {
    dir: PathBuf,
    /// From the bottom up; never empty.
    names: Vec<String>,
    /// The VMM that has the disk has the same layers.
    in_step: bool,
    /// Files of layers that have been merged, which may still be there.
    replaced: Vec<String>,
}

/// A writable disk as a VMM wants it.
#[derive(Debug)]
pub(crate) struct WritableDisk {
    /// Locked against a second sandbox as long as any copy of the descriptor is open.
    pub(crate) top: File,
    /// From the bottom up, for reading.
    pub(crate) below: Vec<File>,
    pub(crate) layers: Layers,
}

impl WritableDisk {
    /// Bytes of the disk.
    pub(crate) fn size(&self) -> io::Result<u64> {
        Ok(self.below.first().unwrap_or(&self.top).metadata()?.len())
    }
}

fn damaged(path: &Path, detail: impl Into<String>) -> RootfsError {
    RootfsError::BadLayer { path: path.into(), detail: detail.into() }
}

fn is_layer(name: &str) -> bool {
    let id = name.strip_prefix(PREFIX).and_then(|rest| rest.strip_suffix(SUFFIX));
    id.is_some_and(|id| id.parse::<SnapshotId>().is_ok())
}

/// The lock belongs to the open file, of which the VMM gets a descriptor: it lasts as long
/// as the VM does.
fn locked(path: &Path) -> Result<File, RootfsError> {
    let file = OpenOptions::new().read(true).write(true).open(path).map_err(host("open", path))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(RootfsError::InUse { path: path.into() }),
        Err(TryLockError::Error(error)) => Err(host("lock", path)(error)),
    }
}

impl Layers {
    fn raw(dir: &Path) -> Self {
        Self { dir: dir.into(), names: vec![DISK.to_owned()], in_step: true, replaced: Vec::new() }
    }

    /// What the directory holds; `None` when there is no disk.
    pub(in crate::rootfs) fn find(dir: &Path) -> Result<Option<Self>, RootfsError> {
        let path = dir.join(LIST);
        match std::fs::metadata(&path) {
            Ok(metadata) if metadata.len() > MAX_LIST => return Err(damaged(&path, "it is too long")),
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(host("look at", &path)(error));
            }
            _ => {}
        }
        let raw = Self::raw(dir);
        if !raw.top_path().exists() {
            return Ok(None);
        }
        let text = match std::fs::read(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Some(raw)),
            Err(error) => return Err(host("read", &path)(error)),
        };
        let list: List = serde_json::from_slice(&text).map_err(|error| damaged(&path, error.to_string()))?;
        let List { version, layers: names } = list;
        if version != VERSION {
            let detail = format!("it is of version {version}, this shim knows version {VERSION}");
            return Err(damaged(&path, detail));
        }
        let (bottom, deltas) = names.split_first().unzip();
        let deltas: &[String] = deltas.unwrap_or_default();
        let fits = bottom.is_some_and(|bottom| bottom == DISK) && deltas.iter().all(|name| is_layer(name));
        let twice = |at: usize| deltas[..at].contains(&deltas[at]);
        if !fits || names.len() > MAX || (0..deltas.len()).any(twice) {
            return Err(damaged(&path, "it lists what cannot be layers of a disk"));
        }
        Ok(Some(Self { dir: dir.into(), names, in_step: true, replaced: Vec::new() }))
    }

    /// Makes the disk of a directory that has none of these files, from the bottom up, which nobody is going to write, as those of
    /// a snapshot: by further names for them, where that can be. It goes on in a new layer above them. Until [`Self::keep`] it
    /// is there for one task only.
    pub(in crate::rootfs) fn adopt(dir: &Path, files: &[File]) -> Result<Self, RootfsError> {
        let Some((raw, deltas)) = files.split_first().filter(|_| files.len() < MAX) else {
            return Err(damaged(
                dir,
                format!("a disk of {} layers; 1 to {} can be taken", files.len(), MAX - 1),
            ));
        };
        // What is left of an attempt whose maker was killed.
        remove(dir)?;
        restoring::begin(dir)?;
        let mut layers = Self::raw(dir);
        let mut names = layers.names.clone();
        for delta in deltas {
            let (name, path) = layers.new_name()?;
            share(delta, &path).map_err(host("link", &path))?;
            names.push(name);
        }
        names.push(layers.stage()?.name);
        layers.write(names)?;
        // Last, as without it there is no disk.
        let (disk, path) = (Temporary::new(dir, DISK), dir.join(DISK));
        share(raw, disk.path()).and_then(|()| disk.publish(&path)).map_err(host("link", &path))?;
        Ok(layers)
    }

    /// An adopted disk is about to be written to by its task: from now on it stays when that ends. What its guest flushes stands on
    /// layers that another machine may have written a moment ago.
    pub(crate) fn keep(&self) -> Result<(), RootfsError> {
        for (file, name) in self.files()?.iter().zip(&self.names) {
            file.sync_data().map_err(host("write back", &self.dir.join(name)))?;
        }
        restoring::done(&self.dir)
    }

    /// The disk as it was when a snapshot with these `files` was taken of it, from the bottom up: they are its lowest layers, and it
    /// goes on in a new one above them. `None` when it is no descendant of that snapshot. The directory keeps the disk that it has until
    /// [`PutBack::commit`]; nobody else can use it meanwhile.
    pub(in crate::rootfs) fn put_back(
        self,
        files: &[File],
    ) -> Result<Option<(WritableDisk, PutBack)>, RootfsError> {
        let current = self.lock()?;
        if files.is_empty() || files.len() >= self.names.len() {
            return Ok(None);
        }
        let mut below = Vec::with_capacity(files.len());
        for (name, file) in self.names.iter().zip(files) {
            let own = self.read(name)?;
            if !is_same(&own, file).map_err(host("read", &self.dir.join(name)))? {
                return Ok(None);
            }
            below.push(own);
        }
        self.remove_unlisted();
        let mut names = self.names[..files.len()].to_vec();
        let mut layers = Self { names: names.clone(), ..self };
        let StagedLayer { file: top, name } = layers.stage()?;
        let staged = Some(layers.dir.join(&name));
        names.push(name);
        layers.names = names;
        let put_back = PutBack { layers: layers.clone(), staged, _current: current };
        Ok(Some((WritableDisk { top, below, layers }, put_back)))
    }

    fn new_name(&self) -> Result<(String, PathBuf), RootfsError> {
        let id = SnapshotId::random().map_err(host("choose a name in", &self.dir))?;
        let name = format!("{PREFIX}{id}{SUFFIX}");
        let path = self.dir.join(&name);
        Ok((name, path))
    }

    fn top_path(&self) -> PathBuf {
        self.dir.join(self.names.last().map_or(DISK, String::as_str))
    }

    /// Locks the disk for who only wants nobody else to use it.
    pub(in crate::rootfs) fn lock(&self) -> Result<File, RootfsError> {
        locked(&self.top_path())
    }

    /// Opens the files and locks the disk for its VMM.
    pub(in crate::rootfs) fn open(self) -> Result<WritableDisk, RootfsError> {
        let path = self.top_path();
        let top = locked(&path)?;
        if top.metadata().map_err(host("look at", &path))?.nlink() > 1 {
            return Err(damaged(
                &path,
                "it belongs to a snapshot, but layers.json, which says so, is missing",
            ));
        }
        let below = self.names[..self.names.len() - 1].iter().map(|name| self.read(name));
        let below = below.collect::<Result<_, _>>()?;
        self.remove_unlisted();
        Ok(WritableDisk { top, below, layers: self })
    }

    fn remove_unlisted(&self) {
        for entry in std::fs::read_dir(&self.dir).into_iter().flatten().flatten() {
            if let Some(name) = entry.file_name().to_str()
                && is_layer(name)
                && !self.names.iter().any(|listed| listed == name)
            {
                let _ = std::fs::remove_file(entry.path());
            }
        }
    }

    /// All its files for reading, from the bottom up.
    pub(crate) fn files(&self) -> Result<Vec<File>, RootfsError> {
        self.names.iter().map(|name| self.read(name)).collect()
    }

    fn read(&self, name: &str) -> Result<File, RootfsError> {
        let path = self.dir.join(name);
        File::open(&path).map_err(host("open", &path))
    }

    /// A new file, empty and locked, for the VMM to go on in.
    pub(crate) fn stage(&self) -> Result<StagedLayer, RootfsError> {
        if self.names.len() >= MAX {
            let detail = format!(
                "it has {MAX} layers already; commit the container, or start it anew from a snapshot"
            );
            return Err(RootfsError::Format { path: self.top_path(), detail });
        }
        self.new_layer()
    }

    fn new_layer(&self) -> Result<StagedLayer, RootfsError> {
        let (name, path) = self.new_name()?;
        let mut options = OpenOptions::new();
        let file = options.read(true).write(true).create_new(true).mode(0o600).open(&path);
        let file = file.map_err(host("make", &path))?;
        file.try_lock().map_err(|error| host("lock", &path)(error.into()))?;
        Ok(StagedLayer { file, name })
    }

    /// Puts a new layer on top, durably: before the VMM gets it.
    pub(crate) fn add(&mut self, staged: &StagedLayer) -> Result<(), RootfsError> {
        let mut names = self.names.clone();
        names.push(staged.name.clone());
        self.write(names)
    }

    /// Takes the top layer away again, to which the VMM has *not* switched. Where the list cannot be written the layer stays
    /// in it, with nothing in it, which does no harm.
    pub(crate) fn take_back(&mut self, staged: StagedLayer) -> Result<(), RootfsError> {
        let path = self.dir.join(&staged.name);
        let in_step = std::mem::replace(&mut self.in_step, false);
        staged.file.set_len(0).map_err(host("empty", &path))?;
        // Whether or not the list that has it was written to its end.
        let names = self.names.iter().filter(|name| **name != staged.name).cloned().collect();
        self.write(names)?;
        self.in_step = in_step;
        std::fs::remove_file(&path).map_err(host("remove", &path))
    }

    fn write(&mut self, names: Vec<String>) -> Result<(), RootfsError> {
        let list = List { version: VERSION, layers: names };
        let path = self.dir.join(LIST);
        let text = serde_json::to_vec(&list).map_err(|error| host("write", &path)(error.into()))?;
        publish(&self.dir, LIST, |mut file| file.write_all(&text)).map_err(host("write", &path))?;
        self.names = list.layers;
        Ok(())
    }
}

/// A disk that is going to be the directory's in place of the one that is there. Dropped, it is not, and its new layer is removed.
#[derive(Debug)]
pub(crate) struct PutBack {
    layers: Layers,
    /// The new layer, until it may be in the list.
    staged: Option<PathBuf>,
    /// Locks the disk that is there.
    _current: File,
}

impl PutBack {
    /// From here on the directory's disk is this one. What was written since the snapshot is removed.
    pub(crate) fn commit(mut self) -> Result<(), RootfsError> {
        // If writing the list fails nobody knows which one counts; an unlisted layer goes when the disk is opened.
        self.staged = None;
        let names = self.layers.names.clone();
        self.layers.write(names)?;
        self.layers.remove_unlisted();
        Ok(())
    }
}

impl Drop for PutBack {
    fn drop(&mut self) {
        if let Some(path) = self.staged.take() {
            let _ = std::fs::remove_file(path);
        }
    }
}

/// Whether two files, which nobody writes, are one layer: the same file, or a copy.
fn is_same(own: &File, other: &File) -> io::Result<bool> {
    let (a, b) = (own.metadata()?, other.metadata()?);
    if (a.dev(), a.ino()) == (b.dev(), b.ino()) {
        return Ok(true);
    }
    Ok(a.len() == b.len() && digest(own)? == digest(other)?)
}

/// A layer that is not in the list yet.
#[derive(Debug)]
pub(crate) struct StagedLayer {
    pub(crate) file: File,
    name: String,
}

/// Removes the disk with all its layers, and what is left of one. The raw file goes first, without which there is none; what
/// says that all of it has to go, last.
pub(in crate::rootfs) fn remove(dir: &Path) -> Result<(), RootfsError> {
    let there = std::fs::read_dir(dir).into_iter().flatten().flatten();
    let deltas: Vec<String> = there
        .filter_map(|entry| entry.file_name().into_string().ok())
        .filter(|name| is_layer(name))
        .collect();
    let mark = [restoring::MARK.to_owned()];
    for name in [DISK.to_owned(), LIST.to_owned()].into_iter().chain(deltas).chain(mark) {
        let path = dir.join(name);
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(host("remove", &path)(error));
            }
            _ => {}
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
