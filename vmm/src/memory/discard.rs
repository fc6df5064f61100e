#![allow(unsafe_code)] // madvise and mmap on guest RAM
//! Guest memory that goes back to the host: the one place that takes pages out of guest RAM.
//!
//! The rule: a discarded page reads as zeroes, whatever was below it. On anonymous memory
//! MADV_DONTNEED does that. On a private file mapping, which RAM is after a restore (DESIGN 2),
//! it would bring the file's data back, so there the range becomes anonymous memory by a fixed
//! mapping at the same address. KVM's slots name host addresses, so they stay as they are; a
//! vCPU or a device that touches a page meanwhile waits in its fault and finds zeroes.
//!
//! A page of a huge page goes back when the last of its 512 does: ask for long ranges.

use std::collections::BTreeMap;
use std::io;
use std::ops::Range;

use vm_memory::{Address, GuestMemory, GuestMemoryRegion};

use super::{Gpa, GuestRam, mapping};

/// Bytes of a page of the host.
const PAGE: u64 = 4096;

/// How often anonymous memory may replace a part of a file mapping. The kernel gives a process
/// 65530 mappings, each time may add two (neighbours do not always join), and it is the guest that
/// chooses the parts: it must not use up what the VMM needs.
const MAX_REPLACED: usize = 16 * 1024;

#[derive(Debug, thiserror::Error)]
pub enum DiscardError {
    #[error("guest memory: {operation} {len:#x} bytes at {start:#x}: {source}")]
    Host { operation: &'static str, start: u64, len: u64, source: io::Error },
    #[error(
        "guest memory: {len:#x} bytes at {start:#x} stay: {max} parts of file mappings were given back already, and no more are"
    )]
    Scattered { start: u64, len: u64, max: usize },
    #[error("guest memory: {len:#x} bytes at {start:#x} are not RAM")]
    NotRam { start: u64, len: u64 },
}

/// Takes pages out of one guest's RAM. There is one for a guest, as it keeps in mind where
/// anonymous memory has replaced a file mapping.
#[derive(Debug, Clone)]
pub struct Discard {
    ram: GuestRam,
    /// The runs of RAM, ascending.
    runs: Vec<Range<u64>>,
    /// What is anonymous memory: start to end; ranges that touch are one.
    anonymous: BTreeMap<u64, u64>,
    /// Parts of file mappings that may still be replaced.
    replaceable: usize,
}

impl Discard {
    pub fn new(ram: &GuestRam) -> Self {
        let run = |start: Gpa, len: u64| start.0..start.0.saturating_add(len);
        let mut discard = Self {
            ram: ram.clone(),
            runs: ram.iter().map(|region| run(region.start_addr(), region.len())).collect(),
            anonymous: BTreeMap::new(),
            replaceable: MAX_REPLACED,
        };
        for region in ram.iter().filter(|region| mapping::is_anonymous(region)) {
            discard.remember(run(region.start_addr(), region.len()));
        }
        discard
    }

    /// For RAM of which `files`, ascending and free of overlap, are mappings of files.
    pub fn with_files(ram: &GuestRam, files: &[Range<u64>]) -> Self {
        let mut discard = Self::new(ram);
        discard.anonymous.clear();
        for run in discard.runs.clone() {
            let mut at = run.start;
            for file in files.iter().filter(|file| run.contains(&file.start)) {
                if at < file.start {
                    discard.remember(at..file.start);
                }
                at = file.end;
            }
            if at < run.end {
                discard.remember(at..run.end);
            }
        }
        discard
    }

    /// What is anonymous memory, ascending: a page there that nobody has written reads as zero.
    pub fn anonymous(&self) -> Vec<Range<u64>> {
        self.anonymous.iter().map(|(&start, &end)| start..end).collect()
    }

