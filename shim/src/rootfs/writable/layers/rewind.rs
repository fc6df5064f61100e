//! A disk that goes back to what it was in a snapshot, while its task stays: for another VM, beside the one that has the disk and
//! stands still. The list goes on naming the layers of the latter until [`Rewind::commit`], and what that has written stays until
//! [`Rewind::finish`]; so whoever is killed in between leaves either disk whole.
//!
//! Layers that the disk still has are used as they are. Those that have been merged since, or were put aside when it went back before,
//! come from the snapshot's own files. The raw layer is never merged and never put aside: by that a disk is known again.
//!
//! The directory stays locked meanwhile, as in a merge, and for the same reason.

use std::fs::File;
use std::path::PathBuf;

use slog::{Logger, warn};

use super::{Layers, StagedLayer, WritableDisk, damaged, host, is_same};
use crate::rootfs::{RootfsError, lock};
use crate::snapshot::share;

/// See the module. Dropped before it is committed, it leaves the disk as it was.
#[derive(Debug)]
pub(crate) struct Rewind {
    before: Layers,
    after: Layers,
    /// Files that nobody needs if it comes to nothing.
    made: Vec<PathBuf>,
    committed: bool,
    _alone: File,
}

impl Layers {
    /// The disk as it was when a snapshot with these `files` was taken of it, from the bottom up, and goes on in a new layer above
    /// them. To be called by who has the disk's VM.
    pub(crate) fn rewind(&self, files: &[File]) -> Result<(WritableDisk, Rewind), RootfsError> {
        let alone = lock::directory(&self.dir)?;
        let raw = self.dir.join(super::DISK);
        let Some((bottom, deltas)) = files.split_first() else {
            return Err(damaged(&raw, "the snapshot has no layer of it"));
        };
        if self.names.len() < 2 {
            return Err(damaged(&raw, "it was never captured, so the snapshot is of another disk"));
        }
        let own = File::open(&raw).map_err(host("open", &raw))?;
        if !is_same(&own, bottom).map_err(host("read", &raw))? {
            return Err(damaged(&raw, "the snapshot is of another disk"));
        }
        let after = Self {
            names: self.names[..1].to_vec(),
            in_step: true,
            replaced: Vec::new(),
            dir: self.dir.clone(),
        };
        let mut rewind =
            Rewind { before: self.clone(), after, made: Vec::new(), committed: false, _alone: alone };
        // Of those that the disk has, the uppermost is being written.
        let kept = &self.names[1..self.names.len() - 1];
        let mut kept = kept.iter().take(deltas.len());
        for delta in deltas {
            let name = match kept.next() {
                Some(name)
                    if is_same(&self.read(name)?, delta).map_err(host("read", &self.dir.join(name)))? =>
                {
                    name.clone()
                }
                // Nor are those above it the snapshot's.
                _ => {
                    kept = [].iter().take(0);
                    rewind.share(delta)?
                }
            };
            rewind.after.names.push(name);
        }
        let StagedLayer { file: top, name } = rewind.after.stage()?;
        rewind.made.push(self.dir.join(&name));
        let below = rewind.after.files()?;
        rewind.after.names.push(name);
        Ok((WritableDisk { top, below, layers: rewind.after.clone() }, rewind))
    }
}

impl Rewind {
    fn share(&mut self, delta: &File) -> Result<String, RootfsError> {
        let (name, path) = self.after.new_name()?;
        self.made.push(path.clone());
        share(delta, &path).map_err(host("link", &path))?;
        Ok(name)
    }

    /// From here on the directory's disk is this one, durably. When that fails it is the one that it was.
    pub(crate) fn commit(&mut self, log: &Logger) -> Result<(), RootfsError> {
        self.committed = true;
        let written = self.after.clone().write(self.after.names.clone());
        if written.is_err() {
            self.undo(log);
        }
        written
    }

    /// After all the directory's disk is the one that it was.
    pub(crate) fn undo(&mut self, log: &Logger) {
        match self.before.clone().write(self.before.names.clone()) {
            Ok(()) => self.committed = false,
            Err(error) => {
                warn!(log, "the list of a disk's layers may be that of a rollback that has failed"; "error" => %error);
            }
        }
    }

    /// What was written since the snapshot is removed.
    pub(crate) fn finish(self) {
        self.after.remove_unlisted();
    }
}

impl Drop for Rewind {
    fn drop(&mut self) {
        for path in self.made.drain(..).filter(|_| !self.committed) {
            let _ = std::fs::remove_file(path);
        }
    }
}
