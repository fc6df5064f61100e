#![allow(unsafe_code)] // System calls that nix lacks or wraps too tightly (real-time signals).

//! The few system calls that need `unsafe`, each behind a safe function.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use nix::errno::Errno;
use nix::libc;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// How a child ended, as a shell counts it: the exit code, or 128 + the signal's number.
pub type ExitStatus = u32;

/// Reaps one ended child if there is one. nix's `waitpid` fails on a child that a
/// real-time signal killed, after having reaped it; this one does not.
pub fn reap_one() -> Option<(i32, ExitStatus)> {
    loop {
        let mut status = 0;
        // SAFETY: `status` outlives the call.
        let pid = unsafe { libc::waitpid(-1, &mut status, libc::WNOHANG) };
        match pid {
            0 => return None,
            -1 if Errno::last() == Errno::EINTR => {}
            -1 => return None,
            pid => return Some((pid, exit_status(status))),
        }
    }
}

/// Decodes a wait status.
pub fn exit_status(status: i32) -> ExitStatus {
    let code =
        if libc::WIFSIGNALED(status) { 128 + libc::WTERMSIG(status) } else { libc::WEXITSTATUS(status) };
    code.unsigned_abs()
}

/// Sends any signal, real-time ones included.
pub fn kill(pid: i32, signal: i32) -> Result<(), Errno> {
    // SAFETY: no memory is involved.
    Errno::result(unsafe { libc::kill(pid, signal) }).map(drop)
}

/// Gives every signal its default disposition and unblocks all. For a process about to
/// execve: the Rust runtime ignores SIGPIPE, and an ignored signal survives execve.
pub fn default_signals() {
    for signal in 1..=libc::SIGRTMAX() {
        // SAFETY: SIG_DFL is a valid disposition; signals that cannot be set give EINVAL.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
    }
    // SAFETY: a zeroed sigset_t is initialised by sigemptyset before use.
    unsafe {
        let mut none: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&mut none);
        libc::sigprocmask(libc::SIG_SETMASK, &none, std::ptr::null_mut());
    }
}

/// libc's constant of this name does not fit its type.
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

/// Forks a child that is born in the cgroup whose directory is given, as a child of the
/// caller's parent. 0 in the child, its pid in the caller.
///
/// The caller must have one thread only, or the child may find locks held by threads that it
/// does not have.
pub fn fork_sibling_into(cgroup: BorrowedFd<'_>) -> Result<i32, Errno> {
    // SAFETY: clone_args is plain data; all zeroes is valid.
    let mut args: libc::clone_args = unsafe { std::mem::zeroed() };
    // With CLONE_PARENT the signal at the end is the caller's own, and must be left 0.
    args.flags = u64::from(libc::CLONE_PARENT.cast_unsigned()) | CLONE_INTO_CGROUP;
    args.cgroup = u64::from(cgroup.as_raw_fd().unsigned_abs());
    // SAFETY: without CLONE_VM and with no stack this is fork(2); `args` outlives the call, and
    // its size is passed.
    let pid = unsafe { libc::syscall(libc::SYS_clone3, &args, size_of_val(&args)) };
    Errno::result(pid).map(|pid| i32::try_from(pid).unwrap_or(i32::MAX))
}

/// A descriptor of a process that stays that process's.
pub fn pidfd_open(pid: i32) -> Result<OwnedFd, Errno> {
    // SAFETY: no memory is involved; the descriptor is new and owned from here on.
    unsafe {
        let fd = Errno::result(libc::syscall(libc::SYS_pidfd_open, pid, 0))?;
        Ok(OwnedFd::from_raw_fd(i32::try_from(fd).unwrap_or(-1)))
    }
}

/// Lets no descriptor but the standard streams survive execve.
pub fn close_rest_on_exec() {
    // SAFETY: only flags of this process's descriptors change. It cannot fail with these
    // arguments on the kernels that Spore's guests have (5.11 and newer), unless a seccomp filter
    // forbids it: it is called before there is one.
    unsafe { libc::syscall(libc::SYS_close_range, 3u32, u32::MAX, libc::CLOSE_RANGE_CLOEXEC) };
}

