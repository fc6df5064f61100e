//! A VMM and an agent that are none: they speak the control protocol and the agent's API,
//! and run a "container's" process on the host. The shim under test cannot tell, so its own
//! work is tested where no VM can boot. Started by the shim through a script that re-runs
//! the test binary with the ignored test `fake_vmm`.

#![allow(clippy::unwrap_used, clippy::expect_used, dead_code)]

pub(crate) mod host;
pub(crate) mod scene;
pub(crate) mod space;

use std::collections::HashMap;
use std::io::{IoSlice, IoSliceMut};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixListener as StdListener;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::Stdio;
use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};
use protobuf::Message as _;
use serde_json::Value;
use spore_agent_api::stream::{ATTACHED, HEADER_LEN, Hello, Kind, REFUSED_NO_SUCH_STREAM, UNCHANGED};
use spore_agent_api::v1::files::watch_event::Kind as Change;
use spore_agent_api::v1::{
    container, container_ttrpc, files, files_ttrpc, network, network_ttrpc, sandbox, sandbox_ttrpc,
};
use spore_agent_api::{NAMES_PORT, RPC_PORT, STDIO_PORT};
use spore_vmm::api::{
    AttachedDisk, BootTimes, Call, DiskSlots, EndReason, Event, Failure, FailureCode, FdIndex, MAX_MESSAGE,
    Message, Metrics, Reply, Request, SnapshotConfig, SnapshotDone, SnapshotLayer, SnapshotReport,
    SnapshotTimes,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt, copy, copy_bidirectional};
use tokio::net::{UnixListener, UnixStream};
use tokio::process::{ChildStderr, ChildStdin, ChildStdout};
use tokio::sync::watch;
use ttrpc::r#async::{Server, ServerStreamSender, TtrpcContext};

/// Kernel command line words (`kernel_args`) that make the fake misbehave.
pub(crate) const HANG: &str = "fake.hang";
pub(crate) const PANIC: &str = "fake.panic";
/// After Boot the VMM says what is no message, and lives on.
pub(crate) const GARBAGE: &str = "fake.garbage";
/// The guest faults before it is given a disk.
pub(crate) const FAULT: &str = "fake.fault";
/// The agent answers neither Start nor Signal nor Pids.
pub(crate) const DEAF: &str = "fake.deaf";
/// The agent answers Signal and sends none.
pub(crate) const IMMORTAL: &str = "fake.immortal";
/// Start goes on when somebody opens the fifo [`GATE_FIFO`] in TMPDIR. Where that is, so does a snapshot's writer.
pub(crate) const GATE: &str = "fake.gate";
pub(crate) const GATE_FIFO: &str = "gate";
/// A snapshot's writer says that it has failed.
pub(crate) const UNWRITTEN: &str = "fake.unwritten";
/// In TMPDIR: no machine is restored while this is there.
pub(crate) const UNRESTORABLE: &str = "unrestorable";
/// In TMPDIR: a zygote forks nothing while this is there.
pub(crate) const UNFORKABLE: &str = "unforkable";
/// In the environment of a forked VMM: where it finds the agent's state.
const INHERITED: &str = "FAKE_INHERITED";
/// In TMPDIR: the agent of a restored machine answers Setup when somebody opens this fifo.
pub(crate) const SETUP_FIFO: &str = "setup-gate";
/// The agent refuses an address.
pub(crate) const UNROUTED: &str = "fake.unrouted";
/// The last Update of the network, encoded, in TMPDIR.
pub(crate) const NETWORK: &str = "network";
/// What the name server has answered, in TMPDIR.
pub(crate) const ANSWER: &str = "answer";
/// What the agent's Shutdown leaves in TMPDIR.
pub(crate) const SHUT_DOWN: &str = "shut-down";

