#![allow(unsafe_code)] // pidfd_open has no safe wrapper here.
//! The VMM as a process: its end, its descriptors, its memory.

use std::fs::File;
use std::hash::{DefaultHasher, Hasher};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Child, ExitStatus};
use std::time::Duration;
use std::{fs, io};

use crate::control::wait_readable;

/// A descriptor that becomes readable when process `pid` ends.
pub fn pidfd(pid: u32) -> io::Result<OwnedFd> {
    // SAFETY: plain numbers in, a new descriptor of ours out.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, libc::pid_t::try_from(pid).unwrap_or(-1), 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    let fd = i32::try_from(fd).map_err(io::Error::other)?;
    // SAFETY: see above.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// The process of a VMM under test. Dropped, it is killed.
pub enum Process {
    Ours(Child),
    /// Of a zygote's.
    Forked {
        pid: u32,
        pidfd: OwnedFd,
    },
}

impl Process {
    pub fn id(&self) -> u32 {
        match self {
            Self::Ours(child) => child.id(),
            Self::Forked { pid, .. } => *pid,
        }
    }

    /// Waits for the end; `None` at the deadline. The status is known of our own child only.
    pub fn wait(&mut self, deadline: Duration) -> io::Result<Option<Option<ExitStatus>>> {
        match self {
            Self::Ours(child) => Ok(wait(child, deadline)?.map(Some)),
            Self::Forked { pidfd, .. } => Ok(wait_readable(pidfd.as_fd(), deadline)?.then_some(None)),
        }
    }

    pub fn kill(&mut self) -> io::Result<()> {
        match self {
            Self::Ours(child) => child.kill(),
            Self::Forked { pidfd, .. } => {
                let none = std::ptr::null::<libc::siginfo_t>();
                // SAFETY: a descriptor of ours, numbers, and no pointer.
                let sent = unsafe {
                    libc::syscall(libc::SYS_pidfd_send_signal, pidfd.as_raw_fd(), libc::SIGKILL, none, 0)
                };
                if sent == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
            }
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.kill();
        if let Self::Ours(child) = self {
            let _ = child.wait();
        }
    }
}

/// Waits for a child's end; `None` at the deadline.
pub fn wait(child: &mut Child, deadline: Duration) -> io::Result<Option<ExitStatus>> {
    if let Some(status) = child.try_wait()? {
        return Ok(Some(status));
    }
    let ended = wait_readable(pidfd(child.id())?.as_fd(), deadline)?;
    if ended { child.wait().map(Some) } else { Ok(None) }
}

/// Open descriptors of a process, by what they point to.
pub fn descriptors(pid: u32) -> io::Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(format!("/proc/{pid}/fd"))? {
        // A descriptor may close while we look.
        if let Ok(target) = fs::read_link(entry?.path()) {
            names.push(target.to_string_lossy().into_owned());
        }
    }
    Ok(names)
}

/// Resident KiB of a process outside mappings of at least `guest_mib` MiB, which are the
/// guest's RAM.
pub fn resident_beyond_guest(pid: u32, guest_mib: u64) -> io::Result<u64> {
    let smaps = fs::read_to_string(Path::new("/proc").join(pid.to_string()).join("smaps"))?;
    let kib = |line: &str| line.split_whitespace().nth(1).and_then(|word| word.parse::<u64>().ok());
    let (mut guest, mut resident) = (false, 0);
    for line in smaps.lines() {
        if line.starts_with("Size:") {
            guest = kib(line).is_some_and(|size| size >= guest_mib * 1024);
        } else if line.starts_with("Rss:") && !guest {
            resident += kib(line).unwrap_or(0);
        }
    }
    Ok(resident)
}

/// Resident KiB of a process that are no file's: of a VMM, mostly what its guest has touched.
pub fn resident_anonymous(pid: u32) -> io::Result<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:"));
    line.and_then(|line| line.trim().strip_suffix(" kB")?.parse().ok())
        .ok_or_else(|| io::Error::other("no RssAnon in the process's status"))
}

/// KiB of a process in huge pages that are no file's.
pub fn resident_huge(pid: u32) -> io::Result<u64> {
    let smaps = fs::read_to_string(format!("/proc/{pid}/smaps_rollup"))?;
    let line = smaps.lines().find_map(|line| line.strip_prefix("AnonHugePages:"));
    line.and_then(|line| line.trim().strip_suffix("kB")?.trim().parse().ok())
        .ok_or_else(|| io::Error::other("no AnonHugePages in the process's mappings"))
}

/// A digest of all mappings of at least `guest_mib` MiB, which are the guest's RAM.
pub fn guest_memory_digest(pid: u32, guest_mib: u64) -> io::Result<u64> {
    let folder = Path::new("/proc").join(pid.to_string());
    let (maps, memory) = (fs::read_to_string(folder.join("maps"))?, File::open(folder.join("mem"))?);
    let mut digest = DefaultHasher::new();
    let mut chunk = vec![0; 1 << 20];
    for line in maps.lines() {
        let range = line.split_once(' ').and_then(|(range, _)| range.split_once('-'));
        let number = |text: &str| u64::from_str_radix(text, 16).map_err(io::Error::other);
        let Some((start, end)) = range else { continue };
        let (start, end) = (number(start)?, number(end)?);
        if end - start < guest_mib << 20 {
            continue;
        }
        // The guest's size is in whole MiB; a merged neighbour may leave a rest.
        for at in (start..end - end % 0x1000).step_by(chunk.len()) {
            let length = chunk.len().min(usize::try_from(end - at).unwrap_or(usize::MAX));
            memory.read_exact_at(&mut chunk[..length], at)?;
            digest.write(&chunk[..length]);
        }
    }
    Ok(digest.finish())
}
