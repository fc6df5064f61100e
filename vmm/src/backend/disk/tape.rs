//! What was done to the files of a disk, step by step, for tests that cut the power in between.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use vm_memory::VolatileSlice;

/// One system call that changed a file, or made changes last.
#[derive(Debug, Clone)]
pub(super) enum Step {
    Write { offset: u64, bytes: Vec<u8> },
    Zero { offset: u64, len: u64 },
    Sync,
}

impl Step {
    pub(super) fn write(offset: u64, slices: &[VolatileSlice<'_>]) -> Self {
        let mut bytes = Vec::new();
        for slice in slices {
            let mut part = vec![0; slice.len()];
            slice.copy_to(&mut part[..]);
            bytes.extend(part);
        }
        Self::Write { offset, bytes }
    }
}

/// Shared by the files of a disk; each records under its number.
#[derive(Debug, Clone, Default)]
pub(super) struct Tape {
    pub(super) file: usize,
    steps: Arc<Mutex<Vec<(usize, Step)>>>,
    broken: Arc<AtomicBool>,
}

impl Tape {
    pub(super) fn of(&self, file: usize) -> Self {
        Self { file, ..self.clone() }
    }

    pub(super) fn record(&self, step: Step) {
        self.steps.lock().unwrap().push((self.file, step));
    }

    pub(super) fn len(&self) -> usize {
        self.steps.lock().unwrap().len()
    }

    pub(super) fn steps(&self) -> Vec<(usize, Step)> {
        self.steps.lock().unwrap().clone()
    }

    /// From here on files cannot be made durable, or can again.
    pub(super) fn break_sync(&self, broken: bool) {
        self.broken.store(broken, Ordering::Relaxed);
    }

    pub(super) fn sync(&self) -> std::io::Result<()> {
        if self.broken.load(Ordering::Relaxed) {
            Err(std::io::Error::from_raw_os_error(libc::EIO))
        } else {
            Ok(())
        }
    }
}
