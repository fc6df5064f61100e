//! Snapshots in a test's words: take one, wait for its report, restore it into a new VMM.

use std::fs::File;
use std::io::{PipeReader, Read, pipe};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixListener;

use spore_vmm::api::{
    Call, CapturedDisk, ConsoleConfig, Event, Failure, FdIndex, LayerConfig, NextLayer, PROTOCOL_VERSION,
    Reply, RestoreConfig, RestoredDisk, SnapshotConfig, SnapshotDone, SnapshotReport, SnapshotTimes,
    VsockConfig,
};

use crate::control::wait_readable;
use crate::{Console, DEADLINE, Vm, host};

/// A snapshot that is being written.
pub struct Pending {
    pub times: SnapshotTimes,
    pub disks: Vec<CapturedDisk>,
    pub state: File,
    pub memory: File,
    report: PipeReader,
    layers: Vec<(String, File)>,
    id: String,
}

/// A snapshot.
pub struct Saved {
    pub done: SnapshotDone,
    pub state: File,
    /// All that it needs, by id.
    pub layers: Vec<(String, File)>,
}

/// A file for the next layer of a disk.
///
/// # Panics
/// When none can be made.
#[must_use]
pub fn empty_file() -> File {
    tempfile::tempfile().expect("a temporary file can be made")
}

fn again(file: &File) -> File {
    file.try_clone().expect("a descriptor can be doubled")
}

impl Pending {
    /// What the writer said; `None` if it died without a word.
    ///
    /// # Panics
    /// When it says nothing for too long, or what is no report.
    #[must_use]
    pub fn report(&mut self) -> Option<SnapshotReport> {
        let mut bytes = Vec::new();
        let mut chunk = [0; 4096];
        loop {
            assert!(
                wait_readable(self.report.as_fd(), DEADLINE).expect("a pipe can be waited for"),
                "no report"
            );
            match self.report.read(&mut chunk).expect("a pipe can be read") {
                0 => break,
                length => bytes.extend_from_slice(&chunk[..length]),
            }
        }
        (!bytes.is_empty()).then(|| serde_json::from_slice(&bytes).expect("a report is JSON"))
    }

    /// Waits until it is durable.
    ///
    /// # Panics
    /// When it was not written.
    #[must_use]
    pub fn saved(mut self) -> Saved {
        let report = self.report();
        let Some(SnapshotReport::Done(done)) = report else { panic!("the writer: {report:?}") };
        let mut layers = self.layers;
        layers.push((self.id, self.memory));
        layers.retain(|(id, _)| done.layers.iter().any(|layer| layer.id == *id));
        Saved { done, state: self.state, layers }
    }
}

impl Saved {
    /// A VM to be, which goes on from here.
    #[must_use]
    pub fn restore(&self) -> Restore {
        Restore {
            state: Some(again(&self.state)),
            layers: self.layers.iter().map(|(id, file)| (id.clone(), again(file))).collect(),
            disks: Vec::new(),
            vsock: false,
            huge_pages: false,
        }
    }
}

/// What to restore, and with what.
pub struct Restore {
    /// None: what the VMM was forked with.
    pub state: Option<File>,
    pub layers: Vec<(String, File)>,
    /// From the bottom up, by slot.
    pub disks: Vec<(String, Vec<File>)>,
    pub vsock: bool,
    pub huge_pages: bool,
}

impl Restore {
    /// What a zygote's VMM was forked with.
    #[must_use]
    pub fn inherited() -> Self {
        Self { state: None, layers: Vec::new(), disks: Vec::new(), vsock: false, huge_pages: false }
    }

    #[must_use]
    pub fn disk(self, serial: &str, file: &File) -> Self {
        self.stack(serial, &[file])
    }

    /// A disk of several layers, from the bottom up.
    #[must_use]
    pub fn stack(mut self, serial: &str, layers: &[&File]) -> Self {
        self.disks.push((serial.to_owned(), layers.iter().map(|file| again(file)).collect()));
        self
    }

    #[must_use]
    pub fn vsock(mut self) -> Self {
        self.vsock = true;
        self
    }

    /// Restores into a new VMM; the VM is paused.
    ///
    /// # Panics
    /// When the VMM refuses.
    #[must_use]
    pub fn paused(self) -> Vm {
        self.paused_in(Vm::spawn())
    }

    /// Restores into this VMM; the VM is paused.
    ///
    /// # Panics
    /// When the VMM refuses.
    #[must_use]
    pub fn paused_in(self, mut vm: Vm) -> Vm {
        vm.restore(self).expect("the VMM takes the snapshot");
        vm
    }

    /// As [`Self::paused`], and resumes.
    ///
    /// # Panics
    /// When the VMM refuses.
    #[must_use]
    pub fn run(self) -> Vm {
        self.run_in(Vm::spawn())
    }

    /// As [`Self::paused_in`], and resumes.
    ///
    /// # Panics
    /// When the VMM refuses.
    #[must_use]
    pub fn run_in(self, vm: Vm) -> Vm {
        let mut vm = self.paused_in(vm);
        assert_eq!(vm.call(Call::Resume), Ok(Reply::Done));
        vm
    }
}

impl Vm {
    /// Asks for a snapshot whose new layer is `id`, and returns as soon as the VM goes on. `layers` are those that
    /// this VM was restored from.
    pub fn begin_snapshot(&mut self, id: &str, layers: &[(String, File)]) -> Result<Pending, Failure> {
        let deadline_ms = u64::try_from(DEADLINE.as_millis()).unwrap_or(u64::MAX);
        let (report, theirs) = pipe().expect("a pipe can be made");
        self.begin_snapshot_with(id, layers, deadline_ms, (report, theirs.into()))
    }