fn receive(socket: RawFd) -> Option<(Request, Vec<OwnedFd>)> {
    let mut buffer = vec![0; MAX_MESSAGE];
    let mut space = nix::cmsg_space!([RawFd; 64]);
    let mut slices = [IoSliceMut::new(&mut buffer)];
    let message = recvmsg::<()>(socket, &mut slices, Some(&mut space), MsgFlags::MSG_CMSG_CLOEXEC).ok()?;
    let length = message.bytes;
    let mut fds = Vec::new();
    for control in message.cmsgs().unwrap() {
        if let ControlMessageOwned::ScmRights(rights) = control {
            #[allow(unsafe_code)]
            // SAFETY: recvmsg has just installed these descriptors for us alone.
            fds.extend(rights.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
        }
    }
    (length > 0).then(|| (serde_json::from_slice(&buffer[..length]).unwrap(), fds))
}

fn send(socket: RawFd, message: &Message, fds: &[RawFd]) {
    let packet = serde_json::to_vec(message).unwrap();
    let rights = [ControlMessage::ScmRights(fds)];
    let rights = if fds.is_empty() { &rights[..0] } else { &rights[..] };
    sendmsg::<()>(socket, &[IoSlice::new(&packet)], rights, MsgFlags::empty(), None).unwrap();
}

fn send_garbage(socket: RawFd) {
    let packet = [IoSlice::new(b"{\"event\":\"sing\"}")];
    sendmsg::<()>(socket, &packet, &[], MsgFlags::empty(), None).unwrap();
}

/// The process that the shim believes to be spore-vmm; its control socket is descriptor 0.
pub(crate) fn fake_vmm() {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let (mut read_only, mut writable) = (0, 0);
    let mut cmdline = String::new();
    let mut agent = Agent::default();
    let mut console: Option<std::fs::File> = None;
    let mut disks = Vec::new();
    let mut taps = HashMap::new();
    while let Some((request, mut fds)) = receive(0) {
        let reply = match request.call {
            Call::Configure(config) => {
                cmdline = config.cmdline.clone();
                let listener = fds.remove(config.vsock.as_ref().unwrap().listener.0 as usize);
                let listener = StdListener::from(listener);
                listener.set_nonblocking(true).unwrap();
                console = Some(fds.remove(config.console.unwrap().output.0 as usize).into());
                agent.cmdline.clone_from(&cmdline);
                runtime.spawn(vsock(listener, agent.clone()));
                Reply::Configured {
                    disk_slots: config.disk_slots,
                    network_slots: config.network_slots,
                    disks: Vec::new(),
                }
            }
            Call::Boot => {
                send(0, &Message::Response { id: request.id, result: Ok(Reply::Done) }, &[]);
                let mut console = console.take().unwrap();
                use std::io::Write;
                writeln!(console, "fake guest boots").unwrap();
                if cmdline.contains(PANIC) {
                    writeln!(console, "Kernel panic - not syncing: no working init found").unwrap();
                    send(0, &Message::Event(Event::Ended(EndReason::Reset)), &[]);
                    return;
                }
                if cmdline.contains(GARBAGE) {
                    send_garbage(0);
                } else if !cmdline.contains(HANG) && !cmdline.contains(FAULT) {
                    say_ready();
                }
                continue;
            }
            Call::AttachDisk(_) if cmdline.contains(FAULT) => {
                let message = "attach: the VM is Ended; the guest has ended".into();
                let failure = Failure { code: FailureCode::Ended, message };
                send(0, &Message::Response { id: request.id, result: Err(failure) }, &[]);
                let fault = EndReason::TripleFault { vcpu: 0, registers: "rip=0xdead".into() };
                send(0, &Message::Event(Event::Ended(fault)), &[]);
                return;
            }
            Call::AttachDisk(disk) => {
                let (prefix, count) =
                    if disk.read_only { ("ro", &mut read_only) } else { ("rw", &mut writable) };
                let serial = format!("{prefix}{count}");
                *count += 1;
                // A descriptor that stays open: the lock on the writable layer stays too.
                disks.append(&mut fds);
                Reply::Attached(AttachedDisk { serial })
            }
            Call::AttachNetwork(network) => {
                assert!(taps.insert(network.slot, fds.remove(network.tap.0 as usize)).is_none());
                Reply::Done
            }
            Call::DetachNetwork { slot } => {
                taps.remove(&slot).expect("a slot that has a tap");
                Reply::Done
            }
            Call::Snapshot(config) => save(&config, &fds, &agent),
            Call::Restore(_) if std::env::temp_dir().join(UNRESTORABLE).exists() => {
                let message = "restore: the saved state is of no machine that can be".into();
                let failure = Failure { code: FailureCode::HostUnfit, message };
                send(0, &Message::Response { id: request.id, result: Err(failure) }, &[]);
                continue;
            }
            Call::Zygote(config) => {
                let control = fds.remove(config.control.0 as usize);
                let saved = agent.saved();
                std::thread::spawn(move || zygote(&control, &saved));
                let layer_id = config.layer_id;
                send(0, &Message::Event(Event::DisksSettled { layer_id, result: Ok(()) }), &[]);
                let times = SnapshotTimes { pause_ns: PAUSE_NS, ..Default::default() };
                Reply::Snapshotted { times, disks: Vec::new() }
            }
            Call::Restore(config) => {
                agent = Agent::restored(match config.state {
                    Some(state) => fds[state.0 as usize].try_clone().unwrap().into(),
                    None => std::fs::File::open(std::env::var(INHERITED).unwrap()).unwrap(),
                });
                cmdline.clone_from(&agent.cmdline);
                // The descriptors of its disks stay open, the lock on the writable one too.
                disks.extend(fds.drain(3..));
                let listener = StdListener::from(fds.remove(config.vsock.unwrap().listener.0 as usize));
                listener.set_nonblocking(true).unwrap();
                runtime.spawn(vsock(listener, agent.clone()));
                let disk_slots = DiskSlots { read_only: 1, writable: 1 };
                Reply::Restored { disk_slots, network_slots: 4, saved_at_ns: 1 }
            }
            Call::Pause => {
                agent.paused.send_replace(true);
                agent.signal_all(nix::sys::signal::Signal::SIGSTOP);
                Reply::Done
            }
            Call::Resume => {
                agent.signal_all(nix::sys::signal::Signal::SIGCONT);
                agent.paused.send_replace(false);
                if agent.is_restored {
                    send(0, &Message::Response { id: request.id, result: Ok(Reply::Done) }, &[]);
                    say_ready();
                    continue;
                }
                Reply::Done
            }
            Call::Metrics => Reply::Metrics(Metrics {
                boot: BootTimes { entered_ns: 7, ..Default::default() },
                ..Default::default()
            }),
            _ => Reply::Done,
        };
        send(0, &Message::Response { id: request.id, result: Ok(reply) }, &[]);
    }
    std::process::exit(0);
}

/// Serves Fork: each VMM is this program again, with the agent as it was saved.
fn zygote(control: &OwnedFd, saved: &[u8]) {
    let state = std::env::temp_dir().join(format!("inherited-{}", control.as_raw_fd()));
    std::fs::write(&state, saved).unwrap();
    let socket = control.as_raw_fd();
    while let Some((request, mut fds)) = receive(socket) {
        let Call::Fork(config) = request.call else { panic!("{request:?}") };
        if std::env::temp_dir().join(UNFORKABLE).exists() {
            let message = "fork: a process: Cannot allocate memory".into();
            let failure = Failure { code: FailureCode::HostUnfit, message };
            send(socket, &Message::Response { id: request.id, result: Err(failure) }, &[]);
            continue;
        }
        let log = fds.remove(config.log.0 as usize);
        let control = fds.remove(config.control.0 as usize);
        let mut child = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--ignored", "--exact", "fake_vmm", "--nocapture"])
            .env(INHERITED, &state)
            .stdin(Stdio::from(control))
            .stdout(Stdio::null())
            .stderr(Stdio::from(log))
            .spawn()
            .unwrap();
        let pid = rustix::process::Pid::from_child(&child);
        let pidfd = rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty()).unwrap();
        let reply = Reply::Forked { pid: child.id() };
        send(socket, &Message::Response { id: request.id, result: Ok(reply) }, &[pidfd.as_raw_fd()]);
        std::thread::spawn(move || child.wait().unwrap());
    }
}