/// Makes a terminal the controlling one of the calling session leader.
pub fn take_terminal(terminal: BorrowedFd<'_>) -> Result<(), Errno> {
    // SAFETY: no memory is involved.
    Errno::result(unsafe { libc::ioctl(terminal.as_raw_fd(), libc::TIOCSCTTY, 0) }).map(drop)
}

/// Lets the other end of a new pseudo-terminal be opened.
pub fn unlock_terminal(master: BorrowedFd<'_>) -> Result<(), Errno> {
    let unlock: libc::c_int = 0;
    // SAFETY: TIOCSPTLCK reads one int, which outlives the call.
    Errno::result(unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCSPTLCK, &unlock) }).map(drop)
}

/// Ends the calling process at once, without running anything that it inherited.
pub fn exit_now(status: i32) -> ! {
    // SAFETY: it does not return.
    unsafe { libc::_exit(status) }
}

/// IFF_UP in the width of ifr_flags.
const UP: libc::c_short = 1;

/// Brings the loopback interface of the calling thread's network namespace up.
pub fn loopback_up() -> io::Result<()> {
    // SAFETY: no memory is involved; the descriptor is owned from here on.
    let socket = unsafe {
        let fd = libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0);
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        OwnedFd::from_raw_fd(fd)
    };
    // SAFETY: ifreq is plain data; all zeroes is valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(b"lo") {
        *to = from.cast_signed();
    }
    // SAFETY: `request` is an ifreq, as both calls expect, and outlives them; the flags
    // member is the one that SIOCGIFFLAGS fills.
    unsafe {
        if libc::ioctl(socket.as_raw_fd(), libc::SIOCGIFFLAGS as _, &mut request) < 0 {
            return Err(io::Error::last_os_error());
        }
        request.ifr_ifru.ifru_flags |= UP;
        if libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS as _, &request) < 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

/// Feeds the kernel's entropy pool, credited in full, and reseeds at once.
pub fn add_entropy(random: BorrowedFd<'_>, bytes: &[u8]) -> io::Result<()> {
    const RNDADDENTROPY: libc::c_ulong = 0x4008_5203;
    const RNDRESEEDCRNG: libc::c_ulong = 0x5207;
    // struct rand_pool_info: entropy_count (bits), buf_size (bytes), buf[].
    for chunk in bytes.chunks(256) {
        let length = i32::try_from(chunk.len()).map_err(io::Error::other)?;
        let mut info = Vec::with_capacity(8 + chunk.len());
        info.extend_from_slice(&(length * 8).to_ne_bytes());
        info.extend_from_slice(&length.to_ne_bytes());
        info.extend_from_slice(chunk);
        // SAFETY: `info` is a rand_pool_info whose buf_size matches the bytes behind it.
        if unsafe { libc::ioctl(random.as_raw_fd(), RNDADDENTROPY as _, info.as_ptr()) } < 0 {
            return Err(io::Error::last_os_error());
        }
    }
    // SAFETY: takes no argument. Kernels that lack it reseed by themselves a little later.
    unsafe { libc::ioctl(random.as_raw_fd(), RNDRESEEDCRNG as _) };
    Ok(())
}

/// Sets a terminal's size through either end.
pub fn set_window_size(terminal: BorrowedFd<'_>, rows: u16, columns: u16) -> io::Result<()> {
    let size = libc::winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: `size` is the winsize that TIOCSWINSZ reads.
    if unsafe { libc::ioctl(terminal.as_raw_fd(), libc::TIOCSWINSZ, &size) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Opens the other end of a pseudo-terminal from its master, wherever it is mounted.
pub fn terminal_peer(master: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let flags = libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC;
    // SAFETY: TIOCGPTPEER takes open flags by value and returns a new descriptor, owned here.
    unsafe {
        let fd = libc::ioctl(master.as_raw_fd(), libc::TIOCGPTPEER, flags);
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(OwnedFd::from_raw_fd(fd))
    }
}

/// Lets tokio watch a non-blocking descriptor.
pub fn watch(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an OwnedFd is valid and stays the same open descriptor until it is dropped.
    unsafe { AsyncFd::register(fd) }.map_err(Into::into)
}

/// The same for some events only, or for errors too.
pub fn watch_for(fd: OwnedFd, interest: Interest) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an OwnedFd is valid and stays the same open descriptor until it is dropped.
    unsafe { AsyncFd::register_with_interest(fd, interest) }.map_err(Into::into)
}
