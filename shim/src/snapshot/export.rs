//! A snapshot for elsewhere: `manifest.json`, `pack-<layer>` for each layer ([`super::pack`]), `state.bin`, and `volumes.json` if
//! there are any. It has all that it needs itself. The manifest comes first, also where somebody sorts the names, so that
//! whoever has the snapshot need not read on.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use tar::{EntryType, Header};

use super::error::{StoreError, host};
use super::manifest::{FILE, STATE, VOLUMES};
use super::pack::Packed;
use super::store::sync_directory;
use super::{ManifestError, Opened};

/// Before a layer's name.
pub(super) const PREFIX: &str = "pack-";
pub(super) const BLOCK: usize = 512;

/// One file of an export.
enum Content<'a> {
    Bytes(&'a [u8]),
    Layer(Packed<'a>),
}

impl Content<'_> {
    fn size(&self) -> u64 {
        match self {
            Self::Bytes(bytes) => bytes.len() as u64,
            Self::Layer(packed) => packed.size(),
        }
    }

    fn write(&self, out: &mut dyn Write) -> io::Result<()> {
        match self {
            Self::Bytes(bytes) => out.write_all(bytes),
            Self::Layer(packed) => packed.write(out),
        }
    }
}

/// Calls `take` with every file, in order.
fn files(
    snapshot: &Opened,
    mut take: impl FnMut(&str, &Content<'_>) -> Result<(), StoreError>,
) -> Result<(), StoreError> {
    let refused = |source: ManifestError| StoreError::Manifest { id: snapshot.manifest.id, source };
    let manifest = snapshot.manifest.encode().map_err(refused)?;
    take(FILE, &Content::Bytes(&manifest))?;
    for (layer, file) in snapshot.layers() {
        let name = layer.file_name();
        let packed = Packed::new(file).map_err(host("read", Path::new(&name)))?;
        take(&format!("{PREFIX}{name}"), &Content::Layer(packed))?;
    }
    take(STATE, &Content::Bytes(&snapshot.state))?;
    match &snapshot.volumes {
        Some(tables) => take(VOLUMES, &Content::Bytes(tables)),
        None => Ok(()),
    }
}

/// Writes the snapshot as a tar stream.
pub fn export_tar(snapshot: &Opened, out: &mut dyn Write) -> Result<(), StoreError> {
    files(snapshot, |name, content| {
        let size = content.size();
        let mut header = Header::new_gnu();
        let failed = |error| host("export", Path::new(name))(error);
        header.set_path(name).map_err(failed)?;
        header.set_entry_type(EntryType::Regular);
        header.set_size(size);
        header.set_mode(0o600);
        header.set_mtime(snapshot.manifest.created);
        header.set_cksum();
        let padding = [0; BLOCK];
        let rest = usize::try_from(size.next_multiple_of(BLOCK as u64) - size).unwrap_or(0);
        out.write_all(header.as_bytes())
            .and_then(|()| content.write(out))
            .and_then(|()| out.write_all(&padding[..rest]))
            .map_err(failed)
    })?;
    let end = out.write_all(&[0; 2 * BLOCK]).and_then(|()| out.flush());
    end.map_err(host("export", Path::new("the archive's end")))
}

/// Writes the same files, durably, into a directory where none of these names is taken. What was made is removed when
/// that fails.
pub fn export_directory(snapshot: &Opened, dir: &Path) -> Result<(), StoreError> {
    let mut made = Made::default();
    files(snapshot, |name, content| {
        let path = dir.join(name);
        let mut file = made.create(&path)?;
        let mut out = io::BufWriter::new(&mut file);
        content.write(&mut out).and_then(|()| out.flush()).map_err(host("write", &path))?;
        drop(out);
        file.sync_all().map_err(host("write back", &path))
    })?;
    sync_directory(dir)?;
    made.keep();
    Ok(())
}

/// Files outside the store that are removed unless all of it succeeds.
#[derive(Default)]
pub(super) struct Made(Vec<PathBuf>);

impl Made {
    pub(super) fn create(&mut self, path: &Path) -> Result<File, StoreError> {
        let mut options = OpenOptions::new();
        let file = options.read(true).write(true).create_new(true).mode(0o600).open(path);
        let file = file.map_err(host("make", path))?;
        self.add(path);
        Ok(file)
    }

    pub(super) fn add(&mut self, path: &Path) {
        self.0.push(path.to_owned());
    }

    pub(super) fn keep(mut self) {
        self.0.clear();
    }
}

impl Drop for Made {
    fn drop(&mut self) {
        for path in &self.0 {
            let _ = std::fs::remove_file(path);
        }
    }
}