    /// As [`Self::begin_snapshot`], with a deadline and a report's pipe.
    pub fn begin_snapshot_with(
        &mut self,
        id: &str,
        layers: &[(String, File)],
        deadline_ms: u64,
        (report, theirs): (PipeReader, OwnedFd),
    ) -> Result<Pending, Failure> {
        let disks: Vec<_> = self.writable_disks().into_iter().map(|serial| (serial, empty_file())).collect();
        let disks: Vec<_> = disks.iter().map(|(serial, file)| (serial.as_str(), file)).collect();
        self.begin_capture(id, layers, deadline_ms, (report, theirs), &disks)
    }

    /// As [`Self::begin_snapshot_with`], with the files that the disks go on in.
    pub fn begin_capture(
        &mut self,
        id: &str,
        layers: &[(String, File)],
        deadline_ms: u64,
        (report, theirs): (PipeReader, OwnedFd),
        disks: &[(&str, &File)],
    ) -> Result<Pending, Failure> {
        let file = || tempfile::tempfile().expect("a temporary file can be made");
        let (state, memory) = (file(), file());
        let procfs = File::open("/proc").expect("there is a procfs");
        let config = SnapshotConfig {
            state: FdIndex(0),
            memory: FdIndex(1),
            report: FdIndex(2),
            procfs: FdIndex(3),
            layer_id: id.to_owned(),
            deadline_ms,
            disks: (4u32..)
                .zip(disks)
                .map(|(at, (serial, _))| NextLayer { serial: (*serial).to_owned(), file: FdIndex(at) })
                .collect(),
        };
        let mut fds = vec![state.as_fd(), memory.as_fd(), theirs.as_fd(), procfs.as_fd()];
        fds.extend(disks.iter().map(|(_, file)| file.as_fd()));
        let reply = self.call_with(Call::Snapshot(config), &fds)?;
        let Reply::Snapshotted { times, disks } = reply else { panic!("Snapshot: {reply:?}") };
        let layers = layers.iter().map(|(id, file)| (id.clone(), again(file))).collect();
        Ok(Pending { times, disks, state, memory, report, layers, id: id.to_owned() })
    }

    /// A snapshot that takes the VM's writable disks with it, each of which goes on in the file that is given for it; all
    /// of it is durable.
    ///
    /// # Panics
    /// When there is none, or not of these disks.
    #[must_use]
    pub fn capture(&mut self, id: &str, disks: &[(&str, &File)]) -> Saved {
        let deadline_ms = u64::try_from(DEADLINE.as_millis()).unwrap_or(u64::MAX);
        let (report, theirs) = pipe().expect("a pipe can be made");
        let pending = self.begin_capture(id, &[], deadline_ms, (report, theirs.into()), disks);
        let pending = pending.expect("the VMM takes a snapshot");
        let captured: Vec<_> = pending.disks.iter().map(|disk| disk.serial.as_str()).collect();
        assert_eq!(captured, disks.iter().map(|(serial, _)| *serial).collect::<Vec<_>>());
        self.settled(id);
        pending.saved()
    }

    /// Waits until the disks that snapshot `id` has captured are durable.
    ///
    /// # Panics
    /// When they are not.
    pub fn settled(&mut self, id: &str) {
        assert_eq!(self.event().0, Event::DisksSettled { layer_id: id.to_owned(), result: Ok(()) });
    }

    /// The slots of the writable disks.
    fn writable_disks(&mut self) -> Vec<String> {
        let Ok(Reply::Metrics(metrics)) = self.call(Call::Metrics) else { return Vec::new() };
        metrics.blk.into_iter().map(|disk| disk.serial).filter(|serial| serial.starts_with("rw")).collect()
    }

    /// A whole snapshot.
    ///
    /// # Panics
    /// When there is none.
    #[must_use]
    pub fn snapshot(&mut self, id: &str, layers: &[(String, File)]) -> Saved {
        self.begin_snapshot(id, layers).expect("the VMM takes a snapshot").saved()
    }

    /// Sends `Restore`; the guest's console is collected, and its input is a pipe.
    pub fn restore(&mut self, what: Restore) -> Result<Reply, Failure> {
        let mut fds: Vec<OwnedFd> = Vec::new();
        let mut attach = |fd: OwnedFd| {
            fds.push(fd);
            FdIndex(u32::try_from(fds.len() - 1).unwrap_or(u32::MAX))
        };
        let (reader, output) = pipe().expect("a pipe can be made");
        let (input, shell) = pipe().expect("a pipe can be made");
        self.at_prompt(Console::collect(reader), shell);
        let listener = what.vsock.then(|| UnixListener::bind(self.vsock_path()).expect("the path is fresh"));
        let config = RestoreConfig {
            protocol: PROTOCOL_VERSION,
            huge_pages: what.huge_pages,
            kvm: attach(host::kvm().into()),
            state: what.state.map(|state| attach(state.into())),
            layers: what
                .layers
                .into_iter()
                .map(|(id, file)| LayerConfig { id, file: attach(file.into()) })
                .collect(),
            console: Some(ConsoleConfig {
                output: attach(output.into()),
                input: Some(attach(input.into())),
                cap_bytes: 0,
            }),
            vsock: listener.map(|listener| VsockConfig {
                guest_cid: 3,
                listener: attach(listener.into()),
                host_ports: Vec::new(),
            }),
            disks: what
                .disks
                .into_iter()
                .map(|(serial, mut stack)| {
                    let top = stack.pop().expect("a disk has a layer");
                    let below = stack.into_iter().map(|file| attach(file.into())).collect();
                    RestoredDisk { serial, file: attach(top.into()), below }
                })
                .collect(),
        };
        let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
        self.call_with(Call::Restore(config), &fds)
    }
}
