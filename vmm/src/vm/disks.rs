//! The VM's disks: slots, and what is asked of writable disks when they are captured.

use std::fs::File;
use std::io;
use std::ops::RangeInclusive;

use super::{Refusal, StateError, Vm};
use crate::api::{AttachedDisk, BlkMetrics, CapturedDisk, VmState};
use crate::config::Disk;
use crate::log;

/// Makes one frozen layer durable, on any thread; its name is for errors.
pub type Settle = (String, Box<dyn FnOnce() -> io::Result<()> + Send>);
/// Puts what was merged into the disk, on the event loop.
pub type Replace = Box<dyn FnOnce() -> Result<(), Refusal> + Send>;
/// Merges layers, on any thread.
pub type Merging = Box<dyn FnOnce() -> Result<Replace, Refusal> + Send>;

/// A place for a disk, as the control plane sees it.
pub trait DiskSlot {
    fn serial(&self) -> String;
    fn read_only(&self) -> bool;
    fn is_free(&self) -> bool;
    fn attach(&self, file: File, below: Vec<File>) -> Result<(), Refusal>;
    /// See [`crate::backend::disk`] for these.
    fn stage(&self, file: File) -> Result<(), Refusal>;
    fn unstage(&self);
    fn is_staged(&self) -> bool;
    fn switch(&self) -> Option<usize>;
    fn unsettled(&self) -> Vec<Settle>;
    fn merge(&self, numbers: RangeInclusive<usize>, file: File) -> Result<Merging, Refusal>;
    fn close(&self) -> io::Result<()>;
    fn metrics(&self) -> BlkMetrics;
}

impl Vm {
    /// Puts a disk into the first free slot of its kind.
    pub fn attach(&mut self, disk: Disk) -> Result<AttachedDisk, StateError> {
        self.require_living("attach")?;
        let mut slots = self.parts.disks.iter();
        let slot = slots.find(|slot| slot.read_only() == disk.read_only && slot.is_free());
        let Some(slot) = slot else {
            let kind = if disk.read_only { "read-only" } else { "writable" };
            let max = self.parts.disks.iter().filter(|slot| slot.read_only() == disk.read_only).count();
            return Err(StateError::Exhausted { kind, max });
        };
        slot.attach(disk.file, disk.below).map_err(StateError::Attach)?;
        Ok(AttachedDisk { serial: slot.serial() })
    }

    /// Gives each writable disk the file that it goes on in when it is captured: all, or none.
    pub fn stage_disks(&mut self, files: Vec<(String, File)>) -> Result<(), StateError> {
        let running = [VmState::Running, VmState::Paused, VmState::ShuttingDown];
        self.require("snapshot", &running, super::snapshot::MEND)?;
        self.unstage_disks();
        let mut files = files.into_iter();
        let staged = files
            .try_for_each(|(serial, file)| {
                self.writable_disk(&serial)?.stage(file).map_err(StateError::Attach)
            })
            .and_then(|()| self.require_staged());
        staged.inspect_err(|_| self.unstage_disks())
    }

    /// Forgets these files.
    pub fn unstage_disks(&mut self) {
        self.parts.disks.iter().for_each(|slot| slot.unstage());
    }

    /// Prepares to merge layers of a disk that the guest goes on working with.
    pub fn merge_disk(
        &mut self,
        serial: &str,
        numbers: RangeInclusive<usize>,
        file: File,
    ) -> Result<Merging, StateError> {
        self.require_living("merge layers")?;
        self.writable_disk(serial)?.merge(numbers, file).map_err(StateError::Attach)
    }

    /// What there is to do to make the frozen layers of all disks durable.
    pub fn unsettled_disks(&self) -> Vec<Settle> {
        self.writable_disks().flat_map(|slot| slot.unsettled()).collect()
    }

    /// Brings what only memory knows of the disks to their files, at the end.
    pub fn close_disks(&self) {
        for slot in self.writable_disks() {
            if let Err(error) = slot.close() {
                log::error("vm", format_args!("disk {}: close: {error}", slot.serial()));
            }
        }
    }

    /// That [`Self::switch_disks`] will switch all.
    pub(super) fn require_staged(&self) -> Result<(), StateError> {
        match self.writable_disks().find(|slot| !slot.is_staged()) {
            Some(slot) => Err(StateError::NotStaged { serial: slot.serial() }),
            None => Ok(()),
        }
    }

    /// Captures all writable disks at this instant, without input or output. For a VM that is paused, and after
    /// [`Self::require_staged`]: nothing can fail then.
    pub(super) fn switch_disks(&mut self) -> Vec<CapturedDisk> {
        let switch = |slot: &dyn DiskSlot| {
            let layers = u32::try_from(slot.switch()?).unwrap_or(u32::MAX);
            Some(CapturedDisk { serial: slot.serial(), layers })
        };
        self.writable_disks().filter_map(switch).collect()
    }

    fn writable_disk(&self, serial: &str) -> Result<&dyn DiskSlot, StateError> {
        let slot = self.writable_disks().find(|slot| slot.serial() == serial);
        slot.ok_or_else(|| StateError::NoDisk { serial: serial.to_owned() })
    }

    fn writable_disks(&self) -> impl Iterator<Item = &dyn DiskSlot> {
        let disks = self.parts.disks.iter().map(|slot| &**slot);
        disks.filter(|slot| !slot.read_only() && !slot.is_free())
    }
}
