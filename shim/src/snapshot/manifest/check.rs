//! The rules that a manifest has to keep, whoever wrote it.

use std::collections::HashSet;

use super::{
    Builds, File, Layer, LayerKind, MAX_EXTENTS, MAX_STATE, Manifest, ManifestError, Memory, clip, field,
};
use crate::protocol::MAX_TABLES;

/// Most layers of a snapshot, of memory and disks together.
const MAX_LAYERS: usize = 1024;
const MAX_DISKS: usize = 64;
const MAX_DEVICES: usize = 256;
const MAX_EXPORTS: usize = 1024;
const MAX_LABELS: usize = 64;
/// Most bytes of a name, a label, an identifier.
const MAX_TEXT: usize = 4096;
const PAGE: u64 = 4096;
/// Guest-physical addresses end there.
const MAX_ADDRESS: u64 = 1 << 52;
/// No file is longer (ext4's largest).
const MAX_LENGTH: u64 = 16 << 40;

impl Manifest {
    /// The layer of that number, if it is of that kind.
    fn layer(&self, layer: u32, kind: LayerKind) -> Option<&Layer> {
        let found = self.layers.get(usize::try_from(layer).ok()?)?;
        (found.kind == kind).then_some(found)
    }

    pub(super) fn check(&self) -> Result<(), ManifestError> {
        if self.parent == Some(self.id) {
            return Err(ManifestError::OwnParent);
        }
        self.check_counts()?;
        self.check_texts()?;
        check_file("state", &self.state, MAX_STATE)?;
        if let Some(volumes) = &self.volumes {
            check_file("the tables of volumes", &volumes.tables, MAX_TABLES)?;
        }
        let mut seen = HashSet::new();
        for layer in &self.layers {
            check_file("a layer", &layer.file, MAX_LENGTH)?;
            if !seen.insert(layer.id) {
                return Err(ManifestError::Twice {
                    layer: layer.id.to_string(),
                    what: "in the list of layers",
                });
            }
        }
        self.check_memory()?;
        self.check_disks()
    }

    fn check_counts(&self) -> Result<(), ManifestError> {
        let exports = self.volumes.as_ref().map_or(0, |volumes| volumes.exports.len());
        let counts = [
            ("the number of volumes", exports, MAX_EXPORTS, "1024 are allowed"),
            ("the number of layers", self.layers.len(), MAX_LAYERS, "1024 are allowed"),
            ("the number of extents", self.memory.extents.len(), MAX_EXTENTS, "16384 are allowed"),
            ("the number of memory regions", self.memory.regions.len(), 64, "64 are allowed"),
            ("the number of disks", self.disks.len(), MAX_DISKS, "64 are allowed"),
            ("the number of devices", self.devices.len(), MAX_DEVICES, "256 are allowed"),
            ("the number of labels", self.labels.len(), MAX_LABELS, "64 are allowed"),
        ];
        match counts.into_iter().find(|(_, found, max, _)| found > max) {
            Some((what, found, _, allowed)) => Err(field(what, found, allowed)),
            None => Ok(()),
        }
    }

    fn check_texts(&self) -> Result<(), ManifestError> {
        let Builds { vmm, kernel, initramfs } = &self.builds;
        let texts = [&self.namespace, &self.container, &self.cpu, vmm, kernel, initramfs];
        let labels = self.labels.iter().flat_map(|(key, value)| [key, value]);
        let serials = self.disks.iter().map(|disk| &disk.serial);
        let exports = self.volumes.iter().flat_map(|volumes| &volumes.exports);
        let mounts = exports.map(|export| &export.destination);
        let texts = texts.into_iter().chain(&self.name).chain(labels).chain(&self.devices);
        for text in texts.chain(serials).chain(mounts) {
            // Shown in terminals.
            if text.len() > MAX_TEXT || text.chars().any(char::is_control) {
                return Err(field("a text", clip(text), "4096 bytes without control characters are allowed"));
            }
        }
        Ok(())
    }

    fn check_memory(&self) -> Result<(), ManifestError> {
        let Memory { regions, extents } = &self.memory;
        let mut end = 0;
        for (at, &(start, length)) in regions.iter().enumerate() {
            let what = "memory region";
            aligned("a memory region", [start, length])?;
            if at > 0 && start < end {
                return Err(ManifestError::Overlap { what, at });
            }
            let bound = "the address space";
            end = ends(start, length, MAX_ADDRESS).ok_or(ManifestError::Beyond { what, at, bound })?;
        }
        let (mut end, mut regions) = (0, regions.iter().copied().peekable());
        for (at, extent) in extents.iter().enumerate() {
            let what = "extent";
            aligned("an extent", [extent.address, extent.length])?;
            aligned("an extent's offset", [extent.offset, PAGE])?;
            if at > 0 && extent.address < end {
                return Err(ManifestError::Overlap { what, at });
            }
            while regions.next_if(|&(start, length)| start + length <= extent.address).is_some() {}
            let region = regions.peek().filter(|(start, _)| *start <= extent.address);
            let room = region.map_or(0, |&(start, length)| start + length);
            let bound = "its memory region";
            end =
                ends(extent.address, extent.length, room).ok_or(ManifestError::Beyond { what, at, bound })?;
            let layer = self.layer(extent.layer, LayerKind::Memory);
            let layer = layer.ok_or(ManifestError::NoLayer { what, at, layer: extent.layer })?;
            let bound = "its layer";
            ends(extent.offset, extent.length, layer.file.length).ok_or(ManifestError::Beyond {
                what,
                at,
                bound,
            })?;
        }
        Ok(())
    }

    fn check_disks(&self) -> Result<(), ManifestError> {
        let mut serials = HashSet::new();
        for (at, disk) in self.disks.iter().enumerate() {
            if !serials.insert(&disk.serial) {
                return Err(field("a disk's serial", clip(&disk.serial), "each can be there once"));
            }
            if disk.layers.is_empty() {
                return Err(field("the number of a disk's layers", 0, "a disk has at least one"));
            }
            let mut stack = HashSet::new();
            for &layer in &disk.layers {
                let found = self.layer(layer, LayerKind::Disk);
                let found = found.ok_or(ManifestError::NoLayer { what: "disk", at, layer })?;
                if !stack.insert(layer) {
                    let what = "in one disk, which would stand on itself";
                    return Err(ManifestError::Twice { layer: found.id.to_string(), what });
                }
            }
        }
        Ok(())
    }
}

fn ends(start: u64, length: u64, bound: u64) -> Option<u64> {
    start.checked_add(length).filter(|end| *end <= bound)
}

fn aligned(what: &'static str, [start, length]: [u64; 2]) -> Result<(), ManifestError> {
    if start.is_multiple_of(PAGE) && length.is_multiple_of(PAGE) && length > 0 {
        return Ok(());
    }
    Err(field(
        what,
        format_args!("{length:#x} bytes at {start:#x}"),
        "multiples of 4096, at least one page, are allowed",
    ))
}

fn check_file(what: &'static str, file: &File, max: u64) -> Result<(), ManifestError> {
    if file.length > max {
        return Err(field(what, format_args!("{} bytes long", file.length), "that is more than is allowed"));
    }
    if file.sha256.len() != 64 || !file.sha256.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return Err(field("a digest", clip(&file.sha256), "64 hexadecimal digits are allowed"));
    }
    Ok(())
}
