#![allow(unsafe_code)] // keeps host addresses of guest memory between vectored system calls
//! A list of buffers in guest memory that outlives a call: what a device that reads frames of
//! unknown length straight into guest memory gathers beforehand.
//!
//! [`super::guest_io`] serves slices that are borrowed for one call; a borrow cannot last from one
//! call into a device to the next, so this list shares ownership of the memory instead.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use vm_memory::{GuestMemory, GuestMemoryError, VolatileSlice};

use super::guest_io::{count_of, retry};
use crate::memory::{Gpa, GuestRam};

/// Most buffers that one system call takes (the kernel's UIO_MAXIOV).
pub const MAX_CALL: usize = 1024;

/// See the module. Buffers are used up from the front and added at the back.
pub struct GuestBuffers {
    /// Keeps every address of the list mapped.
    memory: GuestRam,
    list: Vec<libc::iovec>,
    /// Entries before this one are used up.
    first: usize,
}

// SAFETY: the addresses are plain numbers to this type: they are given to system calls, or written
// through with volatile copies, and `memory`, which is Send, keeps them mapped on any thread.
unsafe impl Send for GuestBuffers {}

impl std::fmt::Debug for GuestBuffers {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("GuestBuffers").field("len", &self.len()).finish_non_exhaustive()
    }
}

impl GuestBuffers {
    pub fn new(memory: GuestRam) -> Self {
        Self { memory, list: Vec::new(), first: 0 }
    }

