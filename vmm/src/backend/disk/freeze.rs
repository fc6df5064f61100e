//! Capture and durability: see the module above.

use std::fs::File;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use super::bits::Bits;
use super::format::Geometry;
use super::layer::{Layer, SettleError};
use super::stack::Index;
use super::{Disk, DiskError, MAX_LAYERS};

/// The next top, with all that making it one needs.
#[derive(Debug)]
pub(super) struct Staged {
    pub(super) layer: Layer,
    bits: Bits,
    /// Where the disk is still one raw file.
    index: Option<Index>,
}

/// Something could not be made durable. The kernel tells that once and forgets the data.
#[derive(Debug, Clone)]
pub(super) struct Stopped(io::ErrorKind, String);

impl Stopped {
    fn new(error: &io::Error) -> Self {
        Self(error.kind(), error.to_string())
    }

    fn error(&self) -> io::Error {
        io::Error::new(self.0, format!("an earlier flush failed: {}", self.1))
    }
}

#[derive(Debug)]
enum Settling {
    /// The pages of the bitmap that its file lacks are among these.
    Needed(Bits),
    Done,
    Failed(Stopped),
}

/// A layer that was the top. Nothing changes in it any more but what [`Frozen::settle`] adds.
#[derive(Debug)]
pub struct Frozen {
    layer: Arc<Layer>,
    /// Others below it that may not be durable.
    below: Vec<Arc<Layer>>,
    state: Mutex<Settling>,
}

impl Frozen {
    /// Makes the layer complete and durable. The first caller does the work, others wait for it; from any thread.
    pub fn settle(&self) -> io::Result<()> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let result = match &mut *state {
            Settling::Done => return Ok(()),
            Settling::Failed(stopped) => return Err(stopped.error()),
            Settling::Needed(bits) => {
                let below = self.below.iter().try_for_each(|layer| layer.anchor());
                below.map_err(SettleError::Lost).and_then(|()| self.layer.settle(bits))
            }
        };
        match result {
            Ok(()) => *state = Settling::Done,
            Err(SettleError::Again(error)) => return Err(error),
            Err(SettleError::Lost(error)) => {
                *state = Settling::Failed(Stopped::new(&error));
                return Err(error);
            }
        }
        Ok(())
    }

    /// Why it will never be settled, if that is known.
    fn failed(&self) -> Option<Stopped> {
        // Somebody who settles it holds the lock: it is not known.
        match &*self.state.try_lock().ok()? {
            Settling::Failed(stopped) => Some(stopped.clone()),
            _ => None,
        }
    }

    fn is_settled(&self) -> bool {
        // Somebody who settles it holds the lock: it is not settled.
        self.state.try_lock().is_ok_and(|state| matches!(*state, Settling::Done))
    }
}

impl Disk {
    /// Makes `file`, which is new and empty, the layer that the next [`Disk::switch`] goes on in. One that was
    /// staged before is forgotten.
    ///
    /// That the layers below are durable deltas by then keeps the staged one from outliving them: it names the one that it
    /// stands above. Most often they are, as every flush sees to it.
    pub fn stage(&mut self, file: File) -> Result<(), DiskError> {
        self.anchor()
            .map_err(|source| DiskError::Create { operation: "make those below durable", source })?;
        let found = self.layers.len() + 1;
        if found > MAX_LAYERS {
            return Err(DiskError::TooMany { found, max: MAX_LAYERS });
        }
        let layer = Layer::create(file, self.top())?;
        let geometry = Geometry::of(layer.size())?;
        let index = self.index.is_none().then(|| Index::new(&geometry));
        self.staged = Some(Staged { layer, bits: Bits::new(&geometry), index });
        Ok(())
    }

    /// Forgets a staged file.
    pub fn unstage(&mut self) {
        self.staged = None;
    }

    pub fn is_staged(&self) -> bool {
        self.staged.is_some()
    }

    /// Freezes the top and goes on in the staged layer: no system call, whatever was written. The number of layers
    /// that are captured; none if no layer is staged, and then the disk is as it was.
    pub fn switch(&mut self) -> Option<usize> {
        let Staged { layer, bits, index } = self.staged.take()?;
        let captured = self.layers.len();
        let before = match (&mut self.index, index) {
            (Some(index), _) => std::mem::replace(&mut index.bits, bits),
            (empty, index) => {
                *empty = index;
                // The raw layer has no bitmap.
                Bits::default()
            }
        };
        let state = match self.stopped.take() {
            None => Settling::Needed(before),
            Some(stopped) => Settling::Failed(stopped),
        };
        let top = Arc::clone(self.top());
        let below = self.layers.iter().filter(|layer| layer.is_loose() && !Arc::ptr_eq(layer, &top));
        let frozen = Frozen { below: below.cloned().collect(), layer: top, state: Mutex::new(state) };
        // Those that are settled are forgotten elsewhere: the last use of a layer that was merged closes its file.
        self.unsettled.push(Arc::new(frozen));
        self.layers.push(Arc::new(layer));
        Some(captured)
    }

    /// The layers that [`Frozen::settle`] is for, from the bottom up.
    pub fn unsettled(&mut self) -> Vec<Arc<Frozen>> {
        self.unsettled.retain(|frozen| !frozen.is_settled());
        self.unsettled.clone()
    }

    /// Brings what only memory knows of the layers to their files: to come before a disk is dropped that is
    /// to be used again. Where all is flushed, and for one raw file, that is nothing.
    pub fn close(&mut self) -> io::Result<()> {
        let noted = self.index.as_ref().is_none_or(|index| index.bits.is_clean());
        if noted && self.unsettled().is_empty() { Ok(()) } else { self.flush() }
    }

    /// Makes durable what the files of a stack held before they were opened, and new headers.
    fn anchor(&mut self) -> io::Result<()> {
        let failed = self.unsettled.iter().find_map(|frozen| frozen.failed());
        if let Some(stopped) = failed.as_ref().or(self.stopped.as_ref()) {
            return Err(stopped.error());
        }
        if self.index.is_none() {
            return Ok(());
        }
        let result = self.layers.iter().try_for_each(|layer| layer.anchor());
        result.inspect_err(|error| self.stopped = Some(Stopped::new(error)))
    }

    /// Makes everything that was written durable.
    pub fn flush(&mut self) -> io::Result<()> {
        if let Some(stopped) = &self.stopped {
            return Err(stopped.error());
        }
        self.unsettled.iter().try_for_each(|frozen| frozen.settle())?;
        self.unsettled.clear();
        self.anchor()?;
        let top = Arc::clone(self.top());
        // Without an index nothing below could be lost: what a failed flush means is the guest's matter.
        let Some(index) = &mut self.index else { return top.file().sync() };
        top.settle(&mut index.bits).map_err(|error| match error {
            SettleError::Again(error) => error,
            SettleError::Lost(error) => {
                self.stopped = Some(Stopped::new(&error));
                error
            }
        })
    }
}
