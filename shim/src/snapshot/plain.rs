//! A snapshot in a directory of a client's that stays there: the files of the store's directory under their names there, layers sparse,
//! `manifest.json` last. It has all that it needs itself, and writing it costs what has changed since the last one beside it.
//!
//! Nothing in it is a file of the store's, or of a running container's, by another name: who is given the directory may give it to somebody
//! else (`chown -R`), write to it and lock it, and VMs run on the store's files, images of all containers among them. So a layer is
//!
//! 1. a reflink of the store's, where the file system can: the same storage until one of the two is written to;
//! 2. else a hard link of the file that an earlier snapshot of the same container has, or by the layer's id any that its machine comes from as well, in a
//!    directory beside this one. It is read first, and has to be what the manifest says, and still its maker's alone. Both directories are the client's; one can
//!    be removed without the other;
//! 3. else a copy, holes and all.

use std::fs::{File, Metadata};
use std::io::{self, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;

use super::error::{StoreError, host};
use super::export::Made;
use super::manifest::{FILE, Layer, MAX_BYTES, Manifest, STATE, VOLUMES};
use super::store::{file_in, sync_directory};
use super::{Opened, share, sparse};
use crate::rootfs::sparse::reflink;

/// Most directories beside the new one that are looked at.
const MAX_BESIDE: usize = 1024;
/// Most earlier snapshots among them that are held open.
const MAX_EARLIER: usize = 32;

/// How many layers came into a directory how.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Placed {
    pub reflinked: usize,
    pub linked: usize,
    pub copied: usize,
}

/// Writes the snapshot, durably, into a directory where none of its names is taken. What was made is removed when that fails.
pub fn export_plain(snapshot: &Opened, dir: &Path) -> Result<Placed, StoreError> {
    let (mut made, mut placed) = (Made::default(), Placed::default());
    let mut beside = None;
    for (layer, file) in snapshot.layers() {
        let path = dir.join(layer.file_name());
        let to = made.create(&path)?;
        if reflink(file, &to) {
            placed.reflinked += 1;
        } else if let Some(same) =
            same(beside.get_or_insert_with(|| earlier(&snapshot.manifest, dir)), layer, &to)
        {
            std::fs::remove_file(&path)
                .and_then(|()| share(&same, &path))
                // Its maker may have crashed a moment ago.
                .and_then(|()| same.sync_all())
                .map_err(host("link", &path))?;
            placed.linked += 1;
            continue;
        } else {
            sparse::write_data(file, &to).map_err(host("write", &path))?;
            placed.copied += 1;
        }
        to.sync_all().map_err(host("write back", &path))?;
    }
    let refused = |source| StoreError::Manifest { id: snapshot.manifest.id, source };
    let manifest = snapshot.manifest.encode().map_err(refused)?;
    let tables = snapshot.volumes.as_deref().map(|tables| (VOLUMES, tables));
    let last = (FILE, &manifest[..]);
    for (name, bytes) in [(STATE, &snapshot.state[..])].into_iter().chain(tables).chain([last]) {
        let path = dir.join(name);
        let mut file = made.create(&path)?;
        file.write_all(bytes).map_err(host("write", &path))?;
        file.sync_all().map_err(host("write back", &path))?;
        sync_directory(dir)?;
    }
    made.keep();
    Ok(placed)
}

/// An earlier snapshot's directory.
struct Earlier {
    created: u64,
    /// Of the same container, whose layers may be the same under other ids.
    own: bool,
    layers: Vec<Layer>,
    dir: File,
}

/// Those in directories beside this one, the container's own before others, the newest first. What cannot be read is none.
fn earlier(manifest: &Manifest, dir: &Path) -> Vec<Earlier> {
    let Ok(dir) = dir.canonicalize() else { return Vec::new() };
    // The new one is not among them: it has no manifest yet.
    let entries = dir.parent().and_then(|parent| std::fs::read_dir(parent).ok());
    let read = |path: &Path| {
        let flags = libc::O_DIRECTORY | libc::O_NOFOLLOW;
        let dir = std::fs::OpenOptions::new().read(true).custom_flags(flags).open(path).ok()?;
        let mut bytes = Vec::new();
        file_in(&dir, FILE).ok()?.take(MAX_BYTES + 1).read_to_end(&mut bytes).ok()?;
        let Manifest { namespace, container, created, layers, .. } = Manifest::decode(&bytes).ok()?;
        let own = namespace == manifest.namespace && container == manifest.container;
        Some(Earlier { created, own, layers, dir })
    };
    let mut found: Vec<Earlier> = Vec::new();
    for entry in entries.into_iter().flatten().flatten().take(MAX_BESIDE) {
        let Some(earlier) = read(&entry.path()) else { continue };
        let rank = |earlier: &Earlier| (earlier.own, earlier.created);
        let at = found.partition_point(|other| rank(other) >= rank(&earlier));
        found.insert(at, earlier);
        found.truncate(MAX_EARLIER);
    }
    found
}

/// The file that an earlier snapshot has of this very layer, where `new` is to be.
fn same(beside: &[Earlier], layer: &Layer, new: &File) -> Option<File> {
    let layers = beside.iter().flat_map(|earlier| earlier.layers.iter().map(move |layer| (layer, earlier)));
    let mut files = layers
        .filter(|(other, earlier)| {
            (earlier.own || other.id == layer.id) && other.kind == layer.kind && other.file == layer.file
        })
        .filter_map(|(other, earlier)| file_in(&earlier.dir, &other.file_name()).ok());
    files.find(|file| is_fit(file, layer, new).unwrap_or(false))
}

/// Whether it is the layer, can have a name where `new` has one, and is a file to which nobody but us can have got access.
fn is_fit(file: &File, layer: &Layer, new: &File) -> io::Result<bool> {
    let (it, new) = (file.metadata()?, new.metadata()?);
    let ours =
        |metadata: &Metadata| (metadata.dev(), metadata.uid(), metadata.gid(), metadata.mode() & 0o7777);
    Ok(ours(&it) == ours(&new) && it.len() == layer.file.length && sparse::digest(file)? == layer.file.sha256)
}
