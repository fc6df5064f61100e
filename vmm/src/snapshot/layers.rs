//! Where a snapshot's memory lies: an extent table from ranges of guest memory to places in layer files.
//!
//! A layer file is nothing but pages, packed: it has no header, and its byte 0 is the first byte of
//! some extent. What no extent covers reads as zero. A snapshot writes one new layer, with the pages that are
//! neither zero nor still as in a layer that the VM was restored from, and refers to the older layers for the rest:
//! so a delta's table is as complete as a full snapshot's, and restoring it takes as many mappings as it has extents,
//! however long the history is. Their number is bounded by writing again what lies between two written ranges, and the
//! number of layers by writing again what is in the layer of which least is used.

use std::collections::BTreeMap;
use std::ops::Range;

use serde::{Deserialize, Serialize};

/// Bytes of a page: every number in a table is a multiple of it.
pub const PAGE: u64 = 4096;
/// Most extents of a table that is written. One costs a restore some 7 microseconds (DESIGN 3).
pub const TARGET_EXTENTS: usize = 512;
/// Most extents of a table that is read. The kernel gives a process 65530 mappings.
pub const MAX_EXTENTS: usize = 4096;
/// Most layers of a table. They come as descriptors of one packet, beside those of the devices.
pub const MAX_LAYERS: usize = 16;
/// Most bytes of a layer's id.
pub const MAX_LAYER_ID: usize = 64;

/// A layer file that a table refers to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Layer {
    /// The peer's name for it: letters, digits, `-`, `_` and `.`.
    pub id: String,
    /// Bytes of the file.
    pub bytes: u64,
    /// CRC-32 of the file, for whoever imports or verifies it. A restore does not read the file.
    pub crc32: u32,
}

/// Guest memory that lies in a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Extent {
    /// Guest address.
    pub start: u64,
    pub bytes: u64,
    /// Position in [`MemoryMap::layers`].
    pub layer: u32,
    /// Where in the layer file.
    pub offset: u64,
}

impl Extent {
    pub fn end(&self) -> u64 {
        self.start.saturating_add(self.bytes)
    }
}

/// All memory of a snapshot.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryMap {
    pub layers: Vec<Layer>,
    /// Ascending.
    pub extents: Vec<Extent>,
}

/// A table that cannot be a snapshot's.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TableError {
    #[error("snapshot memory: {found} {what}; at most {max} are allowed")]
    TooMany { what: &'static str, found: usize, max: usize },
    #[error(
        "snapshot memory: layer {index} has an id that is not 1 to {MAX_LAYER_ID} letters, digits, '-', '_' or '.'"
    )]
    LayerId { index: usize },
    #[error("snapshot memory: two layers have the id {id}")]
    LayerTwice { id: String },
    #[error("snapshot memory: extent {index} ({start:#x}+{bytes:#x} at {offset:#x}) is not of whole pages")]
    Unaligned { index: usize, start: u64, bytes: u64, offset: u64 },
    #[error(
        "snapshot memory: extent {index} at {start:#x} begins before the one before it ends, at {end:#x}"
    )]
    Overlap { index: usize, start: u64, end: u64 },
    #[error(
        "snapshot memory: extent {index} ({start:#x}+{bytes:#x}) is not within one run of the guest's memory"
    )]
    NotRam { index: usize, start: u64, bytes: u64 },
    #[error("snapshot memory: extent {index} is in layer {layer}; there are {layers}")]
    NoLayer { index: usize, layer: u32, layers: usize },
    #[error("snapshot memory: extent {index} ends at {end:#x} of layer {id}, which has {bytes:#x} bytes")]
    BeyondLayer { index: usize, end: u64, id: String, bytes: u64 },
}

/// Whether `id` may name a layer.
pub fn is_layer_id(id: &str) -> bool {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
    (1..=MAX_LAYER_ID).contains(&id.len()) && id.bytes().all(allowed)
}

