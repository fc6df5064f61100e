#![allow(unsafe_code)] // Descriptors from and to the kernel: pidfds, SCM_RIGHTS, readiness.
//! Processes named so that a reused pid cannot be mistaken for them: by pid and start
//! time across our own restarts, by pidfd while they are ours.

use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout};
use serde::{Deserialize, Serialize};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// A process as written to a file: its pid and its start time in clock ticks since boot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ProcessId {
    pub(crate) pid: u32,
    pub(crate) start: u64,
}

impl ProcessId {
    /// Identifies a process that has not been reaped.
    pub(crate) fn of(pid: u32) -> io::Result<Self> {
        Ok(Self { pid, start: stat(pid)?.1 })
    }

    pub(crate) fn this() -> io::Result<Self> {
        Self::of(std::process::id())
    }

    /// Whether that very process still exists (a zombie has ended).
    pub(crate) fn is_alive(self) -> bool {
        stat(self.pid).is_ok_and(|(state, start)| start == self.start && !matches!(state, 'Z' | 'X'))
    }

    /// Kills that very process and waits for its end, at most `deadline`. `Ok(false)` when it
    /// had already ended.
    pub(crate) fn kill(self, deadline: Duration) -> io::Result<bool> {
        let Some(pidfd) = self.pin()? else { return Ok(false) };
        pidfd_kill(&pidfd, libc::SIGKILL)?;
        if ends_within(&pidfd, deadline)? {
            return Ok(true);
        }
        Err(io::Error::new(io::ErrorKind::TimedOut, format!("process {} survives SIGKILL", self.pid)))
    }

    /// Waits for that very process's own end, at most `deadline`.
    pub(crate) fn wait(self, deadline: Duration) -> io::Result<()> {
        match self.pin()? {
            Some(pidfd) => ends_within(&pidfd, deadline).map(drop),
            None => Ok(()),
        }
    }

    /// A descriptor of that very process; `None` when it has ended.
    fn pin(self) -> io::Result<Option<OwnedFd>> {
        match pidfd_open(self.pid) {
            // The pidfd pins whoever has the pid now; only then is the comparison sound.
            Ok(pidfd) => Ok(self.is_alive().then_some(pidfd)),
            Err(error) if error.raw_os_error() == Some(libc::ESRCH) => Ok(None),
            Err(error) => Err(error),
        }
    }
}

fn ends_within(pidfd: &OwnedFd, deadline: Duration) -> io::Result<bool> {
    let timeout = PollTimeout::try_from(deadline).unwrap_or(PollTimeout::MAX);
    let mut poll = [PollFd::new(pidfd.as_fd(), PollFlags::POLLIN)];
    Ok(nix::poll::poll(&mut poll, timeout)? != 0)
}

/// Fields 3 (state) and 22 (start time) of `/proc/<pid>/stat`.
fn stat(pid: u32) -> io::Result<(char, u64)> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let gone = || io::Error::new(io::ErrorKind::NotFound, format!("process {pid} has ended"));
    // The command in parentheses may itself contain spaces and parentheses.
    let fields: Vec<&str> = stat.rsplit_once(')').ok_or_else(gone)?.1.split_whitespace().collect();
    let state = fields.first().and_then(|field| field.chars().next()).ok_or_else(gone)?;
    let start = fields.get(19).and_then(|field| field.parse().ok()).ok_or_else(gone)?;
    Ok((state, start))
}

pub(crate) fn pidfd_open(pid: u32) -> io::Result<OwnedFd> {
    // SAFETY: pidfd_open takes two integers and touches no memory of ours.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, libc::c_long::from(pid), 0) };
    match i32::try_from(fd) {
        // SAFETY: the kernel just returned this descriptor to us alone.
        Ok(fd) if fd >= 0 => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
        _ => Err(io::Error::last_os_error()),
    }
}