/// The agent's sign of life.
fn say_ready() {
    use std::io::Write;
    let (ours, mut theirs) = std::os::unix::net::UnixStream::pair().unwrap();
    theirs.write_all(&[0]).unwrap();
    send(0, &Message::Event(Event::GuestConnection { port: 1024 }), &[ours.as_raw_fd()]);
}

/// How long a snapshot holds the fake up, and no clock says otherwise.
pub(crate) const PAUSE_NS: u64 = 5;

/// Lets a thread write a snapshot, and goes on.
fn save(config: &SnapshotConfig, fds: &[OwnedFd], agent: &Agent) -> Reply {
    use std::io::Write;
    let file = |at: FdIndex| std::fs::File::from(fds[at.0 as usize].try_clone().unwrap());
    let (mut state, mut memory, report) = (file(config.state), file(config.memory), file(config.report));
    let (id, unwritten) = (config.layer_id.clone(), agent.is(UNWRITTEN));
    let saved = agent.saved();
    std::thread::spawn(move || {
        let gate = std::env::temp_dir().join(GATE_FIFO);
        if gate.exists() {
            std::fs::File::open(gate).unwrap();
        }
        state.write_all(&saved).unwrap();
        memory.write_all(b"memory").unwrap();
        let outcome = if unwritten {
            let message = "snapshot: writing the memory file: No space left".into();
            SnapshotReport::Failed(Failure { code: FailureCode::HostUnfit, message })
        } else {
            let layers = vec![SnapshotLayer { id: id.clone(), bytes: 6, crc32: 0 }];
            let (state_bytes, memory_bytes, extents, write_ns) = (19, 6, 1, 1);
            SnapshotReport::Done(SnapshotDone { state_bytes, memory_bytes, extents, layers, write_ns })
        };
        serde_json::to_writer(report, &outcome).unwrap();
        send(0, &Message::Event(Event::DisksSettled { layer_id: id, result: Ok(()) }), &[]);
    });
    let times = SnapshotTimes { pause_ns: PAUSE_NS, ..Default::default() };
    Reply::Snapshotted { times, disks: Vec::new() }
}

