//! The virtual machine of a sandbox: the sole user of `spore_vmm::api` and the single
//! owner of the VMM process. The shim opens what the VMM needs and hands descriptors over
//! the control socket (DESIGN 1); the VMM ends on every path: its owner's drop kills it,
//! and the end of the control socket ends it when the shim is killed.

mod build;
mod control;
mod end;
mod snapshot;
mod zygote;

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicI32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use serde::Deserialize;
use slog::{Logger, warn};
use spore_vmm::api::{Call, DiskConfig, FailureCode, FdIndex, Metrics, NetworkConfig, RateLimit, Reply};
pub(crate) use spore_vmm::api::{MAX_DISK_LAYERS, MAX_FDS, MAX_MESSAGE, SnapshotTimes};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::net::UnixStream;
use tokio::sync::{mpsc, watch};

use self::control::{CallError, Control};
pub(crate) use self::end::End;
use self::end::{Process, UNEXPLAINED, tail};
use self::snapshot::Settling;
pub(crate) use self::snapshot::{Destination, Image, ImageDisk, Saved, Then};
pub(crate) use self::zygote::{Zygote, outfit};
use crate::config::{Config, Machine, NetworkLimits, Rate};
use crate::process::{self, ProcessId};
use crate::rundir::RunDir;
use crate::volumes::FileServer;

/// Name of the vsock socket and of the logs in the run-time directory.
pub(crate) const VSOCK: &str = "vsock.sock";
const CONSOLE: &str = "console.log";
const VMM_LOG: &str = "vmm.log";
/// Where the file server of its volumes writes its messages.
pub(crate) const FILE_SERVER_LOG: &str = "fs.log";
/// A VMM that does not answer the control socket in this time is stuck.
const CALL_DEADLINE: Duration = Duration::from_secs(60);
const UNENDING: &str = "the virtual machine monitor closed its control socket and does not end";
/// Attempts to connect to a guest that lives.
const DIALS: u32 = 3;
/// The VMM itself gives a guest up that does not answer a dial within 60 s; one that does not
/// even do that is stuck.
const DIAL_DEADLINE: Duration = Duration::from_secs(70);
/// How long a VMM may take to end that has said so, closed its socket or been killed.
const END_DEADLINE: Duration = Duration::from_secs(10);

