//! Fewer layers of many: a disk that is captured again and again would come to the most that a VMM stacks. The VMM copies
//! what the layers between the raw one and the top have into a new file (`vmm/src/backend/disk/merge.rs`), durably, while the guest goes on;
//! then the list has that file in their place, and then their files go. The top fits above either, so whoever is
//! killed at any step leaves a disk with the same content: with the old list, and a file that it does not name, or with the new
//! one, and files that it does not name. [`Layers::open`] removes those.
//!
//! The disk's directory stays locked meanwhile. So nobody else can open the disk and go by a list that is about to
//! change, should its VM end before its shim is done here.

use std::fs::File;
use std::io;
use std::ops::RangeInclusive;
use std::os::unix::fs::MetadataExt;

use super::{Layers, MAX, StagedLayer, host};
use crate::rootfs::{RootfsError, lock};

/// Layers from which on there are too many. Reading costs nothing for more of them, but each checkpoint is written with as
/// many files, and what is still captured while a merge runs has to fit below [`MAX`]; a merge writes all
/// that was ever written to the disk, so it should not come often: here with every 14th checkpoint.
const BOUND: usize = 16;
/// Left on the host's disk by a merge.
const RESERVE: u64 = 512 << 20;

/// A merge that the VMM is to do.
#[derive(Debug)]
pub(crate) struct Merge {
    pub(crate) staged: StagedLayer,
    /// Counted from the raw layer, 0.
    pub(crate) numbers: RangeInclusive<usize>,
    _alone: File,
}

impl Layers {
    /// Whether a merge would be good.
    pub(crate) fn are_many(&self) -> bool {
        self.names.len() > BOUND
    }

    /// Whether nothing but a merge makes room for another one.
    pub(crate) fn are_too_many(&self) -> bool {
        self.names.len() >= MAX
    }

    /// Begins to merge all layers but the raw one and the top. `None` if the directory is in use, or these are not the
    /// layers that the VMM has. To be called while the VMM has the disk.
    pub(crate) fn begin_merge(&self) -> Result<Option<Merge>, RootfsError> {
        let last = self.names.len().saturating_sub(2);
        if !self.in_step || last < 2 {
            return Ok(None);
        }
        let Some(alone) = lock::try_directory(&self.dir) else { return Ok(None) };
        let numbers = 1..=last;
        self.admit(&numbers)?;
        Ok(Some(Merge { staged: self.new_layer()?, numbers, _alone: alone }))
    }

    /// Whether there is room for what these layers have together, at worst.
    fn admit(&self, numbers: &RangeInclusive<usize>) -> Result<(), RootfsError> {
        let mut needed = RESERVE;
        for name in &self.names[numbers.clone()] {
            let path = self.dir.join(name);
            needed += std::fs::metadata(&path).map_err(host("look at", &path))?.blocks() * 512;
        }
        let stat = nix::sys::statvfs::statvfs(&self.dir).map_err(io::Error::from);
        let stat = stat.map_err(host("look at the file system of", &self.dir))?;
        let free = stat.blocks_available().saturating_mul(stat.fragment_size());
        if free < needed {
            let detail =
                format!("{free} bytes are free, {needed} are needed to merge the layers of this disk");
            return Err(RootfsError::DiskFull { path: self.dir.clone(), detail });
        }
        Ok(())
    }

    /// The VMM has the merged layer in the place of the others: so has the list, durably. The files of the others
    /// stay until [`Self::tidy`].
    pub(crate) fn merged(&mut self, merge: &Merge) -> Result<(), RootfsError> {
        let mut names = self.names.clone();
        let replaced: Vec<_> = names.splice(merge.numbers.clone(), [merge.staged.name.clone()]).collect();
        let written = self.write(names);
        // Otherwise the disk is right as the list has it, but numbers mean other layers to the VMM.
        self.in_step = written.is_ok();
        if self.in_step {
            self.replaced.extend(replaced);
        }
        written
    }

    /// The merge has failed, and the disk is as it was; `in_step` unless the VMM may have merged after all.
    pub(crate) fn not_merged(&mut self, merge: &Merge, in_step: bool) -> Result<(), RootfsError> {
        self.in_step = in_step;
        let path = self.dir.join(&merge.staged.name);
        match std::fs::remove_file(&path) {
            // With its directory.
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            other => other.map_err(host("remove", &path)),
        }
    }

    /// Removes the files of layers that have been merged, and no others. Snapshots have them by names of their own; one that
    /// cannot be removed goes when the disk is opened the next time.
    pub(crate) fn tidy(&mut self) {
        for name in self.replaced.drain(..) {
            let _ = std::fs::remove_file(self.dir.join(name));
        }
    }
}