struct Process {
    stdin: Option<ChildStdin>,
    stdout: Option<ChildStdout>,
    stderr: Option<ChildStderr>,
    pid: u32,
    spec: Value,
    stdio: container::Stdio,
    started: bool,
    exit: watch::Sender<Option<u32>>,
    attached: HashMap<u8, UnixStream>,
}

impl Process {
    fn created(spec: Value, stdio: container::Stdio) -> Self {
        let (exit, attached) = (watch::Sender::new(None), HashMap::new());
        Self { stdin: None, stdout: None, stderr: None, pid: 0, spec, stdio, started: false, exit, attached }
    }
}

type Processes = Arc<Mutex<HashMap<String, Process>>>;

#[derive(Clone, Default)]
struct Agent {
    processes: Processes,
    cmdline: String,
    /// Its processes begin anew when they are thawed.
    is_restored: bool,
    /// Its machine stands still: signals wait.
    paused: Arc<watch::Sender<bool>>,
}

impl Agent {
    fn is(&self, word: &str) -> bool {
        self.cmdline.contains(word)
    }

    /// What a machine's state has of it: what runs, not how far that has come.
    fn saved(&self) -> Vec<u8> {
        let processes = self.processes.lock().unwrap();
        let process = |(id, process): (&String, &Process)| {
            let stdio = [process.stdio.stdin, process.stdio.stdout, process.stdio.stderr];
            serde_json::json!({ "id": id, "spec": process.spec, "stdio": stdio })
        };
        let processes: Vec<_> = processes.iter().map(process).collect();
        serde_json::to_vec(&serde_json::json!({ "cmdline": self.cmdline, "processes": processes })).unwrap()
    }

