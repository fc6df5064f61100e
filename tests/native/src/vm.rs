#![allow(unsafe_code)] // Between fork and exec, one descriptor is made inheritable.
//! One VMM process under test.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, PipeWriter, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, ExitStatus, Stdio};

use spore_vmm::api::{
    AttachedDisk, Call, DiskConfig, EndReason, Event, Failure, FdIndex, Message, Metrics, NetworkConfig,
    RateLimit, Reply, Request, VmState,
};
use tempfile::TempDir;

use crate::control::{Control, Received};
use crate::process::Process;
use crate::{Console, DEADLINE, Setup, host};

/// A VMM, its control socket, and what it said so far. Dropped, it is killed; when the
/// test is failing, its console and log are printed first.
pub struct Vm {
    pub control: Option<Control>,
    pub console: Option<Console>,
    process: Process,
    log: PathBuf,
    folder: TempDir,
    next_id: u64,
    events: VecDeque<(Event, Vec<OwnedFd>)>,
    /// Serial input of a guest that runs the `shell` command.
    shell: Option<PipeWriter>,
    commands: usize,
    /// Prompts of the shell that came before this console did.
    missed: usize,
}

impl Vm {
    /// Starts a VMM that waits for `Configure`.
    ///
    /// # Panics
    /// When KVM is unusable or the VMM cannot be started.
    #[must_use]
    pub fn spawn() -> Self {
        drop(host::kvm());
        let folder = tempfile::tempdir().expect("a temporary folder can be made");
        let log = folder.path().join("vmm.log");
        let (control, theirs) = Control::pair().expect("a socket pair can be made");
        let number = theirs.as_raw_fd();
        let mut command = Command::new(host::vmm_binary());
        command.args(["--control-fd", &number.to_string()]).stdin(Stdio::null()).stdout(Stdio::null());
        command.stderr(File::create(&log).expect("the log can be made"));
        // Every descriptor of ours is close-on-exec, so that the children of concurrent
        // tests inherit nothing of each other's; this one loses the flag in this child only.
        // SAFETY: a flag of an open descriptor.
        let inherit = move || match unsafe { libc::fcntl(number, libc::F_SETFD, 0) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        };
        // SAFETY: the closure makes one system call and allocates nothing.
        unsafe { command.pre_exec(inherit) };
        let child = command.spawn().expect("spore-vmm can be started");
        drop(theirs);
        Self::with(control, Process::Ours(child), log, folder)
    }

    pub(crate) fn with(control: Control, process: Process, log: PathBuf, folder: TempDir) -> Self {
        Self {
            control: Some(control),
            console: None,
            process,
            log,
            folder,
            next_id: 1,
            events: VecDeque::new(),
            shell: None,
            commands: 0,
            missed: 0,
        }
    }

    /// For a restored guest whose shell stands at its prompt: a console of its own.
    pub(crate) fn at_prompt(&mut self, console: Console, shell: PipeWriter) {
        (self.console, self.shell, self.missed) = (Some(console), Some(shell), 1);
    }

    /// Writes to the guest's serial input as it is.
    pub fn type_in(&mut self, text: &str) {
        let shell = self.shell.as_mut().expect("the guest has an input");
        shell.write_all(text.as_bytes()).expect("the VMM reads its input");
    }

    fn control(&self) -> &Control {
        self.control.as_ref().expect("the test has not closed the control socket")
    }

    /// Sends `Configure` for `setup` and returns the answer.
    pub fn configure(&mut self, mut setup: Setup) -> Result<Reply, Failure> {
        if setup.script == "shell" && setup.input.is_none() {
            let (reader, writer) = std::io::pipe().expect("a pipe can be made");
            setup.input = Some(reader.into());
            self.shell = Some(writer);
        }
        let listener = setup.vsock.then(|| UnixListener::bind(self.vsock_path()).expect("the path is fresh"));
        let output = match &setup.console {
            Some(output) => output.try_clone().expect("a descriptor can be doubled"),
            None => {
                let (reader, writer) = std::io::pipe().expect("a pipe can be made");
                self.console = Some(Console::collect(reader));
                writer.into()
            }
        };
        let (config, fds) = setup.message(output, listener);
        let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
        self.call_with(Call::Configure(config), &fds)
    }

