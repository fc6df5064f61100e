#![allow(unsafe_code)] // fork, and what the child does before it is a process of its own
//! A copy of this process at its quiescent point, made by the kernel: the child has guest memory as it was, and this
//! process goes on at once.
//!
//! # What the child may do, and why that is sound
//!
//! After fork(2) in a process with several threads, the child has the forking thread alone, and every lock that another thread held
//! stays held for ever. Here none is held by another thread:
//!
//! * vCPU threads are parked. [`crate::vcpu::VcpuHandle::wait`] has seen `Parked` under the mutex with which a vCPU
//!   thread then waits on its condition variable, so the thread has given the mutex up and is on its way into, or in, futex(2):
//!   it holds no device's lock, no lock of the log, and is not in the allocator. It can be woken by this thread only; a kick
//!   that is late runs a signal handler that stores one byte.
//! * Threads that settle or merge layers of disks (`control::disk_work`) may hold locks of those, which the child leaves alone, and none
//!   of the log.
//! * The forking thread is the event loop, between two rounds. It holds no lock when it calls [`split`].
//! * glibc's own locks (allocator, stdio) are taken before and given back on both sides of fork(), so the allocator works in the child
//!   whatever other threads there are (`spore-vmm run` has one for the terminal).
//!
//! So the child may allocate, make system calls, start threads, and use its copy of whatever the caller's closure owns. It must not
//! touch the KVM VM (which belongs to the other process's memory; one of its own it may make), drop what it has inherited
//! (a device's drop would act on shared descriptors), or return: it ends by `_exit`. It may log if its role has a log, which is for
//! processes that obey a control socket alone: in `run` the terminal's thread may be at standard error. A panic ends it too, with status
//! 101; without a log the hook's message goes nowhere, as standard error is closed.
//!
//! The mappings of KVM's run pages are not inherited (`vm::kvm` marks them MADV_DONTFORK): through them the child would keep the VM
//! alive. Descriptors are closed down to those that the caller lists, before anything else.

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::panic::AssertUnwindSafe;
use std::time::Duration;

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

/// Exit status of a child that panicked.
const PANICKED: i32 = 101;
/// After its deadline a child has so long to say so before the kernel ends it.
const GRACE: Duration = Duration::from_secs(2);

/// A child of ours, seen from the process that goes on.
#[derive(Debug)]
pub struct Child {
    pid: libc::pid_t,
    /// Readable when it has ended.
    pidfd: OwnedFd,
}

impl Child {
    pub fn pid(&self) -> u32 {
        self.pid.unsigned_abs()
    }

    /// Another descriptor that is readable when it has ended.
    pub fn pidfd(&self) -> io::Result<OwnedFd> {
        self.pidfd.try_clone()
    }
}

/// What a child is to be.
#[derive(Debug, Clone, Copy)]
pub struct Role<'a> {
    /// What ps(1) calls it.
    pub name: &'static CStr,
    /// The descriptors that it has.
    pub keep: &'a [RawFd],
    /// What its standard streams are, one of `keep`, where it is closed then. None: it has none, and must not log.
    pub log: Option<RawFd>,
    /// When it should be done; [`GRACE`] after that the kernel ends it (SIGALRM).
    pub patience: Option<Duration>,
}

/// Forks. The child closes every descriptor but those of its role, runs `work`, and ends with the status that it returns.
///
/// # Errors
/// Without a child, when the process has no room for one.
///
/// # Safety
/// The process is at its quiescent point as the module describes it, and `work` does only what it allows.
pub unsafe fn split(role: Role<'_>, work: impl FnOnce() -> i32) -> io::Result<Child> {
    let mut kept = role.keep.to_vec();
    kept.sort_unstable();
    // SAFETY: by the function's contract.
    match unsafe { libc::fork() } {
        -1 => Err(io::Error::last_os_error()),
        0 => {
            close_others(&kept);
            become_one(role);
            let status = std::panic::catch_unwind(AssertUnwindSafe(work)).unwrap_or(PANICKED);
            // SAFETY: ends the process without running anything that it inherited.
            unsafe { libc::_exit(status) }
        }
        pid => follow(pid),
    }
}

fn follow(pid: libc::pid_t) -> io::Result<Child> {
    // SAFETY: a system call on a number. The child is ours and not waited for, so the number is its own.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    match RawFd::try_from(fd) {
        // SAFETY: a new descriptor, which nobody else knows.
        Ok(fd) if fd >= 0 => Ok(Child { pid, pidfd: unsafe { OwnedFd::from_raw_fd(fd) } }),
        _ => {
            let error = io::Error::last_os_error();
            // SAFETY: as above; the child is ended and waited for, so nothing of it is left.
            unsafe {
                libc::kill(pid, libc::SIGKILL);
                libc::waitpid(pid, std::ptr::null_mut(), 0);
            }
            Err(error)
        }
    }
}

