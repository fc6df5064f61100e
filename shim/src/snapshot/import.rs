//! Snapshots from elsewhere, as hostile as anything from elsewhere: what [`super::export`] wrote, or what somebody
//! made to look like it. Files come in any order; the snapshot is in the store when all are there and
//! every one has the digest that the manifest names, and before that nothing is.
//!
//! Tar streams may be of any tar: containerd's packs a directory, which it does with PAX records and an entry for the
//! directory itself. Of the records the size and the path count; no other kind of entry is taken, no
//! path but a plain name, no name twice.

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use tar::{EntryType, Header, PaxExtensions};

use super::error::{FileError, StoreError, host};
use super::export::{BLOCK, PREFIX};
use super::manifest::{FILE, Layer, MAX_BYTES, MAX_STATE, Manifest, Purpose, STATE, SnapshotId, VOLUMES};
use super::opened::{self, same};
use super::pack::{PackError, unpack};
use super::store::file_in;
use super::{Draft, Policy, Store, sparse};
use crate::protocol::MAX_TABLES;

/// Most bytes of an entry's PAX records.
const MAX_RECORDS: u64 = 64 * 1024;
/// Most entries, of any kind.
const MAX_ENTRIES: usize = 8 * 1024;

#[derive(Debug, thiserror::Error)]
pub enum ImportError {
    #[error("import a snapshot: read: {0}")]
    Read(#[source] io::Error),
    #[error("import a snapshot: the archive ends early")]
    Unfinished,
    #[error("import a snapshot: the archive is malformed: {0}")]
    Malformed(&'static str),
    #[error("import a snapshot: entry {name:?}: {detail}")]
    Entry { name: String, detail: String },
    #[error("import a snapshot: {name}: {source}")]
    Pack { name: String, source: PackError },
    #[error("import a snapshot: {0} is missing: this is no export of a snapshot, or not all of it")]
    Missing(String),
    #[error("import a snapshot: {0}")]
    Store(#[from] StoreError),
}

fn read(error: io::Error) -> ImportError {
    if error.kind() == io::ErrorKind::UnexpectedEof {
        ImportError::Unfinished
    } else {
        ImportError::Read(error)
    }
}

fn refused(name: &str, detail: impl Into<String>) -> ImportError {
    ImportError::Entry { name: name.chars().take(128).collect(), detail: detail.into() }
}

/// What has come so far.
struct Receiver<'a> {
    store: &'a Store,
    policy: Policy,
    draft: Draft,
    manifest: Option<(Manifest, Vec<u8>)>,
    /// Files by their names in the store; the digest of what is a layer is taken at the end.
    files: HashSet<String>,
    names: HashSet<String>,
}

impl<'a> Receiver<'a> {
    fn new(store: &'a Store, policy: &Policy) -> Result<Self, ImportError> {
        let (files, names) = (HashSet::new(), HashSet::new());
        Ok(Self { store, policy: *policy, draft: store.begin()?, manifest: None, files, names })
    }

    /// Takes one file. `Some` when the store has this snapshot already.
    fn take(
        &mut self,
        name: &str,
        size: u64,
        input: &mut dyn Read,
    ) -> Result<Option<SnapshotId>, ImportError> {
        if !self.names.insert(name.to_owned()) {
            return Err(refused(name, "it is there twice"));
        }
        if self.names.len() > MAX_ENTRIES {
            return Err(ImportError::Malformed("more than 8192 entries"));
        }
        self.store.admit(&self.policy, size)?;
        match name {
            FILE => return self.take_manifest(size, input),
            STATE | VOLUMES => {
                let most = if name == STATE { MAX_STATE } else { MAX_TABLES };
                if size > most {
                    return Err(refused(name, format!("{size} bytes; at most {most} are allowed")));
                }
                self.draft.write(name, &bytes(input, size)?)?;
            }
            _ => {
                let Some(layer) = name.strip_prefix(PREFIX).filter(|layer| is_layer(layer)) else {
                    return Err(refused(name, "no file of a snapshot has this name"));
                };
                let file = self.draft.create(layer)?;
                let unpacked = unpack(exactly(input, size), size, &file);
                let unpacked = unpacked.and_then(|()| file.sync_all().map_err(PackError::Write));
                unpacked.map_err(|source| match source {
                    PackError::Read(error) => read(error),
                    PackError::Write(error) => host("write", &self.draft.path(layer))(error).into(),
                    source => ImportError::Pack { name: name.to_owned(), source },
                })?;
                self.files.insert(layer.to_owned());
            }
        }
        Ok(None)
    }

    /// Takes a layer that is not packed. It may be somebody else's to write, now and later: what counts is the copy.
    fn take_plain(&mut self, layer: &Layer, file: &File) -> Result<(), ImportError> {
        let name = layer.file_name();
        let id = self.manifest.as_ref().map_or(self.draft.id(), |(manifest, _)| manifest.id);
        let metadata = file.metadata().map_err(read)?;
        opened::length(file, layer.file.length).map_err(|source| StoreError::File {
            id,
            file: name.clone(),
            source,
        })?;
        // Holes take no room.
        self.store.admit(&self.policy, metadata.blocks().saturating_mul(512).min(metadata.len()))?;
        let (to, path) = (self.draft.create(&name)?, self.draft.path(&name));
        sparse::copy(file, &to).and_then(|()| to.sync_all()).map_err(host("copy", &path))?;
        self.files.insert(name);
        Ok(())
    }

    fn take_manifest(&mut self, size: u64, input: &mut dyn Read) -> Result<Option<SnapshotId>, ImportError> {
        if size > MAX_BYTES {
            return Err(refused(FILE, format!("{size} bytes; at most {MAX_BYTES} are allowed")));
        }
        let bytes = bytes(input, size)?;
        let bad = |source| StoreError::Manifest { id: self.draft.id(), source };
        let manifest = Manifest::decode(&bytes).map_err(bad)?;
        // Containers of every namespace begin with a template, and what a task hibernates in is nobody else's.
        if !matches!(manifest.purpose, Purpose::Snapshot | Purpose::Checkpoint) {
            let what = manifest.purpose.name();
            return Err(refused(
                FILE,
                format!(
                    "it is a {what} of another host; export a snapshot, and make the {what} of that here"
                ),
            ));
        }
        let known = self.known(&manifest)?;
        self.manifest = Some((manifest, bytes));
        Ok(known)
    }

    /// Whether the store has it. Another one of the same id is an error; a damaged one is in nobody's way.
    fn known(&self, manifest: &Manifest) -> Result<Option<SnapshotId>, ImportError> {
        let id = manifest.id;
        match self.store.open_unchanged(id) {
            Ok(there) if there.manifest == *manifest => Ok(Some(id)),
            Ok(_) => Err(StoreError::Exists { id }.into()),
            Err(StoreError::NoSuch { .. }) => Ok(None),
            // As far as it can be told, it was the same.
            Err(error) if error.is_damage() => match self.store.entry(id) {
                Ok(entry) if entry.manifest != *manifest => Err(StoreError::Exists { id }.into()),
                _ => Ok(None),
            },
            Err(error) => Err(error.into()),
        }
    }

    fn finish(mut self) -> Result<SnapshotId, ImportError> {
        let missing = |name: &str| ImportError::Missing(name.to_owned());
        let (manifest, bytes) = self.manifest.take().ok_or_else(|| missing(FILE))?;
        let id = manifest.id;
        if !self.names.contains(STATE) {
            return Err(missing(STATE));
        }
        match (&manifest.volumes, self.names.contains(VOLUMES)) {
            (Some(_), false) => return Err(missing(VOLUMES)),
            (None, true) => return Err(refused(VOLUMES, "the manifest does not name it")),
            _ => {}
        }
        let mut expected: HashMap<String, &Layer> =
            manifest.layers.iter().map(|layer| (layer.file_name(), layer)).collect();
        let path = self.draft.path("");
        let dir = File::open(&path).map_err(host("open", &path))?;
        for name in &self.files {
            let layer =
                expected.remove(name).ok_or_else(|| refused(name, "the manifest does not name it"))?;
            check(&dir, name, layer).map_err(|source| StoreError::File { id, file: name.clone(), source })?;
        }
        if let Some(name) = expected.into_keys().next() {
            return Err(missing(&format!("{PREFIX}{name}")));
        }
        // State, tables and lengths, as at every opening.
        super::Opened::new(manifest.clone(), &dir)?;
        // Another import of the same may have been faster.
        if let Some(known) = self.known(&manifest)? {
            return Ok(known);
        }
        let store = self.store;
        // A damaged one makes room only now, for one that is whole.
        match store.remove(id) {
            Ok(()) | Err(StoreError::NoSuch { .. }) => {}
            Err(error) => return Err(error.into()),
        }
        match self.draft.finish(id, &bytes) {
            Ok(()) => Ok(id),
            // Faster after all.
            Err(StoreError::Exists { .. })
                if store.open_unchanged(id).is_ok_and(|there| there.manifest == manifest) =>
            {
                Ok(id)
            }
            Err(error) => Err(error.into()),
        }
    }
}

fn check(dir: &File, name: &str, layer: &Layer) -> Result<(), FileError> {
    same(sparse::digest(&file_in(dir, name)?)?, &layer.file.sha256)
}

fn is_layer(name: &str) -> bool {
    name.split_once('.')
        .is_some_and(|(id, kind)| id.parse::<SnapshotId>().is_ok() && matches!(kind, "memory" | "disk"))
}

/// At most so many bytes of an input; one that ends before is an error where it is used.
fn exactly(input: &mut dyn Read, size: u64) -> io::Take<&mut dyn Read> {
    Read::take(input, size)
}

/// `size` bytes, which passed a cap.
fn bytes(input: &mut dyn Read, size: u64) -> Result<Vec<u8>, ImportError> {
    let mut bytes = Vec::new();
    exactly(input, size).read_to_end(&mut bytes).map_err(read)?;
    if bytes.len() as u64 == size { Ok(bytes) } else { Err(ImportError::Unfinished) }
}

/// Takes a snapshot from a tar stream into the store, if it is not there yet: the stream is then not read to its
/// end. `policy` bounds what it may take.
pub fn import_tar(store: &Store, input: &mut dyn Read, policy: &Policy) -> Result<SnapshotId, ImportError> {
    let mut receiver = Receiver::new(store, policy)?;
    let mut records: Option<Vec<u8>> = None;
    for _ in 0..MAX_ENTRIES {
        let mut header = Header::new_old();
        input.read_exact(header.as_mut_bytes()).map_err(read)?;
        if header.as_bytes().iter().all(|&byte| byte == 0) {
            return receiver.finish();
        }
        let malformed = |what| move |_| ImportError::Malformed(what);
        let sum = header.as_bytes().iter().enumerate();
        let sum =
            sum.map(|(at, byte)| if (148..156).contains(&at) { 32 } else { u32::from(*byte) }).sum::<u32>();
        if header.cksum().map_err(malformed("a header without a checksum"))? != sum {
            return Err(ImportError::Malformed("a header whose checksum is wrong"));
        }
        let mut size = header.entry_size().map_err(malformed("an entry without a size"))?;
        let mut path = header.path_bytes().into_owned();
        if matches!(header.entry_type(), EntryType::XHeader | EntryType::XGlobalHeader) {
            if size > MAX_RECORDS {
                return Err(ImportError::Malformed("PAX records of more than 64 KiB"));
            }
            let found = bytes(input, size)?;
            pad(input, size)?;
            if header.entry_type() == EntryType::XHeader {
                records = Some(found);
            }
            continue;
        }
        if let Some(found) = records.take() {
            apply(&found, &mut size, &mut path)?;
        }
        let name = String::from_utf8_lossy(&path).into_owned();
        let name = name.trim_start_matches("./");
        match header.entry_type() {
            EntryType::Directory if matches!(name, "" | ".") && size == 0 => continue,
            EntryType::Regular | EntryType::Continuous => {}
            other => return Err(refused(name, format!("it is of type {other:?}; only files are taken"))),
        }
        if let Some(known) = receiver.take(name, size, input)? {
            return Ok(known);
        }
        pad(input, size)?;
    }
    Err(ImportError::Malformed("more than 8192 entries"))
}

/// What PAX records say of the entry behind them.
fn apply(records: &[u8], size: &mut u64, path: &mut Vec<u8>) -> Result<(), ImportError> {
    for record in PaxExtensions::new(records) {
        let record = record.map_err(|_| ImportError::Malformed("PAX records that are none"))?;
        match record.key_bytes() {
            b"size" => {
                let text = record.value().ok();
                let number = text.and_then(|text| text.parse().ok());
                *size = number.ok_or(ImportError::Malformed("a size that is no number"))?;
            }
            b"path" => *path = record.value_bytes().to_vec(),
            key if key.starts_with(b"GNU.sparse") => {
                return Err(ImportError::Malformed("a sparse entry; the files of an export have no holes"));
            }
            _ => {}
        }
    }
    Ok(())
}

fn pad(input: &mut dyn Read, size: u64) -> Result<(), ImportError> {
    let rest =
        size.checked_next_multiple_of(BLOCK as u64).ok_or(ImportError::Malformed("an entry's size"))? - size;
    bytes(input, rest).map(drop)
}

/// The same from the files of a directory, whose layers are packed or as [`super::plain`] leaves them. Others may be there, and are left
/// alone. The store gets its own copy of each: what becomes of the directory later is nothing to it.
pub fn import_directory(store: &Store, dir: &Path, policy: &Policy) -> Result<SnapshotId, ImportError> {
    let mut receiver = Receiver::new(store, policy)?;
    let dir = File::open(dir).map_err(host("open", dir))?;
    let open = |name: &str| match file_in(&dir, name) {
        Ok(file) => Ok(Some(file)),
        Err(FileError::Missing) => Ok(None),
        Err(error) => Err(refused(name, error.to_string())),
    };
    let missing = |name: &str| ImportError::Missing(name.to_owned());
    let whole = |receiver: &mut Receiver<'_>, name: &str| {
        let mut file = open(name)?.ok_or_else(|| missing(name))?;
        let size = file.metadata().map_err(read)?.len();
        receiver.take(name, size, &mut file)
    };
    if let Some(known) = whole(&mut receiver, FILE)? {
        return Ok(known);
    }
    let Some((manifest, _)) = receiver.manifest.clone() else { return Err(missing(FILE)) };
    for layer in &manifest.layers {
        let (name, packed) = (layer.file_name(), format!("{PREFIX}{}", layer.file_name()));
        if let Some(file) = open(&name)? {
            receiver.take_plain(layer, &file)?;
        } else if let Some(mut file) = open(&packed)? {
            let size = file.metadata().map_err(read)?.len();
            receiver.take(&packed, size, &mut file)?;
        } else {
            return Err(missing(&name));
        }
    }
    whole(&mut receiver, STATE)?;
    if manifest.volumes.is_some() {
        whole(&mut receiver, VOLUMES)?;
    }
    receiver.finish()
}
