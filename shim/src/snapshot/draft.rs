//! A snapshot that is being made.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, linkat};
use sha2::{Digest, Sha256};

use super::error::{StoreError, host};
use super::manifest::{self, FILE, Layer, LayerKind, Manifest, STATE, SnapshotId, VOLUMES, hex};
use super::store::sync_directory;
use super::{Opened, Store, sparse};
use crate::rootfs::sparse::copy;
use crate::rootfs::temporary::Temporary;

/// Nobody sees it before [`Draft::publish`], and it is gone when dropped before that.
pub struct Draft {
    store: Store,
    id: SnapshotId,
    dir: Temporary,
    state: manifest::File,
    layers: Vec<Layer>,
}

impl std::fmt::Debug for Draft {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Draft").field("id", &self.id).field("layers", &self.layers).finish_non_exhaustive()
    }
}

impl Draft {
    pub(super) fn new(store: Store) -> Result<Self, StoreError> {
        let id = SnapshotId::random().map_err(host("choose an id in", store.root()))?;
        let dir = Temporary::new(store.root(), &id.to_string());
        std::fs::DirBuilder::new().mode(0o700).create(dir.path()).map_err(host("make", dir.path()))?;
        store.step("begun");
        let state = manifest::File { length: 0, sha256: String::new() };
        Ok(Self { store, id, dir, state, layers: Vec::new() })
    }

    pub fn id(&self) -> SnapshotId {
        self.id
    }

    /// The layers so far; lengths and digests of new ones are not known yet.
    pub fn layers(&self) -> &[Layer] {
        &self.layers
    }

    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub(super) fn create(&self, name: &str) -> Result<File, StoreError> {
        let path = self.path(name);
        let mut options = OpenOptions::new();
        options.read(true).write(true).create_new(true).mode(0o600).custom_flags(libc::O_NOFOLLOW);
        options.open(&path).map_err(host("make", &path))
    }

    /// Writes a file of our own; its length and digest.
    pub(super) fn write(&self, name: &str, bytes: &[u8]) -> Result<manifest::File, StoreError> {
        let mut file = self.create(name)?;
        let written = file.write_all(bytes).and_then(|()| file.sync_all());
        written.map_err(host("write", &self.path(name)))?;
        Ok(manifest::File { length: bytes.len() as u64, sha256: hex(&Sha256::digest(bytes)) })
    }

    /// Writes `state.bin`. Once.
    pub fn state(&mut self, bytes: &[u8]) -> Result<(), StoreError> {
        self.state = self.write(STATE, bytes)?;
        self.store.step("state written");
        Ok(())
    }

    /// Writes the tables of volumes, for [`manifest::Volumes::tables`]. Once.
    pub fn tables(&self, bytes: &[u8]) -> Result<manifest::File, StoreError> {
        let file = self.write(VOLUMES, bytes)?;
        self.store.step("tables written");
        Ok(file)
    }

    fn add(&mut self, id: SnapshotId, kind: LayerKind) -> (u32, String) {
        let file = manifest::File { length: 0, sha256: String::new() };
        let layer = Layer { id, kind, file };
        let name = layer.file_name();
        self.layers.push(layer);
        (u32::try_from(self.layers.len() - 1).unwrap_or(u32::MAX), name)
    }

    fn new_id(&self) -> Result<SnapshotId, StoreError> {
        SnapshotId::random().map_err(host("choose an id in", self.store.root()))
    }

    /// A new layer for somebody to write: its position, and an empty file. What is in it when this is
    /// published counts, so whoever writes has to be done by then.
    pub fn new_layer(&mut self, kind: LayerKind) -> Result<(u32, File), StoreError> {
        let id = self.new_id()?;
        let (at, name) = self.add(id, kind);
        let file = self.create(&name)?;
        self.store.step("layer made");
        Ok((at, file))
    }

    /// Gives the layer that was added last up: nothing came into it.
    pub fn drop_layer(&mut self) -> Result<(), StoreError> {
        let Some(layer) = self.layers.pop() else { return Ok(()) };
        let path = self.path(&layer.file_name());
        std::fs::remove_file(&path).map_err(host("remove", &path))
    }

    /// Takes a file as it is, which nobody is going to change: by a further name for it, or where that cannot be (another
    /// file system, too many names) by a copy. Its digest, when it is known, is not computed again. Its position.
    pub fn add_layer(
        &mut self,
        kind: LayerKind,
        file: &File,
        digest: Option<String>,
    ) -> Result<u32, StoreError> {
        let id = self.new_id()?;
        let at = self.link_layer(id, kind, file)?;
        if let (Some(sha256), Some(last)) = (digest, self.layers.last_mut()) {
            let path = self.dir.path().join(last.file_name());
            let length = std::fs::metadata(&path).map_err(host("look at", &path))?.len();
            last.file = manifest::File { length, sha256 };
        }
        Ok(at)
    }

