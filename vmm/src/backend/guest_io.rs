#![allow(unsafe_code)] // vectored system calls straight into guest memory, without a copy
//! System calls on slices of guest memory.
//!
//! Guest memory changes under our hands, so no reference to it may exist: the kernel gets raw
//! addresses. A [`VolatileSlice`] vouches that its range is mapped for as long as it lives.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use vm_memory::VolatileSlice;

/// Most slices in one call (the kernel's UIO_MAXIOV).
const MAX_SLICES: usize = 1024;

/// Bytes and address of each slice, skipping the first `skip` bytes.
fn iovecs(slices: &[VolatileSlice<'_>], mut skip: usize) -> Vec<libc::iovec> {
    let mut list = Vec::with_capacity(slices.len().min(MAX_SLICES));
    for slice in slices {
        if skip >= slice.len() {
            skip -= slice.len();
            continue;
        }
        if list.len() == MAX_SLICES {
            break;
        }
        let base = slice.ptr_guard_mut().as_ptr();
        list.push(libc::iovec { iov_base: base.wrapping_add(skip).cast(), iov_len: slice.len() - skip });
        skip = 0;
    }
    list
}

pub(super) fn count_of(result: isize) -> io::Result<usize> {
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}

/// Repeats `call` over interruptions.
pub(super) fn retry(mut call: impl FnMut() -> io::Result<usize>) -> io::Result<usize> {
    loop {
        match call() {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            other => return other,
        }
    }
}

#[allow(clippy::cast_possible_truncation, clippy::cast_possible_wrap)] // at most MAX_SLICES
fn iov_count(list: &[libc::iovec]) -> libc::c_int {
    list.len() as libc::c_int
}

/// One preadv(2) at `offset`, leaving the first `skip` bytes of the slices alone.
pub(super) fn read_at(
    fd: BorrowedFd<'_>,
    slices: &[VolatileSlice<'_>],
    skip: usize,
    offset: i64,
) -> io::Result<usize> {
    let list = iovecs(slices, skip);
    retry(|| {
        // SAFETY: `list` describes memory that `slices` keeps mapped and that nobody holds a
        // reference to; its length is the count given.
        count_of(unsafe { libc::preadv64(fd.as_raw_fd(), list.as_ptr(), iov_count(&list), offset) })
    })
}

/// One pwritev(2) at `offset`, leaving the first `skip` bytes of the slices out.
pub(super) fn write_at(
    fd: BorrowedFd<'_>,
    slices: &[VolatileSlice<'_>],
    skip: usize,
    offset: i64,
) -> io::Result<usize> {
    let list = iovecs(slices, skip);
    retry(|| {
        // SAFETY: as in `read_at`; the kernel only reads from the memory.
        count_of(unsafe { libc::pwritev64(fd.as_raw_fd(), list.as_ptr(), iov_count(&list), offset) })
    })
}

/// As [`iovecs`], behind `head`, a buffer of our own.
fn iovecs_after(head: *mut u8, len: usize, slices: &[VolatileSlice<'_>]) -> Vec<libc::iovec> {
    let mut list = iovecs(slices, 0);
    if len > 0 {
        list.insert(0, libc::iovec { iov_base: head.cast(), iov_len: len });
        list.truncate(MAX_SLICES);
    }
    list
}

fn message(list: &mut [libc::iovec]) -> libc::msghdr {
    // SAFETY: all zeroes is a valid msghdr: no name, no vectors, no control data.
    let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
    header.msg_iov = list.as_mut_ptr();
    header.msg_iovlen = list.len();
    header
}

/// One recvmsg(2) without blocking, first into `head`.
pub(super) fn receive(
    fd: BorrowedFd<'_>,
    head: &mut [u8],
    slices: &[VolatileSlice<'_>],
) -> io::Result<usize> {
    let mut list = iovecs_after(head.as_mut_ptr(), head.len(), slices);
    let mut header = message(&mut list);
    let flags = libc::MSG_DONTWAIT | libc::MSG_CMSG_CLOEXEC;
    retry(|| {
        // SAFETY: `header` points at `list`, which lives until the call returns and describes
        // `head`, borrowed for as long, and memory that `slices` keeps mapped. No control buffer: descriptors sent along are
        // dropped.
        count_of(unsafe { libc::recvmsg(fd.as_raw_fd(), &raw mut header, flags) })
    })
}

/// One sendmsg(2) without blocking and without SIGPIPE, `head` first.
pub(super) fn send(fd: BorrowedFd<'_>, head: &[u8], slices: &[VolatileSlice<'_>]) -> io::Result<usize> {
    let mut list = iovecs_after(head.as_ptr().cast_mut(), head.len(), slices);
    let header = message(&mut list);
    let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
    retry(|| {
        // SAFETY: as in `receive`; the kernel only reads from the memory.
        count_of(unsafe { libc::sendmsg(fd.as_raw_fd(), &raw const header, flags) })
    })
}
