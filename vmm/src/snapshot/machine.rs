//! The document of a state file: everything of a VM but the bytes of its memory.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::ops::Range;

use serde::{Deserialize, Serialize};

use super::contract::{PartState, RestoreError};
use super::format::{self, FormatError};
use super::layers::{MemoryMap, TableError};
use crate::api::{
    DiskSlots, MAX_DISK_SLOTS, MAX_MEMORY_MIB, MAX_NETWORK_SLOTS, MAX_TAG, MAX_VCPUS, MIN_MEMORY_MIB,
};
use crate::arch;
use crate::memory::RamLayout;

/// What a machine is built of: the same for the VM that was saved and the one that is restored.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Shape {
    pub vcpus: u8,
    pub memory_bytes: u64,
    pub disk_slots: DiskSlots,
    /// The tag of the file system device, if there is one.
    #[serde(default)]
    pub filesystem: Option<String>,
    #[serde(default)]
    pub network_slots: u8,
    pub vsock: bool,
}

/// A VM at its quiescent point.
#[derive(Debug, Serialize, Deserialize)]
pub struct MachineState {
    /// Version of the VMM that wrote it, for people.
    pub written_by: String,
    /// Wall-clock time of the save, nanoseconds since 1970.
    pub saved_at_ns: u64,
    pub shape: Shape,
    pub platform: arch::PlatformState,
    /// In the order of their indices.
    pub vcpus: Vec<arch::VcpuState>,
    /// By name: `serial`, `virtio-0` …
    pub parts: BTreeMap<String, PartState>,
    pub memory: MemoryMap,
}

/// A state file does not describe a machine that can be built here.
#[derive(Debug, thiserror::Error)]
pub enum StateFileError {
    #[error(transparent)]
    Format(#[from] FormatError),
    #[error("snapshot state: {what}: {found}; allowed is {min} to {max}")]
    Range { what: &'static str, found: u64, min: u64, max: u64 },
    #[error("snapshot state: it is of {vcpus} vCPUs, and has the state of {found}")]
    Vcpus { vcpus: u8, found: usize },
    #[error("snapshot state: the file system's tag has bytes that are not printable ASCII")]
    Tag,
    #[error("snapshot memory: layer {id} is needed, and was not given")]
    NoLayer { id: String },
    #[error(
        "snapshot memory: layer {id} was given, and the snapshot does not need it; is it another snapshot's?"
    )]
    SurplusLayer { id: String },
    #[error("snapshot memory: examining layer {id}: {source}")]
    Examine { id: String, source: io::Error },
    #[error(
        "snapshot memory: layer {id} has {found} bytes, and had {expected}; it is damaged, or another layer"
    )]
    LayerSize { id: String, found: u64, expected: u64 },
    #[error(transparent)]
    Table(#[from] TableError),
    #[error(transparent)]
    Part(#[from] RestoreError),
}

impl Shape {
    pub fn layout(&self) -> RamLayout {
        RamLayout::around(self.memory_bytes, arch::layout::HOLE)
    }

    /// The runs of RAM as ranges of guest addresses.
    pub fn runs(&self) -> Vec<Range<u64>> {
        self.layout().ranges().iter().map(|run| run.start.0..run.start.0 + run.size).collect()
    }

    fn check(&self) -> Result<(), StateFileError> {
        let range = |what, found: u64, min: u64, max: u64| {
            if (min..=max).contains(&found) {
                Ok(())
            } else {
                Err(StateFileError::Range { what, found, min, max })
            }
        };
        range("vCPUs", self.vcpus.into(), 1, MAX_VCPUS.into())?;
        range("memory in bytes", self.memory_bytes, MIN_MEMORY_MIB << 20, MAX_MEMORY_MIB << 20)?;
        range("memory beyond whole MiB", self.memory_bytes % (1 << 20), 0, 0)?;
        range("read-only disk slots", self.disk_slots.read_only.into(), 0, MAX_DISK_SLOTS.into())?;
        range("writable disk slots", self.disk_slots.writable.into(), 0, MAX_DISK_SLOTS.into())?;
        range("network slots", self.network_slots.into(), 0, MAX_NETWORK_SLOTS.into())?;
        if let Some(tag) = &self.filesystem {
            range("length of the file system's tag", tag.len() as u64, 1, MAX_TAG as u64)?;
            if !tag.bytes().all(|byte| (b' '..=b'~').contains(&byte)) {
                return Err(StateFileError::Tag);
            }
        }
        Ok(())
    }
}

/// The files of a table's layers, in its order.
pub fn match_layers(memory: &MemoryMap, mut files: Vec<(String, File)>) -> Result<Vec<File>, StateFileError> {
    let mut matched = Vec::with_capacity(memory.layers.len());
    for layer in &memory.layers {
        let id = || layer.id.clone();
        let at = files.iter().position(|(id, _)| *id == layer.id);
        let (_, file) = files.swap_remove(at.ok_or_else(|| StateFileError::NoLayer { id: id() })?);
        let found = file.metadata().map_err(|source| StateFileError::Examine { id: id(), source })?.len();
        if found != layer.bytes {
            return Err(StateFileError::LayerSize { id: id(), found, expected: layer.bytes });
        }
        matched.push(file);
    }
    match files.pop() {
        Some((id, _)) => Err(StateFileError::SurplusLayer { id }),
        None => Ok(matched),
    }
}

impl MachineState {
    /// Reads a state file, and checks what can be checked without a host.
    pub fn read(file: &File) -> Result<Self, StateFileError> {
        let state: Self = format::decode(file)?;
        state.shape.check()?;
        if state.vcpus.len() != usize::from(state.shape.vcpus) {
            let (vcpus, found) = (state.shape.vcpus, state.vcpus.len());
            return Err(StateFileError::Vcpus { vcpus, found });
        }
        state.memory.check(&state.shape.runs())?;
        Ok(state)
    }
}
