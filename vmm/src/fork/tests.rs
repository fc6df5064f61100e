use std::io::{Read, Write};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::os::fd::{AsFd, BorrowedFd};

use super::*;

const PATIENCE: Duration = Duration::from_secs(30);

fn role(keep: &[RawFd], patience: Duration) -> Role<'_> {
    Role { name: c"child", keep, log: None, patience: Some(patience) }
}

/// Waits until `child` has ended.
fn ended(child: Child) -> Ended {
    let mut children = Children::new().unwrap();
    children.add(child).unwrap();
    // SAFETY: borrowed for this line only.
    let fd = unsafe { BorrowedFd::borrow_raw(children.as_raw_fd()) };
    let timeout = PollTimeout::try_from(PATIENCE).unwrap();
    assert_eq!(poll(&mut [PollFd::new(fd, PollFlags::POLLIN)], timeout), Ok(1));
    let (_, how) = children.reap().pop().unwrap();
    assert!(children.is_empty());
    how
}

#[test]
fn the_child_has_the_listed_descriptors_and_no_others() {
    let (mut reader, writer) = io::pipe().unwrap();
    let other = tempfile::tempfile().unwrap();
    let (kept, closed) = (writer.as_raw_fd(), other.as_raw_fd());
    let work = || {
        // SAFETY: F_GETFD only asks; the writer is ours in the child.
        let mut out = unsafe { inherited(kept) };
        // SAFETY: F_GETFD only asks.
        let open = |fd| unsafe { libc::fcntl(fd, libc::F_GETFD) } >= 0;
        let _ = write!(out, "{} {} {}", open(kept), open(closed), open(2));
        0
    };
    // SAFETY: the closure allocates and writes to a pipe; it takes no lock.
    let child = unsafe { split(role(&[kept], PATIENCE), work) }.unwrap();
    drop(writer);
    let mut said = String::new();
    reader.read_to_string(&mut said).unwrap();
    assert_eq!(said, "true false false");
    assert_eq!(ended(child), Ended::Status(0));
    assert!(other.as_fd().as_raw_fd() == closed);
}

#[test]
fn a_panic_is_an_end_like_another() {
    let work = || panic!("nobody hears this");
    // SAFETY: the panic's hook writes to a closed descriptor.
    let child = unsafe { split(role(&[], PATIENCE), work) }.unwrap();
    assert_eq!(ended(child), Ended::Status(PANICKED));
}

#[test]
fn a_child_that_hangs_is_ended_by_the_kernel() {
    let work = || loop {
        // SAFETY: waits for a signal.
        unsafe { libc::pause() };
    };
    // SAFETY: the closure makes one system call.
    let child = unsafe { split(role(&[], Duration::ZERO), work) }.unwrap();
    assert_eq!(ended(child), Ended::Signal(libc::SIGALRM));
}