    fn restored(state: std::fs::File) -> Self {
        let state: Value = serde_json::from_reader(state).unwrap();
        let process = |saved: &Value| {
            let stdio: [bool; 3] = serde_json::from_value(saved["stdio"].clone()).unwrap();
            let [stdin, stdout, stderr] = stdio;
            let stdio = container::Stdio { stdin, stdout, stderr, ..Default::default() };
            (saved["id"].as_str().unwrap().to_owned(), Process::created(saved["spec"].clone(), stdio))
        };
        let processes = state["processes"].as_array().unwrap().iter().map(process).collect();
        let cmdline = state["cmdline"].as_str().unwrap().into();
        Self { processes: Arc::new(Mutex::new(processes)), cmdline, is_restored: true, ..Self::default() }
    }

    fn signal_all(&self, signal: nix::sys::signal::Signal) {
        for process in self.processes.lock().unwrap().values().filter(|process| process.started) {
            if process.exit.borrow().is_none() {
                host::send_signal(process.pid, signal);
            }
        }
    }
}

async fn vsock(listener: StdListener, agent: Agent) {
    let path = std::env::temp_dir().join(format!("fake-agent-{}", std::process::id()));
    let mut services = sandbox_ttrpc::create_sandbox(Arc::new(agent.clone()));
    services.extend(container_ttrpc::create_container(Arc::new(agent.clone())));
    services.extend(files_ttrpc::create_files(Arc::new(agent.clone())));
    services.extend(network_ttrpc::create_network(Arc::new(agent.clone())));
    let mut server =
        Server::new().bind(&format!("unix://{}", path.display())).unwrap().register_service(services);
    server.start().await.unwrap();
    let listener = UnixListener::from_std(listener).unwrap();
    while let Ok((mut stream, _)) = listener.accept().await {
        let mut line = String::new();
        while !line.ends_with('\n') {
            line.push(char::from(stream.read_u8().await.unwrap()));
        }
        let port: u32 = line.trim().strip_prefix("CONNECT ").unwrap().parse().unwrap();
        stream.write_all(b"OK 1073741824\n").await.unwrap();
        match port {
            RPC_PORT => {
                // One for all calls, and one for each watch.
                let mut rpc = UnixStream::connect(&path).await.unwrap();
                tokio::spawn(async move { copy_bidirectional(&mut stream, &mut rpc).await });
            }
            STDIO_PORT => drop(tokio::spawn(stdio(agent.clone(), stream))),
            other => panic!("port {other}"),
        }
    }
}

async fn stdio(agent: Agent, mut stream: UnixStream) {
    let mut header = [0; HEADER_LEN];
    stream.read_exact(&mut header).await.unwrap();
    let mut body = vec![0; Hello::body_len(&header).unwrap()];
    stream.read_exact(&mut body).await.unwrap();
    let hello = Hello::decode(&header, &body).unwrap();
    if hello.kind == Kind::Changes {
        return stream.write_all(&[UNCHANGED]).await.unwrap();
    }
    // What runs has its streams already, or none.
    let runs = agent.processes.lock().unwrap()[&hello.id].started;
    stream.write_all(&[if runs { REFUSED_NO_SUCH_STREAM } else { ATTACHED }]).await.unwrap();
    if runs {
        return;
    }
    let mut processes = agent.processes.lock().unwrap();
    processes.get_mut(&hello.id).unwrap().attached.insert(hello.kind as u8, stream);
}

fn status(code: ttrpc::Code, message: &str) -> ttrpc::Error {
    ttrpc::Error::RpcStatus(ttrpc::get_status(code, message))
}

#[async_trait]
impl sandbox_ttrpc::Sandbox for Agent {
    async fn setup(
        &self,
        _: &TtrpcContext,
        request: sandbox::SetupRequest,
    ) -> ttrpc::Result<sandbox::SetupResponse> {
        assert!(request.entropy.len() >= 32 && request.wall_clock_ns > 0);
        let gate = std::env::temp_dir().join(SETUP_FIFO);
        if self.is_restored && gate.exists() {
            tokio::task::spawn_blocking(|| std::fs::File::open(gate)).await.unwrap().unwrap();
        }
        Ok(sandbox::SetupResponse::new())
    }

