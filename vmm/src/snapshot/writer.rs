#![allow(unsafe_code)] // runs in a forked child, on descriptors by number and memory that stands still
//! Writes a snapshot, in a forked child: the memory layer, then the state file, then the report.
//!
//! The process that forked has collected the state into memory and goes on; everything that costs time is done here, on the
//! child's copy of the memory: finding the pages that were written, leaving out those that are zero, planning the extents, checksums,
//! encoding, writing, fsync. What the child may do is said in [`crate::fork`]: no logging, no lock, no drop of what it inherited.

use std::fs::File;
use std::io::{self, Write};
use std::ops::Range;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use nix::fcntl::{OFlag, openat};
use nix::sys::stat::Mode;

use super::format;
use super::layers::{self, Extent, Layer, Limits, MAX_LAYERS, Plan, TARGET_EXTENTS};
use super::machine::MachineState;
use crate::api::{Failure, FailureCode, SnapshotDone, SnapshotLayer, SnapshotReport};
use crate::fork::{self, Child, Role};
use crate::memory::{self, GuestRam, ScanError, Still};

/// The guest comes first, above all the agent that thaws the container: where processors are few, most of the time that a container
/// stands still for a snapshot would else be the writer's.
const NICENESS: libc::c_int = 10;
/// Bytes of one write, after each of which the deadline is looked at.
const CHUNK: usize = 4 << 20;

/// Where a snapshot goes, checked.
#[derive(Debug)]
pub struct Target {
    /// Empty, open for writing.
    pub state: File,
    pub memory: File,
    /// Takes one JSON document, [`SnapshotReport`], and is closed.
    pub report: File,
    /// The root of a procfs, in which the child finds its own page map.
    pub procfs: OwnedFd,
    pub layer_id: String,
    pub patience: Duration,
}

/// The memory that a VM was restored from, and what of it the guest gave back since.
#[derive(Debug, Clone, Default)]
pub struct Origin {
    pub layers: Vec<Layer>,
    pub extents: Vec<Extent>,
}

#[derive(Debug, thiserror::Error)]
enum WriteError {
    #[error("snapshot: opening self/pagemap of the given procfs: {0}")]
    PageMap(#[source] io::Error),
    #[error(transparent)]
    Scan(#[from] ScanError),
    #[error("snapshot: {operation} the {file} file: {source}")]
    File { operation: &'static str, file: &'static str, source: io::Error },
    #[error("snapshot: encoding the state: {0}")]
    Encode(#[from] serde_json::Error),
    #[error("snapshot: it was not written within {0:?}; what is in its files is to be deleted")]
    Deadline(Duration),
    #[error("snapshot: guest memory from {start:#x} to {end:#x} is not RAM")]
    NotRam { start: u64, end: u64 },
}

/// Forks the writer of a snapshot. The state's memory table is the child's to fill in; `zero` are the ranges of guest
/// addresses that are anonymous memory, where an unwritten page is zero whatever the origin has there.
///
/// # Safety
/// As [`fork::split`]: the process is at its quiescent point.
pub unsafe fn start(
    target: &Target,
    mut state: MachineState,
    ram: &GuestRam,
    origin: &Origin,
    zero: &[Range<u64>],
) -> io::Result<Child> {
    let numbers = Numbers {
        state: target.state.as_raw_fd(),
        memory: target.memory.as_raw_fd(),
        report: target.report.as_raw_fd(),
        procfs: target.procfs.as_raw_fd(),
    };
    let keep = [numbers.state, numbers.memory, numbers.report, numbers.procfs];
    let deadline = Instant::now() + target.patience;
    let work = || {
        // SAFETY: numbers; the child has one thread, whose priority it is. Without it the child only disturbs more.
        unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, NICENESS) };
        let begun = Instant::now();
        let job = Job { target, numbers, ram, origin, zero, deadline };
        let outcome = job.write(&mut state).map(|done| SnapshotDone {
            write_ns: u64::try_from(begun.elapsed().as_nanos()).unwrap_or(u64::MAX),
            ..done
        });
        let status = i32::from(outcome.is_err());
        let report = match outcome {
            Ok(done) => SnapshotReport::Done(done),
            Err(error) => {
                SnapshotReport::Failed(Failure { code: FailureCode::HostUnfit, message: error.to_string() })
            }
        };
        // SAFETY: kept open by the list above; `target` is never dropped in this process.
        let mut file = unsafe { fork::inherited(numbers.report) };
        let said =
            serde_json::to_vec(&report).map_err(io::Error::other).and_then(|bytes| file.write_all(&bytes));
        if said.is_ok() { status } else { 2 }
    };
    let role = Role { name: c"snapshot", keep: &keep, log: None, patience: Some(target.patience) };
    // SAFETY: by this function's contract. The closure allocates and makes system calls on the kept
    // descriptors; what it borrows is this process's copy.
    unsafe { fork::split(role, work) }
}

/// The kept descriptors.
#[derive(Clone, Copy)]
struct Numbers {
    state: RawFd,
    memory: RawFd,
    report: RawFd,
    procfs: RawFd,
}

struct Job<'a> {
    target: &'a Target,
    numbers: Numbers,
    ram: &'a GuestRam,
    origin: &'a Origin,
    zero: &'a [Range<u64>],
    deadline: Instant,
}

