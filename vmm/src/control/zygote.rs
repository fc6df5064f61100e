#![allow(unsafe_code)] // forks, in a process of one thread
//! A zygote: a process that was forked off a VMM at its quiescent point, and keeps the VM as it was then. VMMs are forked off
//! it, each with the VM's memory, which they share until they write, and each called by a control socket of its own.
//!
//! It has one thread and three descriptors beside the standard streams: its control socket, and while it forks the two that the new
//! VMM gets.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::server::{self, ServeError};
use super::socket::SocketError;
use super::{Channel, FdTable, Incoming};
use crate::api::{Call, Failure, FailureCode, ForkConfig, Reply, Request};
use crate::config::{Ends, fork_target};
use crate::fork::{self, Child, Children, Ended, Role};
use crate::vm::{Inherited, StateError, Taken, Vm};
use crate::{clock, log};

/// Forks a zygote off a paused VM.
pub(super) fn start(vm: &mut Vm, ends: &Ends, patience: Duration) -> Result<Taken, StateError> {
    let numbers = [ends.control.as_raw_fd(), ends.log.as_raw_fd()];
    let deadline = Instant::now() + patience;
    let role = Role { name: c"zygote", keep: &numbers, log: Some(numbers[1]), patience: Some(patience) };
    vm.split(role, |inherited| {
        status(Channel::inherit(numbers[0]).and_then(|channel| serve(&channel, inherited, deadline)))
    })
}

/// How a process that obeys a control socket ends.
fn status<E: std::fmt::Display>(served: Result<(), E>) -> i32 {
    match served {
        Ok(()) => 0,
        Err(error) => {
            log::error("main", format_args!("{error}"));
            1
        }
    }
}

/// Forks until the peer hangs up, or the deadline.
fn serve(channel: &Channel, inherited: Inherited, deadline: Instant) -> Result<(), SocketError> {
    let mut inherited = Some(inherited);
    let mut children = Children::new().map_err(SocketError::Receive)?;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            log::warn("zygote", format_args!("its time is over; what was forked off it goes on"));
            return Ok(());
        }
        wait(channel, &children, left)?;
        reap(&mut children);
        channel.flush()?;
        match channel.receive()? {
            Incoming::Request(Request { id, call: Call::Fork(config) }, fds) => {
                match fork_one(&config, fds, &mut inherited, &mut children) {
                    Ok((pid, pidfd)) => channel.respond_with(id, Reply::Forked { pid }, pidfd)?,
                    Err(failure) => channel.respond(id, Err(failure))?,
                }
            }
            Incoming::Request(Request { id, .. }, _) => {
                let message = "a zygote serves Fork alone; this call is for the VMMs that are forked off it";
                let failure = Failure { code: FailureCode::WrongState, message: message.to_owned() };
                channel.respond(id, Err(failure))?;
            }
            Incoming::Bad(error) => channel.respond(error.id(), Err(error.failure()))?,
            Incoming::Nothing => {}
            Incoming::HungUp => return Ok(()),
        }
    }
}

/// Waits for a request, room for an answer, or a child's end.
fn wait(channel: &Channel, children: &Children, patience: Duration) -> Result<(), SocketError> {
    let mut events = PollFlags::POLLIN;
    events.set(PollFlags::POLLOUT, channel.has_waiting());
    // SAFETY: the descriptor lives as long as the borrow of its owner.
    let ended = unsafe { BorrowedFd::borrow_raw(children.as_raw_fd()) };
    let mut fds = [PollFd::new(channel.as_fd(), events), PollFd::new(ended, PollFlags::POLLIN)];
    match poll(&mut fds, PollTimeout::try_from(patience).unwrap_or(PollTimeout::MAX)) {
        Ok(_) | Err(nix::Error::EINTR) => Ok(()),
        Err(error) => Err(SocketError::Receive(error.into())),
    }
}

fn reap(children: &mut Children) {
    for (pid, ended) in children.reap() {
        if ended != Ended::Status(0) {
            log::warn("zygote", format_args!("the VMM {pid} that was forked off has ended: {ended:?}"));
        }
    }
}

/// Forks one VMM: its process id, and a descriptor of it.
fn fork_one(
    config: &ForkConfig,
    fds: FdTable,
    inherited: &mut Option<Inherited>,
    children: &mut Children,
) -> Result<(u32, OwnedFd), Failure> {
    let ends = fork_target(config, fds)?;
    let unfit =
        |what, error| Failure { code: FailureCode::HostUnfit, message: format!("fork: {what}: {error}") };
    let child = split(&ends, inherited).map_err(|error| unfit("a process", error))?;
    let (pid, pidfd) = (child.pid(), child.pidfd());
    if let Err(error) = children.add(child) {
        log::warn("zygote", format_args!("watching the VMM {pid}: {error}"));
    }
    // Without the descriptor the peer closes the other end of the control socket, and the VMM ends.
    Ok((pid, pidfd.map_err(|error| unfit("a descriptor of the process", error))?))
}

/// In the child there is one VM to be made of what was inherited; the zygote keeps its own.
fn split(ends: &Ends, inherited: &mut Option<Inherited>) -> io::Result<Child> {
    let numbers = [ends.control.as_raw_fd(), ends.log.as_raw_fd()];
    let role = Role { name: c"spore-vmm", keep: &numbers, log: Some(numbers[1]), patience: None };
    let work = || {
        let start = clock::monotonic_ns();
        let served = Channel::inherit(numbers[0])
            .map_err(ServeError::from)
            .and_then(|channel| server::serve(channel, start, inherited.take()));
        status(served.map(drop))
    };
    // SAFETY: a zygote has this thread alone and no VM of KVM, so it is always at its quiescent point.
    unsafe { fork::split(role, work) }
}