    async fn identify(
        &self,
        _: &TtrpcContext,
        request: sandbox::IdentifyRequest,
    ) -> ttrpc::Result<sandbox::IdentifyResponse> {
        assert!(self.is_restored && !request.hostname.is_empty());
        Ok(sandbox::IdentifyResponse::new())
    }

    async fn info(&self, _: &TtrpcContext, _: sandbox::InfoRequest) -> ttrpc::Result<sandbox::InfoResponse> {
        Ok(sandbox::InfoResponse { started_ns: 5, ready_ns: 9, ..Default::default() })
    }

    /// Does not power off: the shim has to end the VM.
    async fn shutdown(
        &self,
        _: &TtrpcContext,
        request: sandbox::ShutdownRequest,
    ) -> ttrpc::Result<sandbox::ShutdownResponse> {
        assert!(request.grace_ms > 0);
        let exits: Vec<_> = {
            let processes = self.processes.lock().unwrap();
            let running = processes.values().filter(|process| process.started);
            running.map(|process| (process.pid, process.exit.subscribe())).collect()
        };
        for (pid, mut exit) in exits {
            host::send_signal(pid, nix::sys::signal::Signal::SIGTERM);
            exit.wait_for(Option::is_some).await.unwrap();
        }
        std::fs::write(std::env::temp_dir().join(SHUT_DOWN), "").unwrap();
        Ok(sandbox::ShutdownResponse::new())
    }
}

#[async_trait]
impl container_ttrpc::Container for Agent {
    async fn create(
        &self,
        _: &TtrpcContext,
        request: container::CreateRequest,
    ) -> ttrpc::Result<container::CreateResponse> {
        let spec: Value = serde_json::from_slice(&request.spec).unwrap();
        let program = spec["process"]["args"][0].as_str().unwrap();
        let found = ["/bin", "/usr/bin"]
            .iter()
            .any(|dir| Path::new(dir).join(program.trim_start_matches('/')).exists());
        if !found && !Path::new(program).exists() {
            return Err(status(
                ttrpc::Code::NOT_FOUND,
                &format!("exec: \"{program}\": executable file not found in $PATH"),
            ));
        }
        let rootfs = request.rootfs.unwrap();
        assert_eq!(rootfs.writable, "rw0");
        assert_eq!(rootfs.lower.first().map(String::as_str), Some("ro0"));
        let process = Process::created(spec, request.stdio.unwrap());
        self.processes.lock().unwrap().insert(request.id, process);
        Ok(container::CreateResponse { pid: 1, ..Default::default() })
    }