impl Job<'_> {
    fn write(&self, state: &mut MachineState) -> Result<SnapshotDone, WriteError> {
        let pagemap = self.page_map()?;
        let written = memory::written(self.ram, &pagemap)?;
        // SAFETY: this is the child of a fork, with one thread, which does not write guest memory; RAM is private.
        let still = unsafe { Still::new(self.ram) };
        let filled = memory::without_zeroes(&still, &written);
        let zero = self.zeroed(&written);
        let limits = Limits { extents: TARGET_EXTENTS, layers: MAX_LAYERS - 1 };
        let plan = layers::plan(&state.shape.runs(), &self.origin.extents, &zero, &filled, limits);
        let layer = self.write_layer(&still, &plan)?;
        let new_bytes = layer.bytes;
        state.memory = layers::table(&plan, &self.origin.layers, layer);
        let bytes = format::encode(state)?;
        self.write_file("state", self.numbers.state, |file| file.write_all_at(&bytes, 0))?;
        Ok(SnapshotDone {
            state_bytes: bytes.len() as u64,
            memory_bytes: new_bytes,
            extents: u32::try_from(state.memory.extents.len()).unwrap_or(u32::MAX),
            layers: state.memory.layers.iter().map(SnapshotLayer::from).collect(),
            write_ns: 0,
        })
    }

    fn page_map(&self) -> Result<File, WriteError> {
        // SAFETY: kept open, and owned by nobody in this process that will close it.
        let procfs = unsafe { std::os::fd::BorrowedFd::borrow_raw(self.numbers.procfs) };
        let flags = OFlag::O_RDONLY | OFlag::O_CLOEXEC;
        let opened = openat(procfs, "self/pagemap", flags, Mode::empty());
        opened.map(File::from).map_err(|error| WriteError::PageMap(error.into()))
    }

    /// Where an older layer's data is not what the guest reads any more, whether or not the page is zero now: all that was
    /// written, and all anonymous memory.
    fn zeroed(&self, written: &[Range<u64>]) -> Vec<Range<u64>> {
        let mut all: Vec<Range<u64>> = self.zero.iter().chain(written).cloned().collect();
        all.sort_unstable_by_key(|range| range.start);
        all
    }

    fn write_layer(&self, memory: &Still<'_>, plan: &Plan) -> Result<Layer, WriteError> {
        let (mut sum, mut offset) = (crc32fast::Hasher::new(), 0);
        let put = |file: &File| -> Result<(), WriteError> {
            for range in &plan.fresh {
                let bytes =
                    memory.bytes(range).ok_or(WriteError::NotRam { start: range.start, end: range.end })?;
                for chunk in bytes.chunks(CHUNK) {
                    self.check_deadline()?;
                    sum.update(chunk);
                    file.write_all_at(chunk, offset).map_err(failed("writing", "memory"))?;
                    offset += chunk.len() as u64;
                }
            }
            Ok(())
        };
        self.with_file("memory", self.numbers.memory, put)?;
        Ok(Layer { id: self.target.layer_id.clone(), bytes: offset, crc32: sum.finalize() })
    }

    fn write_file(
        &self,
        name: &'static str,
        number: RawFd,
        put: impl FnOnce(&File) -> io::Result<()>,
    ) -> Result<(), WriteError> {
        self.with_file(name, number, |file| put(file).map_err(failed("writing", name)))
    }

    /// Writes to a kept file and sees it onto its disk.
    fn with_file(
        &self,
        name: &'static str,
        number: RawFd,
        put: impl FnOnce(&File) -> Result<(), WriteError>,
    ) -> Result<(), WriteError> {
        // SAFETY: kept open; forgotten below, as `target` owns it.
        let file = std::mem::ManuallyDrop::new(unsafe { fork::inherited(number) });
        put(&file)?;
        self.check_deadline()?;
        file.sync_all().map_err(failed("syncing", name))
    }

    fn check_deadline(&self) -> Result<(), WriteError> {
        if Instant::now() > self.deadline { Err(WriteError::Deadline(self.target.patience)) } else { Ok(()) }
    }
}

fn failed(operation: &'static str, file: &'static str) -> impl FnOnce(io::Error) -> WriteError {
    move |source| WriteError::File { operation, file, source }
}

impl From<&Layer> for SnapshotLayer {
    fn from(layer: &Layer) -> Self {
        Self { id: layer.id.clone(), bytes: layer.bytes, crc32: layer.crc32 }
    }
}