    pub fn vsock_path(&self) -> PathBuf {
        self.folder.path().join("vsock.sock")
    }

    pub fn pid(&self) -> u32 {
        self.process.id()
    }

    /// What the VMM wrote to its standard error.
    pub fn log(&self) -> String {
        let mut text = String::new();
        if let Ok(mut file) = File::open(&self.log) {
            let _ = file.read_to_string(&mut text);
        }
        text
    }

    pub fn call(&mut self, call: Call) -> Result<Reply, Failure> {
        self.call_with(call, &[])
    }

    /// One request and its answer; events that arrive between are kept.
    pub fn call_with(&mut self, call: Call, fds: &[BorrowedFd<'_>]) -> Result<Reply, Failure> {
        let id = self.send(call, fds);
        self.response(id)
    }

    /// Sends a request without waiting, and returns its id.
    pub fn send(&mut self, call: Call, fds: &[BorrowedFd<'_>]) -> u64 {
        let id = self.next_id;
        self.next_id += 1;
        self.control().send(&Request { id, call }, fds).expect("the VMM's socket is open");
        id
    }

    /// Waits for the answer to request `id`.
    ///
    /// # Panics
    /// When another answer, or none, comes.
    pub fn response(&mut self, id: u64) -> Result<Reply, Failure> {
        loop {
            match self.control().receive(DEADLINE).expect("the VMM sends JSON") {
                Received::Packet(Message::Event(event), fds) => self.events.push_back((event, fds)),
                Received::Packet(Message::Response { id: found, result }, _) => {
                    assert_eq!(found, id, "answers come in the order of the requests");
                    return result;
                }
                other => panic!("request {id}: {other:?} instead of an answer"),
            }
        }
    }

    /// The next event and its descriptors.
    pub fn event(&mut self) -> (Event, Vec<OwnedFd>) {
        if let Some(event) = self.events.pop_front() {
            return event;
        }
        match self.control().receive(DEADLINE).expect("the VMM sends JSON") {
            Received::Packet(Message::Event(event), fds) => (event, fds),
            other => panic!("{other:?} instead of an event"),
        }
    }

    /// Has a guest that runs `shell` run one command, and returns what it printed.
    pub fn run(&mut self, command: &str) -> String {
        self.begin(command);
        self.finish()
    }

    /// The first half of [`Self::run`].
    pub fn begin(&mut self, command: &str) {
        if self.commands >= self.missed {
            self.nth_line("ready", self.commands - self.missed);
        }
        let shell = self.shell.as_mut().expect("the guest runs `shell`");
        shell.write_all(format!("{command}\n").as_bytes()).expect("the VMM reads its input");
    }

    /// The second half of [`Self::run`].
    pub fn finish(&mut self) -> String {
        self.commands += 1;
        let nth = self.commands - self.missed;
        self.nth_line("ready", nth);
        let text = self.console.as_ref().expect("the console is a pipe").text();
        text.split("ready\n").nth(nth).unwrap_or_default().to_owned()
    }

    /// As [`Self::finish`], of a restored guest whose command was begun in its source.
    pub fn finish_first(&mut self) -> String {
        self.nth_line("ready", 0);
        (self.missed, self.commands) = (0, 0);
        self.console.as_ref().expect("the console is a pipe").text()
    }

    pub fn boot(&mut self) {
        assert_eq!(self.call(Call::Boot), Ok(Reply::Done));
    }

    pub fn state(&mut self) -> VmState {
        match self.call(Call::State) {
            Ok(Reply::State(state)) => state,
            other => panic!("State: {other:?}"),
        }
    }

    pub fn metrics(&mut self) -> Metrics {
        match self.call(Call::Metrics) {
            Ok(Reply::Metrics(metrics)) => metrics,
            other => panic!("Metrics: {other:?}"),
        }
    }

    /// Attaches a disk and returns its serial.
    pub fn attach(&mut self, file: &File, read_only: bool) -> Result<String, Failure> {
        let call = Call::AttachDisk(DiskConfig { file: FdIndex(0), read_only, below: Vec::new() });
        match self.call_with(call, &[file.as_fd()])? {
            Reply::Attached(AttachedDisk { serial }) => Ok(serial),
            other => panic!("AttachDisk: {other:?}"),
        }
    }

    /// Gives a network slot its tap, without limits.
    /// Gives the file system device a server; its end of the one socket.
    pub fn attach_filesystem(&mut self) -> Result<UnixStream, Failure> {
        let (server, socket) = UnixStream::pair().expect("a pair of sockets can be made");
        let call = Call::AttachFilesystem { sockets: vec![FdIndex(0)] };
        self.call_with(call, &[socket.as_fd()]).map(|_| server)
    }

    pub fn attach_network(&mut self, slot: u8, tap: &OwnedFd) -> Result<Reply, Failure> {
        let (to_guest, from_guest) = (RateLimit::default(), RateLimit::default());
        let call = Call::AttachNetwork(NetworkConfig { slot, tap: FdIndex(0), to_guest, from_guest });
        self.call_with(call, &[tap.as_fd()])
    }

    /// Waits for a console line that starts with `start`, and returns it.
    pub fn line(&self, start: &str) -> String {
        self.nth_line(start, 0)
    }

    /// As [`Self::line`], for the one after `skip` others.
    pub fn nth_line(&self, start: &str, skip: usize) -> String {
        let console = self.console.as_ref().expect("the console is a pipe");
        let find = |text: &str| {
            let whole = text.rfind('\n').map_or("", |end| &text[..end]);
            whole.lines().filter(|line| line.starts_with(start)).nth(skip).map(str::to_owned)
        };
        console
            .wait(DEADLINE, find)
            .unwrap_or_else(|| panic!("no line {start:?} ({skip} before it) on the console"))
    }

    /// Waits for the guest's end, the socket's, the process's and the console's.
    pub fn ended(&mut self) -> EndReason {
        loop {
            match self.event() {
                (Event::Ended(reason), _) => {
                    self.closed();
                    return reason;
                }
                (
                    Event::GuestConnection { .. } | Event::DisksSettled { .. } | Event::DiskMerged { .. },
                    _,
                ) => {}
            }
        }
    }

    /// Waits until the VMM has closed the control socket and ended, with status 0.
    pub fn closed(&mut self) {
        let last = self.control().receive(DEADLINE).expect("the VMM sends JSON");
        assert!(matches!(last, Received::Closed), "after the last message: {last:?}");
        if let Some(status) = self.process_ended() {
            assert!(status.success(), "the VMM ended with {status}");
        }
    }

    /// Waits for the process to end; its status, if it is our child.
    fn process_ended(&mut self) -> Option<ExitStatus> {
        let ended = self.process.wait(DEADLINE).expect("a process can be waited for");
        ended.unwrap_or_else(|| panic!("the VMM still runs after {DEADLINE:?}"))
    }

    /// Waits for the process to end.
    pub fn exit_status(&mut self) -> ExitStatus {
        self.process_ended().expect("the VMM is our child")
    }

    pub fn kill(&mut self) {
        self.process.kill().expect("a VMM of ours can be killed");
    }

    /// Everything that the guest printed, once the VMM has ended.
    pub fn console_text(&self) -> String {
        self.console.as_ref().expect("the console is a pipe").wait_end(DEADLINE)
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait(DEADLINE);
        if std::thread::panicking() {
            let text = self.console.as_ref().map(Console::text).unwrap_or_default();
            eprintln!("--- console ---\n{text}\n--- VMM log ---\n{}---", self.log());
        }
    }
}