    async fn start(
        &self,
        _: &TtrpcContext,
        request: container::StartRequest,
    ) -> ttrpc::Result<container::StartResponse> {
        if self.is(DEAF) {
            std::future::pending::<()>().await;
        }
        if self.is(GATE) {
            let gate = std::env::temp_dir().join(GATE_FIFO);
            tokio::task::spawn_blocking(|| std::fs::File::open(gate)).await.unwrap().unwrap();
        }
        let mut processes = self.processes.lock().unwrap();
        let process = processes.get_mut(&request.id).unwrap();
        let args: Vec<String> = process.spec["process"]["args"]
            .as_array()
            .unwrap()
            .iter()
            .map(|a| a.as_str().unwrap().into())
            .collect();
        let piped = |wanted: bool| if wanted { Stdio::piped() } else { Stdio::null() };
        // A container's process ends with its VM, also with one that was killed before the
        // signal was asked for.
        let mut child = tokio::process::Command::new("setpriv")
            .args(["--pdeathsig", "KILL", "bash", "-c", r#"[ "$PPID" = "$0" ] && exec "$@""#])
            .arg(std::process::id().to_string())
            .args(&args)
            .stdin(piped(process.stdio.stdin))
            .stdout(piped(process.stdio.stdout))
            .stderr(piped(process.stdio.stderr))
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        process.pid = child.id().unwrap();
        process.started = true;
        if let Some((mut stream, mut pipe)) =
            process.attached.remove(&(Kind::Stdin as u8)).zip(child.stdin.take())
        {
            tokio::spawn(async move { copy(&mut stream, &mut pipe).await });
        }
        if let Some((mut stream, mut pipe)) =
            process.attached.remove(&(Kind::Stdout as u8)).zip(child.stdout.take())
        {
            tokio::spawn(async move { copy(&mut pipe, &mut stream).await });
        }
        if let Some((mut stream, mut pipe)) =
            process.attached.remove(&(Kind::Stderr as u8)).zip(child.stderr.take())
        {
            tokio::spawn(async move { copy(&mut pipe, &mut stream).await });
        }
        let exit = process.exit.clone();
        tokio::spawn(async move {
            let end = child.wait().await.unwrap();
            let code = end.code().or_else(|| end.signal().map(|signal| 128 + signal)).unwrap();
            exit.send_replace(Some(u32::try_from(code).unwrap()));
        });
        Ok(container::StartResponse { pid: process.pid, ..Default::default() })
    }

    async fn state(
        &self,
        _: &TtrpcContext,
        request: container::StateRequest,
    ) -> ttrpc::Result<container::StateResponse> {
        let pid = self.processes.lock().unwrap()[&request.id].pid;
        Ok(container::StateResponse { pid, ..Default::default() })
    }

    async fn wait(
        &self,
        _: &TtrpcContext,
        request: container::WaitRequest,
    ) -> ttrpc::Result<container::WaitResponse> {
        let mut exit = self.processes.lock().unwrap()[&request.id].exit.subscribe();
        let exit_status = exit.wait_for(Option::is_some).await.unwrap().unwrap();
        Ok(container::WaitResponse { exit_status, ..Default::default() })
    }

    async fn signal(
        &self,
        _: &TtrpcContext,
        request: container::SignalRequest,
    ) -> ttrpc::Result<container::SignalResponse> {
        if self.is(DEAF) {
            std::future::pending::<()>().await;
        }
        let mut paused = self.paused.subscribe();
        paused.wait_for(|paused| !*paused).await.unwrap();
        if self.is(IMMORTAL) {
            return Ok(container::SignalResponse::new());
        }
        let processes = self.processes.lock().unwrap();
        let process = &processes[&request.id];
        if !process.started {
            process.exit.send_replace(Some(128 + request.signal));
        } else if process.exit.borrow().is_some() {
            return Err(status(ttrpc::Code::NOT_FOUND, "no such process"));
        } else {
            let signal = nix::sys::signal::Signal::try_from(i32::try_from(request.signal).unwrap()).unwrap();
            host::send_signal(process.pid, signal);
        }
        Ok(container::SignalResponse::new())
    }

    async fn pause(
        &self,
        _: &TtrpcContext,
        request: container::PauseRequest,
    ) -> ttrpc::Result<container::PauseResponse> {
        let pid = self.processes.lock().unwrap()[&request.id].pid;
        // One that stood still before it has asked for its end would outlive its machine.
        let begins = || {
            let line = std::fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            !host::is_zombie(pid) && ["", "setpriv", "bash"].contains(&line.split('\0').next().unwrap())
        };
        while begins() {
            tokio::task::yield_now().await;
        }
        host::send_signal(pid, nix::sys::signal::Signal::SIGSTOP);
        Ok(container::PauseResponse::new())
    }

    async fn rest(
        &self,
        _: &TtrpcContext,
        _: container::RestRequest,
    ) -> ttrpc::Result<container::RestResponse> {
        Ok(container::RestResponse::new())
    }

    async fn resume(
        &self,
        context: &TtrpcContext,
        request: container::ResumeRequest,
    ) -> ttrpc::Result<container::ResumeResponse> {
        if self.is_restored && !self.processes.lock().unwrap()[&request.id].started {
            let start = container::StartRequest { id: request.id, ..Default::default() };
            container_ttrpc::Container::start(self, context, start).await?;
            return Ok(container::ResumeResponse::new());
        }
        host::send_signal(self.processes.lock().unwrap()[&request.id].pid, nix::sys::signal::Signal::SIGCONT);
        Ok(container::ResumeResponse::new())
    }

    async fn delete(
        &self,
        _: &TtrpcContext,
        _: container::DeleteRequest,
    ) -> ttrpc::Result<container::DeleteResponse> {
        Ok(container::DeleteResponse::new())
    }

    async fn stats(
        &self,
        _: &TtrpcContext,
        _: container::StatsRequest,
    ) -> ttrpc::Result<container::StatsResponse> {
        Ok(container::StatsResponse::new())
    }

    async fn pids(
        &self,
        _: &TtrpcContext,
        request: container::PidsRequest,
    ) -> ttrpc::Result<container::PidsResponse> {
        if self.is(DEAF) {
            std::future::pending::<()>().await;
        }
        let pid = self.processes.lock().unwrap()[&request.id].pid;
        let process = |pid| container::ProcessInfo { pid, command: "sh".into(), ..Default::default() };
        // Its init is not the first that it names.
        let processes = vec![process(pid + 1), process(pid)];
        Ok(container::PidsResponse { processes, ..Default::default() })
    }
}

#[async_trait]
impl network_ttrpc::Network for Agent {
    async fn update(
        &self,
        _: &TtrpcContext,
        request: network::NetworkRequest,
    ) -> ttrpc::Result<network::NetworkResponse> {
        if self.is(UNROUTED) {
            let message = "interface eth0: address 10.1.1.2/24: no\x1b room".into();
            let problems = vec![network::Problem { message, ..Default::default() }];
            return Ok(network::NetworkResponse { problems, ..Default::default() });
        }
        if request.name_server {
            tokio::spawn(ask_for_a_name());
        }
        let temporary = std::env::temp_dir().join(".network");
        std::fs::write(&temporary, request.write_to_bytes().unwrap()).unwrap();
        std::fs::rename(temporary, std::env::temp_dir().join(NETWORK)).unwrap();
        Ok(network::NetworkResponse::new())
    }
}

/// A container's question, as the VMM and the agent pass it on.
async fn ask_for_a_name() {
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    let theirs = theirs.into_std().unwrap();
    send(0, &Message::Event(Event::GuestConnection { port: NAMES_PORT }), &[theirs.as_raw_fd()]);
    drop(theirs);
    ours.write_all(b"\0\0\x08question").await.unwrap();
    let mut answer = Vec::new();
    ours.read_to_end(&mut answer).await.unwrap();
    std::fs::write(std::env::temp_dir().join(ANSWER), answer).unwrap();
}

/// Names a file whose stat is refused with words for a terminal.
pub(crate) const HOSTILE: &[u8] = b"/hostile";

#[async_trait]
impl files_ttrpc::Files for Agent {
    async fn stat(
        &self,
        _: &TtrpcContext,
        request: files::StatRequest,
    ) -> ttrpc::Result<files::StatResponse> {
        if request.path == HOSTILE {
            return Err(status(ttrpc::Code::NOT_FOUND, "no \x1b[2Jsuch\nfile"));
        }
        let size = request.path.len() as u64;
        let attributes = Some(files::Attributes { size, ..Default::default() }).into();
        Ok(files::StatResponse { attributes, ..Default::default() })
    }

    /// Two events, and then nothing more.
    async fn watch(
        &self,
        _: &TtrpcContext,
        request: files::WatchRequest,
        events: ServerStreamSender<files::WatchEvent>,
    ) -> ttrpc::Result<()> {
        let event = |kind: Change| files::WatchEvent {
            kind: kind.into(),
            path: request.path.clone(),
            ..Default::default()
        };
        events.send(&event(Change::WATCHING)).await?;
        events.send(&event(Change::MODIFIED)).await?;
        std::future::pending().await
    }
}
