//! A copy of a VM that waits, with its memory and state as they were, and off which VMMs are forked: clones of the VM of
//! which nothing is written.

use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use slog::{Logger, info};
use spore_vmm::api::{Call, FdIndex, ForkConfig, Reply, SnapshotTimes, ZygoteConfig};
use tokio::sync::mpsc;

use super::control::{self, CallError, Control};
use super::end::Process;
use super::snapshot::{Attached, Copied, Then};
use super::{CALL_DEADLINE, VMM_LOG, Vm, VmError, file_name, stuck, unexpected};
use crate::config::Machine;
use crate::process::{self, ProcessId};
use crate::rundir::RunDir;
use crate::volumes::SavedVolumes;

/// Where all of a sandbox's zygotes log.
const LOG: &str = "zygotes.log";
/// A zygote may live no longer than this, whoever has forgotten it.
const MOST: Duration = Duration::from_secs(3600);

/// See the module. It ends when this is dropped; what was forked off it goes on.
pub(crate) struct Zygote {
    /// How long it held the VM up.
    pub(crate) times: SnapshotTimes,
    /// What the VM's guest knows of the host's files, if it has some.
    pub(crate) volumes: Option<SavedVolumes>,
    control: Control,
}

impl Copied for Zygote {
    fn parts(&mut self) -> (&mut SnapshotTimes, &mut Option<SavedVolumes>) {
        (&mut self.times, &mut self.volumes)
    }
}

impl Vm {
    /// Forks a zygote of this VM, which goes on, its writable disks, by serial, in these empty files. `name` is like no
    /// layer's. Failures are as of [`Self::save`].
    pub(crate) async fn zygote(&self, name: &str, disks: &[(&str, &File)]) -> Result<Zygote, VmError> {
        self.at_rest(Then::GoOn, self.split(name, disks)).await
    }

    async fn split(&self, name: &str, disks: &[(&str, &File)]) -> Result<Zygote, VmError> {
        let operation = "fork a zygote";
        let host = |source| VmError::Host { operation, source };
        let (ours, theirs) = control::pair().map_err(host)?;
        let log = self.dir.append_file(LOG).map_err(host)?;
        let mut fds = Attached::default();
        let call = Call::Zygote(ZygoteConfig {
            control: fds.add(&theirs),
            log: fds.add(&log),
            layer_id: name.into(),
            deadline_ms: u64::try_from(MOST.as_millis()).unwrap_or(u64::MAX),
            disks: fds.next_layers(disks),
        });
        // A zygote says nothing unasked.
        let (events, _) = mpsc::unbounded_channel();
        let control = Control::new(ours, events).map_err(host)?;
        match self.call(operation, call, &fds.0).await? {
            Reply::Snapshotted { times, .. } => {
                info!(self.log, "a zygote is forked"; "zygote" => times.pid, "pause_us" => times.pause_ns / 1000,
                    "save_us" => times.save_ns / 1000, "fork_us" => times.fork_ns / 1000);
                Ok(Zygote { times, volumes: None, control })
            }
            other => Err(unexpected(operation, &other)),
        }
    }

    /// The VM of a VMM that was forked off a zygote: what a spawned one is, but nobody's child here. `control` is our end
    /// of its socket. It is moved to this process's cgroup, for it was born in that of the zygote's.
    pub(crate) fn forked(
        (pidfd, control): (OwnedFd, OwnedFd),
        machine: &Machine,
        dir: Arc<RunDir>,
        questions: mpsc::Sender<OwnedFd>,
        log: Logger,
    ) -> Result<Self, VmError> {
        let host = |operation| move |source| VmError::Host { operation, source };
        let pid = process::pid_of(&pidfd).map_err(host("find the forked process"))?;
        let id = ProcessId::of(pid).map_err(host("find the forked process"))?;
        let process = (Process::Forked(pid), pidfd, id);
        if let Err(error) = process::join_cgroup(pid) {
            slog::warn!(log, "the VMM stays in the cgroup of the machine that it is a clone of"; "vmm" => pid, "error" => %error);
        }
        Self::of(process, control, machine.clone(), dir, questions, 0, log)
    }
}

/// What a VMM that is to be forked off a zygote gets: our end of its control socket, its own, and its log.
pub(crate) fn outfit(dir: &RunDir) -> Result<(OwnedFd, OwnedFd, File), VmError> {
    let host = |operation| move |source| VmError::Host { operation, source };
    let (ours, theirs) = control::pair().map_err(host("make the control socket"))?;
    let log = dir.create_file(&file_name(VMM_LOG, 0)).map_err(host("create the VMM's log"))?;
    Ok((ours, theirs, log))
}

impl Zygote {
    /// Forks a VMM, which waits for a restore without files; a descriptor of its process.
    pub(crate) async fn fork(&self, control: &OwnedFd, log: &OwnedFd) -> Result<OwnedFd, VmError> {
        let operation = "fork a clone off the zygote";
        let call = Call::Fork(ForkConfig { control: FdIndex(0), log: FdIndex(1) });
        let fds = [control.as_raw_fd(), log.as_raw_fd()];
        let refused = |message| VmError::Refused { operation, message };
        match tokio::time::timeout(CALL_DEADLINE, self.control.exchange(call, &fds)).await {
            Err(_) => Err(stuck(operation)),
            Ok(Ok((Reply::Forked { .. }, mut fds))) if fds.len() == 1 => {
                fds.pop().ok_or_else(|| refused("no process".into()))
            }
            Ok(Ok((other, _))) => Err(unexpected(operation, &other)),
            Ok(Err(CallError::Refused(failure))) => Err(refused(failure.message)),
            Ok(Err(CallError::Closed)) => Err(refused("the zygote has ended; clone again".into())),
            Ok(Err(CallError::Io(source))) => Err(VmError::Host { operation, source }),
        }
    }
}