/// In the child: closes all descriptors but `kept`, which is sorted.
fn close_others(kept: &[RawFd]) {
    let mut first: libc::c_uint = 0;
    for &fd in kept {
        let Ok(fd) = libc::c_uint::try_from(fd) else { continue };
        if fd > first {
            close_range(first, fd - 1);
        }
        first = fd + 1;
    }
    close_range(first, libc::c_uint::MAX);
}

fn close_range(first: libc::c_uint, last: libc::c_uint) {
    // SAFETY: in the child these numbers belong to objects that are never dropped or used again.
    unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) };
}

/// In the child: takes its name, its standard streams, and a timer by which the kernel ends it, whatever it waits for. Its parent's
/// timer is not inherited (setitimer(2)).
fn become_one(role: Role<'_>) {
    // SAFETY: the child's own descriptors and name; what had the standard streams' numbers is closed.
    unsafe {
        libc::prctl(libc::PR_SET_NAME, role.name.as_ptr());
        if let Some(log) = role.log {
            for stream in 0..3 {
                libc::dup2(log, stream);
            }
            libc::close(log);
        }
    }
    let Some(patience) = role.patience.map(|patience| patience + GRACE) else { return };
    let seconds = libc::time_t::try_from(patience.as_secs()).unwrap_or(libc::time_t::MAX);
    let zero = libc::timeval { tv_sec: 0, tv_usec: 0 };
    let value = libc::timeval { tv_sec: seconds, tv_usec: patience.subsec_micros().into() };
    let timer = libc::itimerval { it_interval: zero, it_value: value };
    // SAFETY: the child's own signals and timer; the set is initialised before it is used.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut set);
        libc::sigaddset(&raw mut set, libc::SIGALRM);
        libc::signal(libc::SIGALRM, libc::SIG_DFL);
        libc::sigprocmask(libc::SIG_UNBLOCK, &raw const set, std::ptr::null_mut());
        libc::setitimer(libc::ITIMER_REAL, &raw const timer, std::ptr::null_mut());
    }
}

/// How a child ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    Status(i32),
    Signal(i32),
}

/// The children that have not ended. Owned by the event loop, which watches the descriptor and never waits.
#[derive(Debug)]
pub struct Children {
    epoll: Epoll,
    list: Vec<Child>,
}

impl Children {
    pub fn new() -> io::Result<Self> {
        Ok(Self { epoll: Epoll::new()?, list: Vec::new() })
    }

    pub fn len(&self) -> usize {
        self.list.len()
    }

    pub fn is_empty(&self) -> bool {
        self.list.is_empty()
    }

    /// Takes a child on. One that cannot be watched is found at the next one's end.
    pub fn add(&mut self, child: Child) -> io::Result<()> {
        let event = EpollEvent::new(EventSet::IN, u64::from(child.pid()));
        let watched = self.epoll.ctl(ControlOperation::Add, child.pidfd.as_raw_fd(), event);
        self.list.push(child);
        watched
    }

    /// Children that have ended since, with how.
    pub fn reap(&mut self) -> Vec<(u32, Ended)> {
        let mut ended = Vec::new();
        self.list.retain(|child| match wait(child) {
            Some(how) => {
                ended.push((child.pid(), how));
                false
            }
            None => true,
        });
        ended
    }
}

impl AsRawFd for Children {
    fn as_raw_fd(&self) -> RawFd {
        self.epoll.as_raw_fd()
    }
}

/// How a child ended, without waiting for it.
fn wait(child: &Child) -> Option<Ended> {
    let mut status = 0;
    // SAFETY: a child of ours that was not waited for yet; the status is ours.
    match unsafe { libc::waitpid(child.pid, &raw mut status, libc::WNOHANG) } {
        0 => None,
        pid if pid == child.pid && libc::WIFSIGNALED(status) => Some(Ended::Signal(libc::WTERMSIG(status))),
        pid if pid == child.pid => Some(Ended::Status(libc::WEXITSTATUS(status))),
        // Somebody else waited for it, as a handler for SIGCHLD might: it is gone.
        _ => Some(Ended::Status(0)),
    }
}

/// A file that the child may use by number after [`split`]; the number must have been in `keep`.
///
/// # Safety
/// In the child only: the descriptor is open, and nobody else there owns it.
pub unsafe fn inherited(fd: RawFd) -> File {
    // SAFETY: by the function's contract.
    unsafe { File::from_raw_fd(fd) }
}

#[cfg(test)]
mod tests;