impl MemoryMap {
    /// Checks a table from a file against the machine's runs of RAM.
    pub fn check(&self, ram: &[Range<u64>]) -> Result<(), TableError> {
        let few = |what, found, max| {
            if found > max { Err(TableError::TooMany { what, found, max }) } else { Ok(()) }
        };
        few("layers", self.layers.len(), MAX_LAYERS)?;
        few("extents", self.extents.len(), MAX_EXTENTS)?;
        for (index, layer) in self.layers.iter().enumerate() {
            if !is_layer_id(&layer.id) {
                return Err(TableError::LayerId { index });
            }
            if self.layers[..index].iter().any(|other| other.id == layer.id) {
                return Err(TableError::LayerTwice { id: layer.id.clone() });
            }
        }
        let mut end = 0;
        for (index, extent) in self.extents.iter().enumerate() {
            self.check_extent(index, extent, end, ram)?;
            end = extent.end();
        }
        Ok(())
    }

    fn check_extent(
        &self,
        index: usize,
        extent: &Extent,
        before: u64,
        ram: &[Range<u64>],
    ) -> Result<(), TableError> {
        let Extent { start, bytes, layer, offset } = *extent;
        if bytes == 0 || [start, bytes, offset].iter().any(|number| number % PAGE != 0) {
            return Err(TableError::Unaligned { index, start, bytes, offset });
        }
        if start < before {
            return Err(TableError::Overlap { index, start, end: before });
        }
        let end = start.checked_add(bytes);
        if !ram.iter().any(|run| run.contains(&start) && end.is_some_and(|end| end <= run.end)) {
            return Err(TableError::NotRam { index, start, bytes });
        }
        let Some(file) = usize::try_from(layer).ok().and_then(|at| self.layers.get(at)) else {
            return Err(TableError::NoLayer { index, layer, layers: self.layers.len() });
        };
        match offset.checked_add(bytes) {
            Some(end) if end <= file.bytes => Ok(()),
            end => {
                let end = end.unwrap_or(u64::MAX);
                Err(TableError::BeyondLayer { index, end, id: file.id.clone(), bytes: file.bytes })
            }
        }
    }
}

/// What a snapshot has to write, and what it can refer to.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Plan {
    /// Parts of older layers, ascending; layers as in the older table.
    pub kept: Vec<Extent>,
    /// Ranges to be written, ascending.
    pub fresh: Vec<Range<u64>>,
}

/// How large a plan may be.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    pub extents: usize,
    /// Of older layers.
    pub layers: usize,
}

/// Plans a snapshot: `written` are the ranges with data of their own, `zero` those that read as zero although an
/// older layer has data for them, `written` ascending, both of whole pages; `runs` the runs of RAM.
pub fn plan(
    runs: &[Range<u64>],
    base: &[Extent],
    zero: &[Range<u64>],
    written: &[Range<u64>],
    limits: Limits,
) -> Plan {
    let mut plan =
        Plan { kept: cut(&cut(base, &join(zero.to_vec())), written), fresh: join(written.to_vec()) };
    limit_layers(&mut plan, limits.layers);
    limit_extents(&mut plan, runs, limits.extents);
    plan
}

/// `extents` without `holes`.
fn cut(extents: &[Extent], holes: &[Range<u64>]) -> Vec<Extent> {
    let mut rest = Vec::with_capacity(extents.len());
    let mut first = 0;
    for extent in extents {
        let mut at = extent.start;
        while first < holes.len() && holes[first].end <= extent.start {
            first += 1;
        }
        for hole in holes[first..].iter().take_while(|hole| hole.start < extent.end()) {
            push_part(&mut rest, extent, at..hole.start);
            at = at.max(hole.end);
        }
        push_part(&mut rest, extent, at..extent.end());
    }
    rest
}

fn push_part(parts: &mut Vec<Extent>, whole: &Extent, range: Range<u64>) {
    if range.start < range.end {
        let offset = whole.offset + (range.start - whole.start);
        parts.push(Extent { start: range.start, bytes: range.end - range.start, layer: whole.layer, offset });
    }
}

/// Ranges ascending, those that touch made one.
fn join(mut ranges: Vec<Range<u64>>) -> Vec<Range<u64>> {
    ranges.sort_unstable_by_key(|range| range.start);
    let mut joined: Vec<Range<u64>> = Vec::with_capacity(ranges.len());
    for range in ranges.into_iter().filter(|range| !range.is_empty()) {
        match joined.last_mut().filter(|last| range.start <= last.end) {
            Some(last) => last.end = last.end.max(range.end),
            None => joined.push(range),
        }
    }
    joined
}

