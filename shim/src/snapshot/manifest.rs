//! `manifest.json`: what a snapshot is.
//!
//! ```json
//! {"format": "spore-snapshot", "version": 2, "sha256": "…", "manifest": { … }}
//! ```
//!
//! The digest is that of the bytes of the value of `manifest`, as they stand in the file. A reader looks at
//! `format` and `version` first and refuses what is newer than itself. Within a version all fields are known: one that is
//! not is an error. [`Manifest`] describes the fields; numbers are bytes unless their name says otherwise.
//!
//! Versions: 2 has `volumes`, which 1 lacks.

mod check;

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use sha2::{Digest, Sha256};

/// Its name, wherever a snapshot is.
pub(crate) const FILE: &str = "manifest.json";
pub(super) const STATE: &str = "state.bin";
pub(super) const VOLUMES: &str = "volumes.json";
const FORMAT: &str = "spore-snapshot";
/// The newest that this build reads, and the one that it writes.
pub const VERSION: u32 = 2;
/// Most bytes of the file.
pub(super) const MAX_BYTES: u64 = 4 << 20;
/// Most bytes of `state.bin`.
pub const MAX_STATE: u64 = 256 << 20;
/// Most extents of guest memory: each costs a restore one mmap(2).
pub const MAX_EXTENTS: usize = 16 * 1024;

/// A snapshot's name: 16 random bytes, as 32 hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct SnapshotId([u8; 16]);

impl SnapshotId {
    /// A new one.
    pub fn random() -> std::io::Result<Self> {
        use std::io::Read;
        let mut bytes = [0; 16];
        std::fs::File::open("/dev/urandom")?.read_exact(&mut bytes)?;
        Ok(Self(bytes))
    }
}

impl fmt::Display for SnapshotId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for SnapshotId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for SnapshotId {
    type Err = ManifestError;

    fn from_str(text: &str) -> Result<Self, ManifestError> {
        let bad = || field("an id", clip(text), "32 hexadecimal digits in lower case are allowed");
        if text.len() != 32 || !text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f')) {
            return Err(bad());
        }
        let mut bytes = [0; 16];
        for (at, byte) in bytes.iter_mut().enumerate() {
            *byte = u8::from_str_radix(&text[2 * at..2 * at + 2], 16).map_err(|_| bad())?;
        }
        Ok(Self(bytes))
    }
}

impl TryFrom<String> for SnapshotId {
    type Error = ManifestError;

    fn try_from(text: String) -> Result<Self, ManifestError> {
        text.parse()
    }
}

impl From<SnapshotId> for String {
    fn from(id: SnapshotId) -> Self {
        id.to_string()
    }
}

/// What a snapshot is for; it decides what may be pruned.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Purpose {
    /// Asked for by a user.
    Snapshot,
    /// Written for, or brought by, a client of containerd, or of use for one command; not kept for long.
    Checkpoint,
    /// Named by a user, for containers of all namespaces to begin with.
    Template,
    /// The only form in which its task exists: never pruned.
    Hibernation,
}

impl Purpose {
    /// As in the file.
    pub fn name(self) -> &'static str {
        match self {
            Self::Snapshot => "snapshot",
            Self::Checkpoint => "checkpoint",
            Self::Template => "template",
            Self::Hibernation => "hibernation",
        }
    }
}

/// See the module.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    pub id: SnapshotId,
    /// The snapshot that the VM had been restored from or taken before. For people: nothing is read from it.
    pub parent: Option<SnapshotId>,
    pub purpose: Purpose,
    /// Seconds since 1970.
    pub created: u64,
    pub name: Option<String>,
    pub labels: BTreeMap<String, String>,
    /// containerd's namespace and the container's or sandbox's id there.
    pub namespace: String,
    pub container: String,
    /// Of what the VM was made of.
    pub builds: Builds,
    /// What the guest was told of its processor, by name.
    pub cpu: String,
    pub vcpus: u8,
    /// Kinds of the devices by slot, as the VMM calls them.
    pub devices: Vec<String>,
    /// `state.bin`.
    pub state: File,
    /// All other files.
    pub layers: Vec<Layer>,
    pub memory: Memory,
    pub disks: Vec<Disk>,
    /// What of the host's files the guest has mounted, if it has.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub volumes: Option<Volumes>,
}

/// Ids of builds, as each names itself; compared, never interpreted.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Builds {
    pub vmm: String,
    pub kernel: String,
    pub initramfs: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct File {
    pub length: u64,
    /// Hexadecimal. Of a layer it is the digest of a sparse file (`snapshot/sparse.rs`).
    pub sha256: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LayerKind {
    Memory,
    Disk,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Layer {
    /// Names the layer wherever it is, to the VMM as well: the file is `<id>.memory` or `<id>.disk`.
    pub id: SnapshotId,
    pub kind: LayerKind,
    pub file: File,
}

impl Layer {
    pub fn file_name(&self) -> String {
        let kind = match self.kind {
            LayerKind::Memory => "memory",
            LayerKind::Disk => "disk",
        };
        format!("{}.{kind}", self.id)
    }
}

/// Where guest memory is, for those who look without the VMM: that goes by `state.bin`. Without regions nothing is
/// said; with them, what no extent names is zeroes.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Memory {
    /// RAM as the guest has it: first address and length, ascending.
    pub regions: Vec<(u64, u64)>,
    /// Ascending, apart from each other, each within a region.
    pub extents: Vec<Extent>,
}

/// Where a range of guest memory is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Extent {
    /// First guest-physical address, a multiple of 4096, as the length is and the offset.
    pub address: u64,
    pub length: u64,
    /// Position in [`Manifest::layers`].
    pub layer: u32,
    /// In the layer's file.
    pub offset: u64,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Disk {
    /// The slot's.
    pub serial: String,
    /// Positions in [`Manifest::layers`], from the bottom up.
    pub layers: Vec<u32>,
}

/// Directories and files of the host's that the guest has mounted. Their content is not in the snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Volumes {
    /// `volumes.json`: the file server's tables, which are its to check.
    pub tables: File,
    /// By the numbers that the tables name them by, from 0.
    pub exports: Vec<Export>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Export {
    /// Where it is mounted in the container; several may have been mounted on one another.
    pub destination: String,
    pub kind: ExportKind,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ExportKind {
    Directory,
    File,
}

impl fmt::Display for ExportKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Directory => "directory",
            Self::File => "file",
        })
    }
}