    /// The same for a layer that its id names already.
    pub fn link_layer(&mut self, id: SnapshotId, kind: LayerKind, file: &File) -> Result<u32, StoreError> {
        let (at, name) = self.add(id, kind);
        self.link(file, &name)?;
        Ok(at)
    }

    /// Shares a layer of another snapshot. Its position.
    pub fn share_layer(&mut self, from: &Opened, layer: u32) -> Result<u32, StoreError> {
        let found = usize::try_from(layer).ok().and_then(|layer| from.layers().nth(layer));
        let (layer, file) = found.ok_or(StoreError::Manifest {
            id: from.manifest.id,
            source: manifest::ManifestError::NoLayer { what: "a new snapshot", at: self.layers.len(), layer },
        })?;
        let (at, name) = self.add(layer.id, layer.kind);
        self.link(file, &name)?;
        if let Some(last) = self.layers.last_mut() {
            last.file.clone_from(&layer.file);
        }
        Ok(at)
    }

    fn link(&self, file: &File, name: &str) -> Result<(), StoreError> {
        let path = self.path(name);
        share(file, &path).map_err(host("link", &path))?;
        self.store.step("layer linked");
        Ok(())
    }

    /// Completes the snapshot. Id, state and layers of `about` are put in here. When this
    /// returns, it is in the store and durable.
    pub fn publish(mut self, mut about: Manifest) -> Result<Manifest, StoreError> {
        for layer in &mut self.layers {
            let path = self.dir.path().join(layer.file_name());
            let file = File::open(&path).map_err(host("open", &path))?;
            // Also what is only linked: whose writer crashed a moment ago may have written it back or not.
            file.sync_all().map_err(host("write back", &path))?;
            if layer.file.sha256.is_empty() {
                let length = file.metadata().map_err(host("look at", &path))?.len();
                let sha256 = sparse::digest(&file).map_err(host("read", &path))?;
                layer.file = manifest::File { length, sha256 };
            }
        }
        self.store.step("layers durable");
        about.id = self.id;
        about.state = self.state.clone();
        about.layers = std::mem::take(&mut self.layers);
        let id = self.id;
        let bytes = about.encode().map_err(|source| StoreError::Manifest { id, source })?;
        self.finish(id, &bytes)?;
        Ok(about)
    }

    /// Gives the directory its manifest and its name.
    pub(super) fn finish(self, id: SnapshotId, manifest: &[u8]) -> Result<(), StoreError> {
        self.write(FILE, manifest)?;
        self.store.step("manifest written");
        sync_directory(self.dir.path())?;
        self.store.step("directory durable");
        let target = self.store.path(id);
        let (store, dir) = (self.store, self.dir);
        // A directory that is not empty is not replaced.
        dir.publish(&target).map_err(|error| match error.kind() {
            io::ErrorKind::DirectoryNotEmpty | io::ErrorKind::AlreadyExists => StoreError::Exists { id },
            _ => host("rename", &target)(error),
        })?;
        store.step("published");
        Ok(())
    }
}

/// Gives a file that nobody is going to change a further name, or where that cannot be makes a durable copy of it.
pub(crate) fn share(file: &File, path: &Path) -> io::Result<()> {
    link_or_copy(file, path, name_file)
}

/// Gives the open file, whatever its name was, a further one.
fn name_file(file: &File, path: &Path) -> io::Result<()> {
    let open = format!("/proc/self/fd/{}", file.as_raw_fd());
    Ok(linkat(CWD, open, CWD, path, AtFlags::SYMLINK_FOLLOW)?)
}

pub(super) fn link_or_copy(
    file: &File,
    path: &Path,
    link: impl FnOnce(&File, &Path) -> io::Result<()>,
) -> io::Result<()> {
    match link(file, path) {
        Ok(()) => return Ok(()),
        // Another file system; as many names as there can be; no links there; no name left.
        Err(error)
            if matches!(
                error.raw_os_error(),
                Some(libc::EXDEV | libc::EMLINK | libc::EPERM | libc::EOPNOTSUPP | libc::ENOENT)
            ) => {}
        Err(error) => return Err(error),
    }
    let to = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(path)?;
    copy(file, &to)?;
    to.sync_all()
}