    /// Number of buffers.
    pub fn len(&self) -> usize {
        self.list.len() - self.first
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Adds a range of guest memory; the number of bytes, which is `len`. An empty one adds no buffer.
    pub fn push(&mut self, address: Gpa, len: usize) -> Result<usize, GuestMemoryError> {
        if len == 0 {
            return Ok(0);
        }
        let before = self.list.len();
        for slice in self.memory.get_slices(address, len) {
            match slice {
                Ok(slice) => {
                    let iov_base = slice.ptr_guard_mut().as_ptr().cast();
                    self.list.push(libc::iovec { iov_base, iov_len: slice.len() });
                }
                Err(error) => {
                    self.list.truncate(before);
                    return Err(error);
                }
            }
        }
        Ok(len)
    }

    /// Forgets the first `count` buffers.
    pub fn drop_front(&mut self, count: usize) {
        self.first = (self.first + count).min(self.list.len());
        if self.first == self.list.len() {
            self.clear();
        } else if self.first >= MAX_CALL {
            self.list.drain(..self.first);
            self.first = 0;
        }
    }

    /// Forgets the buffers from the `len`th on.
    pub fn truncate(&mut self, len: usize) {
        self.list.truncate(self.first + len);
    }

    pub fn clear(&mut self) {
        self.list.clear();
        self.first = 0;
    }

    /// Copies `data` to `offset` bytes behind the beginning of the `index`th buffer, on over the
    /// next ones; the number of bytes that there was room for.
    pub fn write_at(&self, index: usize, offset: usize, data: &[u8]) -> usize {
        let (mut skip, mut done) = (offset, 0);
        for buffer in self.list.iter().skip(self.first + index) {
            if skip >= buffer.iov_len {
                skip -= buffer.iov_len;
                continue;
            }
            let len = (buffer.iov_len - skip).min(data.len() - done);
            // SAFETY: `push` found the buffer inside `memory`, which keeps it mapped, and `skip + len`
            // is within it. The copy is volatile: the guest may write there at the same time.
            let slice = unsafe { VolatileSlice::new(buffer.iov_base.cast::<u8>().add(skip), len) };
            slice.copy_from(&data[done..done + len]);
            done += len;
            skip = 0;
            if done == data.len() {
                break;
            }
        }
        done
    }

    /// One readv(2) into the buffers, and behind them into `rest`.
    pub(super) fn read(&mut self, fd: BorrowedFd<'_>, rest: &mut [u8]) -> io::Result<usize> {
        let end = self.list.len();
        self.list.push(libc::iovec { iov_base: rest.as_mut_ptr().cast(), iov_len: rest.len() });
        // SAFETY: the list describes memory that `memory` keeps mapped and that nobody holds a
        // reference to, and `rest`, which is borrowed over the call.
        let result = self.call(|list, count| unsafe { libc::readv(fd.as_raw_fd(), list, count) });
        self.list.truncate(end);
        result
    }

    /// One writev(2) of the buffers.
    pub(super) fn write(&self, fd: BorrowedFd<'_>) -> io::Result<usize> {
        // SAFETY: as in `read`; the kernel only reads from the memory.
        self.call(|list, count| unsafe { libc::writev(fd.as_raw_fd(), list, count) })
    }

    fn call(&self, call: impl Fn(*const libc::iovec, libc::c_int) -> isize) -> io::Result<usize> {
        let list = &self.list[self.first..];
        let count = i32::try_from(list.len()).ok().filter(|_| list.len() <= MAX_CALL);
        let count = count.ok_or(io::ErrorKind::InvalidInput)?;
        retry(|| count_of(call(list.as_ptr(), count)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::{Bytes, GuestAddress};

    fn memory() -> GuestRam {
        GuestRam::from_ranges(&[(GuestAddress(0), 0x4000), (GuestAddress(0x8000), 0x1000)]).unwrap()
    }

    fn bytes(memory: &GuestRam, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        memory.read_slice(&mut bytes, GuestAddress(at)).unwrap();
        bytes
    }

    #[test]
    fn writes_go_on_over_the_buffers() {
        let memory = memory();
        let mut buffers = GuestBuffers::new(memory.clone());
        for (at, len) in [(0x100, 3), (0x200, 0), (0x300, 4), (0x8000, 2)] {
            assert_eq!(buffers.push(GuestAddress(at), len).unwrap(), len);
        }
        assert_eq!(buffers.len(), 3);
        assert_eq!(buffers.write_at(0, 2, b"abcdefgh"), 7);
        assert_eq!(bytes(&memory, 0x102, 1), b"a");
        assert_eq!(bytes(&memory, 0x300, 4), b"bcde");
        assert_eq!(bytes(&memory, 0x8000, 2), b"fg");
        buffers.drop_front(1);
        assert_eq!(buffers.write_at(1, 0, b"xy"), 2);
        assert_eq!(bytes(&memory, 0x8000, 2), b"xy");
        buffers.drop_front(9);
        assert!(buffers.is_empty());
    }

    #[test]
    fn what_is_no_memory_is_refused_whole() {
        let mut buffers = GuestBuffers::new(memory());
        buffers.push(GuestAddress(0), 1).unwrap();
        for (at, len) in [(0x3fff, 2), (0x4000, 1), (0x8fff, 2), (u64::MAX, 2), (0, usize::MAX)] {
            buffers.push(GuestAddress(at), len).unwrap_err();
        }
        assert_eq!(buffers.len(), 1);
    }

    #[test]
    fn reads_fill_the_buffers_and_then_the_rest() {
        use std::io::Write;
        use std::os::fd::AsFd;
        let memory = memory();
        let (reader, mut writer) = io::pipe().unwrap();
        let mut buffers = GuestBuffers::new(memory.clone());
        for n in 0..2000 {
            buffers.push(GuestAddress(n), 1).unwrap();
        }
        let refused = buffers.read(reader.as_fd(), &mut [0; 4]).unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::InvalidInput, "more buffers than a call takes");
        buffers.drop_front(1500);
        buffers.truncate(3);
        writer.write_all(b"abcde").unwrap();
        let mut rest = [0; 4];
        assert_eq!(buffers.read(reader.as_fd(), &mut rest).unwrap(), 5);
        assert_eq!((bytes(&memory, 1500, 4), rest), (b"abc\0".to_vec(), *b"de\0\0"));
        let (mut reader, writer) = io::pipe().unwrap();
        assert_eq!(buffers.write(writer.as_fd()).unwrap(), 3);
        let mut read = [0; 3];
        io::Read::read_exact(&mut reader, &mut read).unwrap();
        assert_eq!(&read, b"abc");
    }
}
