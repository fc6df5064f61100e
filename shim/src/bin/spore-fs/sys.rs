#![allow(unsafe_code)] // System calls that no library wraps safely.
//! The few system calls that neither nix nor rustix has, or that have to be made on a borrowed
//! descriptor.

use std::fs::File;
use std::io;
use std::mem::ManuallyDrop;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd};

use fuse_backend_rs::abi::fuse_abi::statvfs64;

/// SECBIT_NO_SETUID_FIXUP (capabilities(7)): capabilities do not change with the user id.
const NO_SETUID_FIXUP: libc::c_ulong = 1 << 2;

pub(crate) fn no_setuid_fixup() -> nix::Result<()> {
    // SAFETY: takes integers only.
    nix::Error::result(unsafe { libc::prctl(libc::PR_SET_SECUREBITS, NO_SETUID_FIXUP, 0, 0, 0) }).map(drop)
}

/// A file as an interface wants it that takes files by value; the descriptor stays the owner's.
pub(crate) fn lend(file: &File) -> ManuallyDrop<File> {
    // SAFETY: the descriptor is open for as long as `file` is borrowed by the caller, and never
    // closed through the result.
    ManuallyDrop::new(unsafe { File::from_raw_fd(file.as_raw_fd()) })
}

pub(crate) fn statvfs(fd: BorrowedFd<'_>) -> io::Result<statvfs64> {
    // SAFETY: all zeroes is a valid statvfs64, which has integers only.
    let mut status: statvfs64 = unsafe { std::mem::zeroed() };
    // SAFETY: the descriptor is open, and `status` is a statvfs64 to write to.
    match unsafe { libc::fstatvfs64(fd.as_raw_fd(), &raw mut status) } {
        0 => Ok(status),
        _ => Err(io::Error::last_os_error()),
    }
}