pub(crate) fn pidfd_kill(pidfd: &OwnedFd, signal: i32) -> io::Result<()> {
    // SAFETY: the descriptor is open for the duration of the call; a null siginfo is allowed.
    let result = unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            libc::c_long::from(pidfd.as_raw_fd()),
            libc::c_long::from(signal),
            std::ptr::null::<libc::siginfo_t>(),
            0,
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// The process that a descriptor names (`Pid:` of its fdinfo, proc(5)).
pub(crate) fn pid_of(pidfd: &OwnedFd) -> io::Result<u32> {
    let text = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", pidfd.as_raw_fd()))?;
    let pid = text.lines().find_map(|line| line.strip_prefix("Pid:")).and_then(|pid| pid.trim().parse().ok());
    pid.ok_or_else(|| {
        io::Error::new(io::ErrorKind::NotFound, "the process has ended, or is none of this namespace")
    })
}

/// Moves a process to the cgroup (v2) of this one.
pub(crate) fn join_cgroup(pid: u32) -> io::Result<()> {
    let own = std::fs::read_to_string("/proc/self/cgroup")?;
    let path = own.lines().find_map(|line| line.strip_prefix("0::"));
    let path = path.ok_or_else(|| io::Error::other("this process is in no cgroup of version 2"))?;
    std::fs::write(format!("/sys/fs/cgroup{path}/cgroup.procs"), pid.to_string())
}

/// Sets how soon the kernel kills a process when memory runs out: -1000 (never) to 1000 (first).
pub(crate) fn set_oom_score_adj(pid: u32, score: i32) -> io::Result<()> {
    std::fs::write(format!("/proc/{pid}/oom_score_adj"), score.to_string())
}

/// Makes this process a little likelier to be killed for memory than containerd, from which it
/// inherited its score: containerd can come back, and a shim's end costs one sandbox. As
/// runc's shim does.
pub(crate) fn raise_oom_score_adj() -> io::Result<()> {
    let text = std::fs::read_to_string("/proc/self/oom_score_adj")?;
    let inherited: i32 = text.trim().parse().map_err(io::Error::other)?;
    set_oom_score_adj(std::process::id(), inherited.saturating_add(1).min(1000))
}

/// Keeps glibc from one heap arena a thread: the shim's threads allocate little.
pub(crate) fn limit_heap_arenas() {
    // SAFETY: mallopt with a documented parameter; called before any thread exists.
    unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) };
}

/// Lets the runtime tell when a descriptor of ours is ready.
pub(crate) fn watch(fd: OwnedFd, interest: Interest) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an OwnedFd is open, always answers the same number, and the AsyncFd owns it
    // from here on.
    unsafe { AsyncFd::register_with_interest(fd, interest) }.map_err(io::Error::from)
}

/// How many bytes a pipe holds.
pub(crate) fn readable_bytes(pipe: &impl AsRawFd) -> io::Result<u64> {
    let mut count: libc::c_int = 0;
    // SAFETY: FIONREAD writes one int to the address given, which is ours.
    let result = unsafe { libc::ioctl(pipe.as_raw_fd(), libc::FIONREAD, &raw mut count) };
    if result == 0 { Ok(u64::try_from(count).unwrap_or(0)) } else { Err(io::Error::last_os_error()) }
}

/// Gives back what starting a sandbox needed and keeping it does not: free heap, and the
/// program's code, which is the page cache's and comes back page by page as it is used.
pub(crate) fn trim_memory() {
    // SAFETY: malloc_trim only releases memory that the allocator has free.
    unsafe { libc::malloc_trim(0) };
    for line in std::fs::read_to_string("/proc/self/maps").unwrap_or_default().lines() {
        let mut fields = line.split_whitespace();
        let (Some(range), Some("r-xp")) = (fields.next(), fields.next()) else { continue };
        if !line.contains('/') {
            continue;
        }
        let bounds = range
            .split_once('-')
            .map(|(from, to)| (usize::from_str_radix(from, 16), usize::from_str_radix(to, 16)));
        if let Some((Ok(from), Ok(to))) = bounds {
            // SAFETY: a private file mapping that is executable and was never writable has
            // no page that differs from the file, so dropping its pages changes nothing.
            unsafe { libc::madvise(from as *mut libc::c_void, to - from, libc::MADV_DONTNEED) };
        }
    }
}

/// Takes ownership of descriptors that the kernel delivered with a message.
pub(crate) fn adopt(fds: Vec<std::os::fd::RawFd>) -> Vec<OwnedFd> {
    // SAFETY: each number was just installed by recvmsg(2) for this call's caller alone.
    fds.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }).collect()
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};
    use std::time::Duration;

    use super::*;

    #[test]
    fn only_the_very_process_is_killed() {
        let mut child = Command::new("sleep").arg("1000").stdout(Stdio::null()).spawn().unwrap();
        let id = ProcessId::of(child.id()).unwrap();
        assert!(id.is_alive());
        let imposter = ProcessId { start: id.start + 1, ..id };
        assert!(!imposter.kill(Duration::from_secs(5)).unwrap());
        assert!(id.is_alive(), "a process with another start time must be left alone");
        assert!(id.kill(Duration::from_secs(5)).unwrap());
        assert!(!id.is_alive());
        child.wait().unwrap();
        assert!(!id.kill(Duration::from_secs(5)).unwrap());
    }

    #[test]
    fn the_oom_score_of_a_process_is_set_and_a_wrong_one_refused() {
        let mut child = Command::new("sleep").arg("1000").stdout(Stdio::null()).spawn().unwrap();
        set_oom_score_adj(child.id(), 777).unwrap();
        let path = format!("/proc/{}/oom_score_adj", child.id());
        assert_eq!(std::fs::read_to_string(path).unwrap().trim(), "777");
        assert!(set_oom_score_adj(child.id(), 1001).is_err());
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(set_oom_score_adj(child.id(), 0).is_err(), "it has ended");
    }
}