#[derive(Debug, thiserror::Error)]
pub(crate) enum VmError {
    #[error("{what} {path}: cannot be opened: {source}; {mend}")]
    HostFile { what: &'static str, path: PathBuf, source: io::Error, mend: String },
    #[error("virtual machine monitor {path}: cannot be started: {source}")]
    Spawn { path: PathBuf, source: io::Error },
    #[error("virtual machine: {operation}: {source}")]
    Host { operation: &'static str, source: io::Error },
    #[error("virtual machine: {operation}: {message}")]
    Refused { operation: &'static str, message: String },
    #[error("virtual machine ended while {phase}: {cause}{tail}")]
    Ended { phase: &'static str, cause: String, tail: String },
    #[error(
        "virtual machine: the guest did not become ready within {seconds} s (boot_deadline_s); is this kernel able to run on this host's KVM?{tail}"
    )]
    BootDeadline { seconds: u64, tail: String },
    #[error("virtual machine: {operation}: no answer from the virtual machine monitor within {seconds} s")]
    Stuck { operation: &'static str, seconds: u64 },
}

/// Host files, opened before anything is started, so that what is missing is named.
pub(crate) struct HostFiles {
    kvm: File,
    kernel: File,
    initramfs: File,
}

impl HostFiles {
    pub(crate) fn open(config: &Config) -> Result<Self, VmError> {
        let kvm_path = Path::new("/dev/kvm");
        let kvm = OpenOptions::new().read(true).write(true).open(kvm_path).map_err(|source| VmError::HostFile {
            what: "KVM device",
            path: kvm_path.into(),
            source,
            mend: "load the module kvm_intel or kvm_amd, enable virtualisation in the firmware, or allow nested virtualisation".into(),
        })?;
        let open = |what, path: &Path, key| {
            let file = File::open(path).and_then(|file| match file.metadata()? {
                metadata if !metadata.is_file() => Err(io::Error::other("not a regular file")),
                metadata if metadata.len() == 0 => Err(io::Error::other("the file is empty")),
                _ => Ok(file),
            });
            file.map_err(|source| VmError::HostFile {
                what,
                path: path.into(),
                source,
                mend: format!("install it or set \"{key}\" in {}", crate::config::PATH),
            })
        };
        Ok(Self {
            kvm,
            kernel: open("guest kernel", &config.kernel, "kernel")?,
            initramfs: open("guest initramfs", &config.initramfs, "initramfs")?,
        })
    }
}

/// One VMM process and its VM, and the server of its volumes.
pub(crate) struct Vm {
    control: Control,
    dir: Arc<RunDir>,
    pidfd: Arc<AsyncFd<OwnedFd>>,
    id: ProcessId,
    machine: Machine,
    file_server: Mutex<Option<Arc<FileServer>>>,
    ready: watch::Receiver<bool>,
    end: watch::Receiver<Option<End>>,
    /// The memory layers that it was restored from, by id.
    origin: Mutex<Vec<(String, File)>>,
    settling: Settling,
    questions: mpsc::Sender<OwnedFd>,
    oom_score_adj: AtomicI32,
    /// Counts the machines of its run-time directory, from 0. Each has files of its own there.
    generation: u32,
    log: Logger,
}

impl Vm {
    /// Starts the VMM process. Must be called on the thread that lives as long as the shim. What
    /// the guest asks the host's name server goes to `questions`, as long as there is room.
    pub(crate) fn spawn(
        config: &Config,
        machine: &Machine,
        dir: Arc<RunDir>,
        questions: mpsc::Sender<OwnedFd>,
        log: Logger,
    ) -> Result<Self, VmError> {
        Self::spawn_next(config, machine.clone(), dir, questions, 0, log)
    }

    /// Starts another VMM, for a machine that is to take the place of this one. They have the same size, directory and priority, and
    /// are of one sandbox otherwise.
    pub(crate) fn successor(&self, config: &Config) -> Result<Self, VmError> {
        let (dir, questions, log) = (Arc::clone(&self.dir), self.questions.clone(), self.log.clone());
        let next = Self::spawn_next(config, self.machine.clone(), dir, questions, self.generation + 1, log)?;
        next.adjust_oom_score(self.oom_score_adj.load(Ordering::Relaxed));
        Ok(next)
    }

    fn spawn_next(
        config: &Config,
        machine: Machine,
        dir: Arc<RunDir>,
        questions: mpsc::Sender<OwnedFd>,
        generation: u32,
        log: Logger,
    ) -> Result<Self, VmError> {
        let host = |operation| move |source| VmError::Host { operation, source };
        let (ours, theirs) = control::pair().map_err(host("make the control socket"))?;
        let log_file =
            dir.create_file(&file_name(VMM_LOG, generation)).map_err(host("create the VMM's log"))?;
        // The one descriptor that the VMM inherits. Until it is closed here, whatever else the
        // shim would start inherits it too and would hide our end of file from the VMM: no
        // helper process is started by another thread before the VMM is.
        let inherited = nix::unistd::dup(&theirs)
            .map_err(|error| VmError::Host { operation: "make the control socket", source: error.into() })?;
        let mut child = Command::new(&config.vmm)
            .args(["--control-fd", &inherited.as_raw_fd().to_string()])
            .env_clear()
            .current_dir("/")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::from(log_file))
            .spawn()
            .map_err(|source| VmError::Spawn { path: config.vmm.clone(), source })?;
        drop((inherited, theirs));
        let adopted =
            process::pidfd_open(child.id()).and_then(|pidfd| Ok((pidfd, ProcessId::of(child.id())?)));
        let (pidfd, id) = match adopted {
            Ok(adopted) => adopted,
            Err(source) => {
                let _ = child.kill();
                let _ = child.wait();
                return Err(VmError::Spawn { path: config.vmm.clone(), source });
            }
        };
        let process = (Process::Child(child), pidfd, id);
        Self::of(process, ours, machine, dir, questions, generation, log)
    }

    /// What a VMM's process is to its sandbox, which it obeys by this control socket.
    fn of(
        (process, pidfd, id): (Process, OwnedFd, ProcessId),
        control: OwnedFd,
        machine: Machine,
        dir: Arc<RunDir>,
        questions: mpsc::Sender<OwnedFd>,
        generation: u32,
        log: Logger,
    ) -> Result<Self, VmError> {
        let host = |operation| move |source| VmError::Host { operation, source };
        let pidfd = process::watch(pidfd, Interest::READABLE).map_err(host("watch its process"))?;
        let pidfd = Arc::new(pidfd);
        let (event_sender, events) = mpsc::unbounded_channel();
        let settling = Settling::default();
        let control = Control::new(control, event_sender).map_err(host("watch the control socket"))?;
        let (ready, end) = end::watch_over(
            process,
            Arc::clone(&pidfd),
            (events, questions.clone(), settling.clone()),
            log.clone(),
        );
        let (file_server, origin, oom_score_adj) = (Mutex::default(), Mutex::default(), AtomicI32::new(0));
        Ok(Self {
            control,
            dir,
            pidfd,
            id,
            machine,
            file_server,
            ready,
            end,
            origin,
            settling,
            questions,
            oom_score_adj,
            generation,
            log,
        })
    }

    pub(crate) fn id(&self) -> ProcessId {
        self.id
    }

    pub(crate) fn dir(&self) -> &RunDir {
        &self.dir
    }

    pub(crate) fn shared_dir(&self) -> Arc<RunDir> {
        Arc::clone(&self.dir)
    }

    /// As a file of this machine is called in the directory.
    pub(crate) fn file_name(&self, name: &str) -> String {
        file_name(name, self.generation)
    }

    pub(crate) fn machine(&self) -> &Machine {
        &self.machine
    }

    /// Gives the VMM the OOM score that the OCI spec wants for the container's process: its own
    /// would be containerd's, which nothing may kill.
    pub(crate) fn set_oom_score_adj(&self, spec: &[u8]) {
        self.adjust_oom_score(wanted_oom_score_adj(spec));
    }

    fn adjust_oom_score(&self, score: i32) {
        self.oom_score_adj.store(score, Ordering::Relaxed);
        if let Err(error) = process::set_oom_score_adj(self.id.pid, score) {
            warn!(self.log, "the VMM's OOM score stays the shim's (CAP_SYS_RESOURCE is needed to lower it)";
                "vmm" => self.id.pid, "oom_score_adj" => score, "error" => %error);
        }
    }

    /// Gives the guest what `server` serves on these sockets; the server ends with the VM.
    pub(crate) async fn attach_volumes(
        &self,
        server: FileServer,
        sockets: Vec<std::os::unix::net::UnixStream>,
    ) -> Result<(), VmError> {
        let fds: Vec<_> = sockets.iter().map(AsRawFd::as_raw_fd).collect();
        let indices = (0u32..).take(fds.len()).map(FdIndex).collect();
        *self.file_server.lock().unwrap_or_else(PoisonError::into_inner) = Some(Arc::new(server));
        self.call("attach volumes", Call::AttachFilesystem { sockets: indices }, &fds).await.map(drop)
    }

    /// The server of the host's directories and files that the guest has.
    pub(crate) fn file_server(&self) -> Option<Arc<FileServer>> {
        self.file_server.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Puts a disk into a free slot and returns the serial by which the guest knows it. The layers `below` the
    /// file are counted from the bottom up.
    pub(crate) async fn attach_disk(
        &self,
        file: &File,
        below: &[File],
        read_only: bool,
    ) -> Result<String, VmError> {
        let fds: Vec<_> = [file].into_iter().chain(below).map(AsRawFd::as_raw_fd).collect();
        let below = (1u32..).take(below.len()).map(FdIndex).collect();
        let call = Call::AttachDisk(DiskConfig { file: FdIndex(0), below, read_only });
        match self.call("attach a disk", call, &fds).await? {
            Reply::Attached(disk) => Ok(disk.serial),
            other => Err(unexpected("attach a disk", &other)),
        }
    }

    /// Gives a network slot its tap. The VMM has the descriptor afterwards, whoever else has it.
    pub(crate) async fn attach_network(
        &self,
        slot: u8,
        tap: &OwnedFd,
        limits: NetworkLimits,
    ) -> Result<(), VmError> {
        let rate = |rate: Rate| RateLimit { bytes_per_s: rate.bytes, packets_per_s: rate.packets };
        let (to_guest, from_guest) = (rate(limits.received), rate(limits.sent));
        let network = NetworkConfig { slot, tap: FdIndex(0), to_guest, from_guest };
        self.call("attach a network", Call::AttachNetwork(network), &[tap.as_raw_fd()]).await.map(drop)
    }

    /// Closes a slot's tap.
    pub(crate) async fn detach_network(&self, slot: u8) -> Result<(), VmError> {
        self.call("detach a network", Call::DetachNetwork { slot }, &[]).await.map(drop)
    }

    /// Asks the guest to give so much of its memory to the host; it follows in its own time, and
    /// takes some again rather than run out of memory.
    pub(crate) async fn set_balloon(&self, target_mib: u64) -> Result<(), VmError> {
        self.call("set the balloon", Call::SetBalloon { target_mib }, &[]).await.map(drop)
    }

    pub(crate) async fn metrics(&self) -> Result<Metrics, VmError> {
        match self.call("metrics", Call::Metrics, &[]).await? {
            Reply::Metrics(metrics) => Ok(metrics),
            other => Err(unexpected("metrics", &other)),
        }
    }

    async fn call(&self, operation: &'static str, call: Call, fds: &[RawFd]) -> Result<Reply, VmError> {
        let answer = tokio::time::timeout(CALL_DEADLINE, self.control.call(call, fds)).await;
        match answer {
            Err(_) => Err(stuck(operation)),
            Ok(Ok(reply)) => Ok(reply),
            Ok(Err(CallError::Io(source))) => Err(VmError::Host { operation, source }),
            Ok(Err(CallError::Refused(failure))) => match failure.code {
                // The reason follows as the VMM's last message.
                FailureCode::Ended => {
                    let cause = self.cause(&failure.message).await;
                    Err(self.ended_error(operation, cause))
                }
                _ => Err(VmError::Refused { operation, message: failure.message }),
            },
            Ok(Err(CallError::Closed)) => {
                let cause = self.cause(UNENDING).await;
                Err(self.ended_error(operation, cause))
            }
        }
    }

    /// Why the VM ended, when it is known to be ending; `otherwise` when its process stays.
    async fn cause(&self, otherwise: &str) -> String {
        let end = tokio::time::timeout(END_DEADLINE, self.ended()).await;
        end.map_or_else(|_| otherwise.into(), |end| end.cause)
    }

    /// Waits for the agent's sign of life, or says why there is none.
    pub(crate) async fn ready(&self, deadline: tokio::time::Instant, config: &Config) -> Result<(), VmError> {
        let mut ready = self.ready.clone();
        let outcome = tokio::select! {
            biased;
            outcome = ready.wait_for(|ready| *ready) => outcome.map(drop).map_err(|_| ()),
            end = self.ended() => return Err(self.ended_error("booting", end.cause)),
            () = tokio::time::sleep_until(deadline) => {
                let tail = self.tail(true);
                return Err(VmError::BootDeadline { seconds: config.boot_deadline_s, tail });
            }
        };
        match outcome {
            Ok(()) => Ok(()),
            Err(()) => {
                let cause = self.cause(UNENDING).await;
                Err(self.ended_error("booting", cause))
            }
        }
    }

    /// Waits until the VMM process has ended.
    pub(crate) async fn ended(&self) -> End {
        let mut end = self.end.clone();
        match end.wait_for(Option::is_some).await.map(|end| end.clone()) {
            Ok(Some(end)) => end,
            _ => End { cause: "the virtual machine monitor is gone".into() },
        }
    }

    pub(crate) fn has_ended(&self) -> bool {
        self.end.borrow().is_some()
    }

    /// An error for a phase that the end of the VM cut short.
    pub(crate) fn ended_error(&self, phase: &'static str, cause: String) -> VmError {
        let tail = self.tail(cause.contains(UNEXPLAINED));
        VmError::Ended { phase, cause, tail }
    }

    /// Connects to a vsock port of the guest. The VMM gives a guest that does not answer up
    /// after a while; a stalled guest is asked again.
    pub(crate) async fn connect(&self, port: u32) -> io::Result<UnixStream> {
        for attempt in 1..DIALS {
            match self.dial(port).await {
                Err(error) if error.kind() == io::ErrorKind::ConnectionRefused && !self.has_ended() => {
                    warn!(self.log, "vsock: not answered"; "port" => port, "attempt" => attempt, "error" => %error);
                }
                outcome => return outcome,
            }
        }
        self.dial(port).await
    }

    async fn dial(&self, port: u32) -> io::Result<UnixStream> {
        let stuck = |_| {
            let detail = format!("vsock port {port}: no answer from the virtual machine monitor");
            io::Error::new(io::ErrorKind::TimedOut, detail)
        };
        tokio::time::timeout(DIAL_DEADLINE, self.dial_patiently(port)).await.map_err(stuck)?
    }

    async fn dial_patiently(&self, port: u32) -> io::Result<UnixStream> {
        use tokio::io::{AsyncReadExt, AsyncWriteExt};
        let mut stream = UnixStream::connect(self.dir.socket(&self.file_name(VSOCK))).await?;
        stream.write_all(format!("CONNECT {port}\n").as_bytes()).await?;
        // Byte by byte: what follows the line belongs to the stream.
        let mut line = Vec::new();
        while line.last() != Some(&b'\n') {
            if line.len() > 32 {
                return Err(io::Error::new(
                    io::ErrorKind::InvalidData,
                    "vsock: the answer to CONNECT is too long",
                ));
            }
            let refused =
                || io::Error::new(io::ErrorKind::ConnectionRefused, format!("vsock port {port}: refused"));
            line.push(stream.read_u8().await.map_err(|_| refused())?);
        }
        if line.starts_with(b"OK ") {
            Ok(stream)
        } else {
            Err(io::Error::new(io::ErrorKind::InvalidData, "vsock: CONNECT was not answered by OK"))
        }
    }

    /// Ends the VMM and waits until it is gone.
    pub(crate) async fn kill(&self) {
        self.signal_kill();
        if tokio::time::timeout(END_DEADLINE, self.ended()).await.is_err() {
            warn!(self.log, "the VMM survives SIGKILL"; "vmm" => self.id.pid);
        }
    }

    /// Ends the VMM while its sandbox goes on with another, and removes its files.
    pub(crate) async fn retire(&self) {
        self.kill().await;
        drop(self.file_server.lock().unwrap_or_else(PoisonError::into_inner).take());
        for name in [VSOCK, CONSOLE, VMM_LOG, FILE_SERVER_LOG] {
            // Through the descriptor: of this very directory.
            let _ = std::fs::remove_file(self.dir.socket(&self.file_name(name)));
        }
    }

    fn signal_kill(&self) {
        // The monitor reaps the child only after the pidfd told it of the end, and the
        // pidfd goes on naming that process alone.
        let _ = process::pidfd_kill(self.pidfd.get_ref(), libc::SIGKILL);
    }

    /// The ends of the guest's and, when it did not say why it ended, the VMM's output.
    fn tail(&self, unexplained: bool) -> String {
        let mut text = String::new();
        let logs = [("virtual machine monitor", VMM_LOG), ("guest console", CONSOLE)];
        for (name, file) in logs.into_iter().skip(usize::from(!unexplained)) {
            let tail = tail(&self.dir.file(&self.file_name(file))).unwrap_or_default();
            if !tail.is_empty() {
                text.push_str(&format!("; last lines of the {name}: {tail}"));
            }
        }
        if text.is_empty() { "; the guest console is empty".into() } else { text }
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        self.signal_kill();
    }
}

fn stuck(operation: &'static str) -> VmError {
    VmError::Stuck { operation, seconds: CALL_DEADLINE.as_secs() }
}

fn unexpected(operation: &'static str, reply: &Reply) -> VmError {
    VmError::Refused { operation, message: format!("unexpected reply {reply:?}") }
}

/// The first machine of a sandbox has the names as they are.
fn file_name(name: &str, generation: u32) -> String {
    if generation == 0 { name.into() } else { format!("{generation}-{name}") }
}

/// `process.oomScoreAdj` of an OCI spec; 0 as with runc where there is none.
fn wanted_oom_score_adj(spec: &[u8]) -> i32 {
    #[derive(Default, Deserialize)]
    #[serde(default)]
    struct Spec {
        process: Process,
    }
    #[derive(Default, Deserialize)]
    #[serde(default, rename_all = "camelCase")]
    struct Process {
        oom_score_adj: Option<i32>,
    }
    // The bundle is checked already.
    let spec: Spec = serde_json::from_slice(spec).unwrap_or_default();
    spec.process.oom_score_adj.unwrap_or(0)
}

#[cfg(test)]
mod tests;