/// A manifest that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ManifestError {
    #[error("manifest: it has more than {max} bytes")]
    TooLong { max: u64 },
    #[error("manifest: this is no snapshot of Spore's: {0}")]
    Foreign(String),
    #[error(
        "manifest: it is of version {found}, this build reads up to {VERSION}: use the release that made it, or a newer one"
    )]
    Newer { found: u64 },
    #[error("manifest: it is damaged: its digest is {found}, its content's {computed}")]
    Digest { found: String, computed: String },
    #[error("manifest: it is malformed: {0}")]
    Malformed(#[source] serde_json::Error),
    #[error("manifest: {field} is {found}; {allowed}")]
    Field { field: &'static str, found: String, allowed: &'static str },
    #[error("manifest: {what} {at} overlaps the one before it, or comes before that")]
    Overlap { what: &'static str, at: usize },
    #[error("manifest: {what} {at} reaches beyond {bound}")]
    Beyond { what: &'static str, at: usize, bound: &'static str },
    #[error("manifest: {what} {at} names layer {layer}, which there is not, or is of another kind")]
    NoLayer { what: &'static str, at: usize, layer: u32 },
    #[error("manifest: layer {layer} is there twice: {what}")]
    Twice { layer: String, what: &'static str },
    #[error("manifest: it is its own parent")]
    OwnParent,
}

fn clip(text: &str) -> String {
    let mut shown: String = text.chars().take(64).collect();
    if shown.len() < text.len() {
        shown.push('…');
    }
    format!("{shown:?}")
}

fn field(field: &'static str, found: impl fmt::Display, allowed: &'static str) -> ManifestError {
    ManifestError::Field { field, found: found.to_string(), allowed }
}

#[derive(Serialize, Deserialize)]
struct Envelope<'a> {
    format: &'a str,
    version: u64,
    sha256: &'a str,
    #[serde(borrow)]
    manifest: &'a RawValue,
}

/// What any version has, whatever else.
#[derive(Deserialize)]
struct Version {
    format: String,
    version: u64,
}

pub(super) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

impl Manifest {
    /// What can be said of a snapshot before it is made; its id, files and layers are the draft's to put in.
    pub fn about(purpose: Purpose, namespace: &str, container: &str) -> Self {
        Self {
            id: SnapshotId([0; 16]),
            parent: None,
            purpose,
            created: 0,
            name: None,
            labels: BTreeMap::new(),
            namespace: namespace.into(),
            container: container.into(),
            builds: Builds::default(),
            cpu: String::new(),
            vcpus: 0,
            devices: Vec::new(),
            state: File { length: 0, sha256: String::new() },
            layers: Vec::new(),
            memory: Memory::default(),
            disks: Vec::new(),
            volumes: None,
        }
    }

    /// The file's content. What is not valid is refused, as [`Self::decode`] would.
    pub(super) fn encode(&self) -> Result<Vec<u8>, ManifestError> {
        self.check()?;
        let text = serde_json::value::to_raw_value(self).map_err(ManifestError::Malformed)?;
        let digest = hex(&Sha256::digest(text.get()));
        let envelope = Envelope { format: FORMAT, version: VERSION.into(), sha256: &digest, manifest: &text };
        let mut bytes = serde_json::to_vec(&envelope).map_err(ManifestError::Malformed)?;
        bytes.push(b'\n');
        if bytes.len() as u64 > MAX_BYTES {
            return Err(ManifestError::TooLong { max: MAX_BYTES });
        }
        Ok(bytes)
    }

    /// Reads what anybody may have written.
    pub fn decode(bytes: &[u8]) -> Result<Self, ManifestError> {
        if bytes.len() as u64 > MAX_BYTES {
            return Err(ManifestError::TooLong { max: MAX_BYTES });
        }
        let version: Version =
            serde_json::from_slice(bytes).map_err(|error| ManifestError::Foreign(error.to_string()))?;
        if version.format != FORMAT {
            return Err(ManifestError::Foreign(format!("its format is {}", clip(&version.format))));
        }
        match version.version {
            found if found > u64::from(VERSION) => return Err(ManifestError::Newer { found }),
            0 => return Err(field("the version", 0, "versions count from 1")),
            _ => {}
        }
        let envelope: Envelope<'_> = serde_json::from_slice(bytes).map_err(ManifestError::Malformed)?;
        let (text, found) = (envelope.manifest.get(), envelope.sha256);
        let computed = hex(&Sha256::digest(text));
        if found != computed {
            return Err(ManifestError::Digest { found: clip(found), computed });
        }
        let manifest: Self = serde_json::from_str(text).map_err(ManifestError::Malformed)?;
        manifest.check()?;
        Ok(manifest)
    }
}
