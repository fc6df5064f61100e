//! Zygotes in a test's words: fork one off a VM, and VMMs off it.

use std::fs::File;
use std::os::fd::AsFd;

use spore_vmm::api::{
    Call, CapturedDisk, Failure, FdIndex, ForkConfig, Message, NextLayer, Reply, Request, SnapshotTimes,
    ZygoteConfig,
};

use crate::control::{Control, Received};
use crate::process::Process;
use crate::{DEADLINE, Vm};

/// A zygote. Dropped, it ends.
pub struct Zygote {
    pub times: SnapshotTimes,
    pub disks: Vec<CapturedDisk>,
    control: Control,
    next_id: u64,
}

impl Vm {
    /// Forks a zygote; the disks go on in these files. `name` is what its disks' settling is told by.
    pub fn zygote(&mut self, name: &str, disks: &[(&str, &File)]) -> Result<Zygote, Failure> {
        let deadline_ms = u64::try_from(DEADLINE.as_millis()).unwrap_or(u64::MAX);
        self.zygote_until(name, disks, deadline_ms)
    }

    /// As [`Self::zygote`], for so many milliseconds.
    pub fn zygote_until(
        &mut self,
        name: &str,
        disks: &[(&str, &File)],
        deadline_ms: u64,
    ) -> Result<Zygote, Failure> {
        let (control, theirs) = Control::pair().expect("a socket pair can be made");
        let log = tempfile::tempfile().expect("a temporary file can be made");
        let config = ZygoteConfig {
            control: FdIndex(0),
            log: FdIndex(1),
            layer_id: name.to_owned(),
            deadline_ms,
            disks: (2u32..)
                .zip(disks)
                .map(|(at, (serial, _))| NextLayer { serial: (*serial).to_owned(), file: FdIndex(at) })
                .collect(),
        };
        let mut fds = vec![theirs.as_fd(), log.as_fd()];
        fds.extend(disks.iter().map(|(_, file)| file.as_fd()));
        match self.call_with(Call::Zygote(config), &fds)? {
            Reply::Snapshotted { times, disks } => Ok(Zygote { times, disks, control, next_id: 1 }),
            other => panic!("Zygote: {other:?}"),
        }
    }
}

impl Zygote {
    /// Forks a VMM, which waits for `Restore`.
    ///
    /// # Panics
    /// When the zygote refuses.
    #[must_use]
    pub fn fork(&mut self) -> Vm {
        let folder = tempfile::tempdir().expect("a temporary folder can be made");
        let path = folder.path().join("vmm.log");
        let log = File::create(&path).expect("the log can be made");
        let (control, theirs) = Control::pair().expect("a socket pair can be made");
        let config = ForkConfig { control: FdIndex(0), log: FdIndex(1) };
        let (reply, mut fds) = self.call(Call::Fork(config), &[theirs.as_fd(), log.as_fd()]);
        let Ok(Reply::Forked { pid }) = reply else { panic!("Fork: {reply:?}") };
        let pidfd = fds.pop().expect("a pidfd comes with the answer");
        Vm::with(control, Process::Forked { pid, pidfd }, path, folder)
    }

    /// One request and its answer.
    ///
    /// # Panics
    /// When no answer comes.
    pub fn call(
        &mut self,
        call: Call,
        fds: &[std::os::fd::BorrowedFd<'_>],
    ) -> (Result<Reply, Failure>, Vec<std::os::fd::OwnedFd>) {
        let id = self.next_id;
        self.next_id += 1;
        self.control.send(&Request { id, call }, fds).expect("the zygote's socket is open");
        match self.control.receive(DEADLINE).expect("the zygote sends JSON") {
            Received::Packet(Message::Response { id: found, result }, fds) if found == id => (result, fds),
            other => panic!("{other:?} instead of an answer"),
        }
    }

    /// Ends it, and waits until its source knows.
    pub fn end(self, source: &mut Vm) -> Result<(), Failure> {
        drop(self.control);
        loop {
            match source.call(Call::Metrics)? {
                Reply::Metrics(metrics) if metrics.snapshots.writing > 0 => {}
                _ => return Ok(()),
            }
        }
    }

    /// Waits until it has closed its socket.
    ///
    /// # Panics
    /// When it says something, or goes on.
    pub fn closed(&mut self) {
        let last = self.control.receive(DEADLINE).expect("the zygote sends JSON");
        assert!(matches!(last, Received::Closed), "{last:?}");
    }
}