    /// Gives the whole pages of `range` that are RAM back to the host, and returns their bytes.
    /// After an error a part of them may have gone; all of them are still mapped.
    pub fn discard(&mut self, range: Range<u64>) -> Result<u64, DiscardError> {
        let Some(start) = range.start.checked_next_multiple_of(PAGE) else { return Ok(0) };
        let end = range.end - range.end % PAGE;
        let mut given = 0;
        for run in 0..self.runs.len() {
            let run = &self.runs[run];
            let part = start.max(run.start)..end.min(run.end);
            if !part.is_empty() {
                given += part.end - part.start;
                self.discard_in_run(part)?;
            }
        }
        Ok(given)
    }

    /// `range` lies in one run of RAM, so that its host addresses hang together.
    fn discard_in_run(&mut self, range: Range<u64>) -> Result<(), DiscardError> {
        let mut at = range.start;
        while at < range.end {
            let here = self.anonymous.range(..=at).next_back().map(|(_, &end)| end);
            if let Some(end) = here.filter(|&end| end > at) {
                let end = end.min(range.end);
                self.drop_pages(at..end)?;
                at = end;
            } else {
                let next = self.anonymous.range(at..range.end).next().map_or(range.end, |(&start, _)| start);
                self.replace(at..next)?;
                at = next;
            }
        }
        Ok(())
    }

    fn host_range(&self, range: &Range<u64>) -> Result<(*mut libc::c_void, usize), DiscardError> {
        let (start, len) = (range.start, range.end - range.start);
        let size = usize::try_from(len).map_err(|_| DiscardError::NotRam { start, len })?;
        match self.ram.get_slice(Gpa::new(start), size) {
            Ok(slice) => Ok((slice.ptr_guard_mut().as_ptr().cast(), size)),
            Err(_) => Err(DiscardError::NotRam { start, len }),
        }
    }

    /// For anonymous memory only.
    fn drop_pages(&self, range: Range<u64>) -> Result<(), DiscardError> {
        let (address, size) = self.host_range(&range)?;
        // SAFETY: the range was found to lie in a mapping that `ram` holds, and stays mapped. Its
        // content is the guest's, so nobody here holds a reference into it: it is reached by
        // volatile accesses, which may find anything.
        match unsafe { libc::madvise(address, size, libc::MADV_DONTNEED) } {
            0 => Ok(()),
            _ => Err(host_error("giving back", &range)),
        }
    }

    /// Puts anonymous memory in the place of a file mapping.
    fn replace(&mut self, range: Range<u64>) -> Result<(), DiscardError> {
        let Some(left) = self.replaceable.checked_sub(1) else {
            let (start, len) = (range.start, range.end - range.start);
            return Err(DiscardError::Scattered { start, len, max: MAX_REPLACED });
        };
        let (address, size) = self.host_range(&range)?;
        let flags = mapping::FLAGS | libc::MAP_FIXED;
        // SAFETY: as in `drop_pages`. The range is whole pages of a private mapping that `ram` owns
        // and unmaps by address, so it may consist of several. The kernel replaces it in one step
        // for everybody who touches it, and checks its limits before it takes the old one away.
        let mapped = unsafe { libc::mmap(address, size, mapping::PROTECTION, flags, -1, 0) };
        if mapped == libc::MAP_FAILED {
            return Err(host_error("replacing the file mapping of", &range));
        }
        // SAFETY: exactly the mapping made above.
        unsafe { mapping::leave_out_of_core_dumps(address, size) };
        self.replaceable = left;
        self.remember(range);
        Ok(())
    }

    /// Notes that `range`, which was not before, is anonymous memory.
    fn remember(&mut self, range: Range<u64>) {
        let (mut start, mut end) = (range.start, range.end);
        if let Some((&before, _)) =
            self.anonymous.range(..start).next_back().filter(|(_, end)| **end == start)
        {
            start = before;
        }
        if let Some(after) = self.anonymous.remove(&end) {
            end = after;
        }
        self.anonymous.insert(start, end);
    }
}

fn host_error(operation: &'static str, range: &Range<u64>) -> DiscardError {
    let source = io::Error::last_os_error();
    DiscardError::Host { operation, start: range.start, len: range.end - range.start, source }
}

#[cfg(test)]
mod tests;