/// Writes anew what is in the layers of which least is used, until there are few enough.
fn limit_layers(plan: &mut Plan, max: usize) {
    let mut used: BTreeMap<u32, u64> = BTreeMap::new();
    for extent in &plan.kept {
        *used.entry(extent.layer).or_default() += extent.bytes;
    }
    let surplus = used.len().saturating_sub(max);
    if surplus == 0 {
        return;
    }
    let mut by_use: Vec<_> = used.into_iter().map(|(layer, bytes)| (bytes, layer)).collect();
    by_use.sort_unstable();
    let dropped: Vec<u32> = by_use[..surplus].iter().map(|(_, layer)| *layer).collect();
    let (gone, kept) = std::mem::take(&mut plan.kept).into_iter().partition(|e| dropped.contains(&e.layer));
    plan.kept = kept;
    let mut fresh = std::mem::take(&mut plan.fresh);
    fresh.extend(Vec::into_iter(gone).map(|extent: Extent| extent.start..extent.end()));
    plan.fresh = join(fresh);
}

/// Writes what lies between two written ranges, the smallest gaps first, until there are few enough extents.
fn limit_extents(plan: &mut Plan, runs: &[Range<u64>], max: usize) {
    let surplus = (plan.kept.len() + plan.fresh.len()).saturating_sub(max);
    if surplus == 0 {
        return;
    }
    let together = |gap: &Range<u64>| runs.iter().any(|run| run.start <= gap.start && gap.end <= run.end);
    let mut gaps: Vec<Range<u64>> = plan.fresh.windows(2).map(|pair| pair[0].end..pair[1].start).collect();
    gaps.retain(together);
    gaps.sort_unstable_by_key(|gap| gap.end - gap.start);
    // Each gap that is closed is one range less, whatever it held.
    gaps.truncate(surplus);
    let mut fresh = std::mem::take(&mut plan.fresh);
    fresh.extend(gaps);
    plan.fresh = join(fresh);
    plan.kept = cut(&plan.kept, &plan.fresh);
    if plan.kept.len() + plan.fresh.len() > max {
        // The older layers alone are too scattered: everything from the first to the last byte of a run.
        let mut whole = Vec::new();
        for run in runs {
            let kept = plan.kept.iter().filter(|e| run.contains(&e.start)).map(|e| e.start..e.end());
            let fresh = plan.fresh.iter().filter(|range| run.contains(&range.start)).cloned();
            let span = kept.chain(fresh).reduce(|a, b| a.start.min(b.start)..a.end.max(b.end));
            whole.extend(span);
        }
        *plan = Plan { kept: Vec::new(), fresh: join(whole) };
    }
}

/// Where each fresh range of a plan comes to lie in its layer file, packed in order.
pub fn packed(fresh: &[Range<u64>], layer: u32) -> Vec<Extent> {
    let mut offset = 0;
    let place = |range: &Range<u64>| {
        let extent = Extent { start: range.start, bytes: range.end - range.start, layer, offset };
        offset += extent.bytes;
        extent
    };
    fresh.iter().map(place).collect()
}

/// The table of a snapshot that wrote `layer` as planned. Layers that are not used any more are left out.
pub fn table(plan: &Plan, base: &[Layer], layer: Layer) -> MemoryMap {
    let mut map = MemoryMap::default();
    let mut places: BTreeMap<u32, u32> = BTreeMap::new();
    let next = |layers: &Vec<Layer>| u32::try_from(layers.len()).unwrap_or(u32::MAX);
    for extent in &plan.kept {
        let place = *places.entry(extent.layer).or_insert_with(|| {
            let place = next(&map.layers);
            map.layers.extend(usize::try_from(extent.layer).ok().and_then(|at| base.get(at)).cloned());
            place
        });
        map.extents.push(Extent { layer: place, ..*extent });
    }
    if !plan.fresh.is_empty() {
        let place = next(&map.layers);
        map.layers.push(layer);
        map.extents.extend(packed(&plan.fresh, place));
        map.extents.sort_unstable_by_key(|extent| extent.start);
    }
    map
}

#[cfg(test)]
mod tests;
