//! The sole client of the guest's agent: ttrpc over vsock, and the opening of stdio streams.
//!
//! The guest is not trusted: what it answers is bounded and cleaned here, before anybody sees
//! it. ttrpc itself takes no frame above 4 MiB.

mod network;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use spore_agent_api::files::MAX_EVENT_PATH;
use spore_agent_api::stream::{self, Hello, Kind};
use spore_agent_api::v1::files::{WatchEvent, WatchRequest};
use spore_agent_api::v1::files_ttrpc::FilesClient;
use spore_agent_api::v1::network_ttrpc::NetworkClient;
use spore_agent_api::v1::{container, container_ttrpc, sandbox, sandbox_ttrpc};
use spore_agent_api::{RPC_PORT, STDIO_PORT};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use ttrpc::Code;
use ttrpc::r#async::transport::Socket;
use ttrpc::r#async::{Client, ClientStreamReceiver};
use ttrpc::context::{Context, with_duration};

use crate::clone::Identity;
use crate::network::mirror::Mirror;
use crate::vm::Vm;

/// Most calls are answered in microseconds; a guest that takes longer is in trouble.
const CALL: Duration = Duration::from_secs(30);
/// How long a guest may take to write back what it has of its disk in memory.
const WRITTEN_BACK: Duration = Duration::from_secs(120);
/// Creating formats nothing but mounts, looks up and forks; a small guest under load is slow.
const CREATE: Duration = Duration::from_secs(120);
/// Facts for the timeline, which wait for nothing in the guest.
const INFO: Duration = Duration::from_secs(2);
/// How long a stream may be held by a connection that was reset, and how often it is asked for.
const RELEASE: Duration = Duration::from_secs(2);
const ASK_AGAIN: Duration = Duration::from_millis(2);
/// Bytes for the guest's random pool.
const ENTROPY: usize = 64;
/// Most pids of a container that are believed, and most bytes of a text.
const MOST_PIDS: usize = 4096;
const MOST_TEXT: usize = 8 * 1024;
/// Most problems of an update of the network that are told.
const MOST_PROBLEMS: usize = 8;
/// Most bytes of an exec's or a command's name.
const MOST_NAME: usize = 128;

#[derive(Debug, thiserror::Error)]
pub(crate) enum GuestError {
    /// Worded as runc's: Docker finds "executable file not found" behind this prefix.
    #[error("OCI runtime create failed: {message}")]
    Create { message: String },
    /// Worded as runc's too.
    #[error("OCI runtime exec failed: exec failed: unable to start container process: {message}")]
    Exec { message: String },
    #[error("guest agent: {call}: {message}")]
    Refused { call: &'static str, code: Code, message: String },
    #[error("guest agent: {call}: connection lost: {detail}")]
    Lost { call: &'static str, detail: String },
    #[error("guest agent: {what}: {detail}")]
    Connect { what: &'static str, detail: String },
}

impl GuestError {
    /// Whether the guest has not answered, as opposed to refused.
    pub(crate) fn is_silence(&self) -> bool {
        match self {
            Self::Lost { .. } | Self::Connect { .. } => true,
            Self::Refused { code, .. } => *code == Code::DEADLINE_EXCEEDED,
            Self::Create { .. } | Self::Exec { .. } => false,
        }
    }
}

/// What a process ended with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct GuestExit {
    pub(crate) status: u32,
    /// Guest wall clock in nanoseconds since the epoch.
    pub(crate) at_ns: i64,
}

/// The disks of a root file system, by serial.
#[derive(Debug, Clone, Default)]
pub(crate) struct GuestRootfs {
    /// Uppermost first.
    pub(crate) lower: Vec<String>,
    pub(crate) writable: String,
}

/// Which streams a process has.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct GuestStdio {
    pub(crate) stdin: bool,
    pub(crate) stdout: bool,
    pub(crate) stderr: bool,
    pub(crate) terminal: bool,
}

impl From<GuestStdio> for container::Stdio {
    fn from(stdio: GuestStdio) -> Self {
        let GuestStdio { stdin, stdout, stderr, terminal } = stdio;
        Self { stdin, stdout, stderr, terminal, ..Default::default() }
    }
}

/// A process of a container, as the guest tells it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct GuestProcess {
    /// In the guest.
    pub(crate) pid: u32,
    /// Of the exec whose first process it is, else empty.
    pub(crate) exec_id: String,
    pub(crate) command: String,
}

/// A connection to the agent.
pub(crate) struct Guest {
    vm: Arc<Vm>,
    sandbox: sandbox_ttrpc::SandboxClient,
    container: container_ttrpc::ContainerClient,
    files: FilesClient,
    network: NetworkClient,
}

/// Changes of files, as the guest tells them. Its connection is its own: with it the watch ends.
pub(crate) struct Watch(ClientStreamReceiver<WatchEvent>);

impl Watch {
    /// The next event; `None` behind the last.
    pub(crate) async fn next(&mut self) -> Result<Option<WatchEvent>, GuestError> {
        let event = self.0.recv().await.map_err(|error| failed("watch", error))?;
        match event.as_ref().map(|event| event.path.len()).filter(|length| *length > MAX_EVENT_PATH) {
            None => Ok(event),
            Some(length) => Err(GuestError::Connect {
                what: "watch",
                detail: format!("it tells of a path of {length} bytes, at most {MAX_EVENT_PATH} are allowed"),
            }),
        }
    }
}

async fn dial(vm: &Vm) -> Result<Client, GuestError> {
    let stream = vm.connect(RPC_PORT).await.map_err(|error| GuestError::Connect {
        what: "connect to its service port",
        detail: error.to_string(),
    })?;
    Ok(Client::new(Socket::from(stream)))
}

impl Guest {
    pub(crate) async fn connect(vm: Arc<Vm>) -> Result<Self, GuestError> {
        let client = dial(&vm).await?;
        Ok(Self {
            vm,
            sandbox: sandbox_ttrpc::SandboxClient::new(client.clone()),
            container: container_ttrpc::ContainerClient::new(client.clone()),
            files: FilesClient::new(client.clone()),
            network: NetworkClient::new(client),
        })
    }

    /// The guest's file service. Its answers go through [`Guest::answered`].
    pub(crate) fn files(&self) -> (&FilesClient, Context) {
        (&self.files, with_duration(CALL))
    }

    /// What a call of the file service has come to.
    pub(crate) fn answered<T>(call: &'static str, answer: ttrpc::Result<T>) -> Result<T, GuestError> {
        answer.map_err(|error| failed(call, error))
    }

    /// Begins to watch. What is refused is told by the first event.
    pub(crate) async fn watch(&self, request: &WatchRequest) -> Result<Watch, GuestError> {
        let client = FilesClient::new(dial(&self.vm).await?);
        let events = client.watch(Context::default(), request).await;
        events.map(Watch).map_err(|error| failed("watch", error))
    }

    /// Gives the guest its name, the time and randomness.
    pub(crate) async fn setup(&self, hostname: &str) -> Result<(), GuestError> {
        let mut entropy = vec![0; ENTROPY];
        let random = std::fs::File::open("/dev/urandom")
            .and_then(|mut file| std::io::Read::read_exact(&mut file, &mut entropy));
        random
            .map_err(|error| GuestError::Connect { what: "read /dev/urandom", detail: error.to_string() })?;
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
        let request = sandbox::SetupRequest {
            hostname: hostname.into(),
            wall_clock_ns: i64::try_from(now.as_nanos()).unwrap_or(0),
            entropy,
            ..Default::default()
        };
        self.sandbox
            .setup(with_duration(CALL), &request)
            .await
            .map(drop)
            .map_err(|error| failed("set-up", error))
    }

    /// Gives a paused container of a clone what is its own; returns how many connections were reset.
    pub(crate) async fn identify(&self, id: &str, identity: &Identity) -> Result<u32, GuestError> {
        let (id, hostname) = (id.into(), identity.hostname.clone());
        let request = sandbox::IdentifyRequest { id, hostname, ..Default::default() };
        match self.sandbox.identify(with_duration(CALL), &request).await {
            Ok(answer) => Ok(answer.sockets),
            Err(error) => Err(match failed("identify", error) {
                // The agent is in the snapshot.
                GuestError::Refused { call, code: code @ Code::UNIMPLEMENTED, .. } => {
                    let message = "the snapshot was taken with an agent that cannot give a clone an identity of its own; take another one".into();
                    GuestError::Refused { call, code, message }
                }
                other => other,
            }),
        }
    }

    pub(crate) async fn create(
        &self,
        id: &str,
        spec: Vec<u8>,
        rootfs: GuestRootfs,
        stdio: GuestStdio,
    ) -> Result<(), GuestError> {
        let request = container::CreateRequest {
            id: id.into(),
            spec,
            rootfs: Some(container::Rootfs {
                lower: rootfs.lower,
                writable: rootfs.writable,
                ..Default::default()
            })
            .into(),
            stdio: Some(stdio.into()).into(),
            ..Default::default()
        };
        match self.container.create(with_duration(CREATE), &request).await {
            Ok(_) => Ok(()),
            Err(error) => Err(match failed("create", error) {
                GuestError::Refused { message, .. } => GuestError::Create { message },
                other => other,
            }),
        }
    }

    /// Prepares a further process; `process` is its OCI process object.
    pub(crate) async fn exec(
        &self,
        id: &str,
        exec_id: &str,
        process: Vec<u8>,
        stdio: GuestStdio,
    ) -> Result<(), GuestError> {
        let (id, exec_id) = (id.into(), exec_id.into());
        let stdio = Some(stdio.into()).into();
        let request = container::ExecRequest { id, exec_id, process, stdio, ..Default::default() };
        let answer = self.container.exec(with_duration(CALL), &request).await;
        answer.map(drop).map_err(|error| failed("exec", error))
    }

    /// Lets the container's init, or a prepared exec, run.
    pub(crate) async fn start(&self, id: &str, exec_id: &str) -> Result<(), GuestError> {
        let request =
            container::StartRequest { id: id.into(), exec_id: exec_id.into(), ..Default::default() };
        match self
            .container
            .start(with_duration(CREATE), &request)
            .await
            .map_err(|error| failed("start", error))
        {
            Ok(_) => Ok(()),
            // Its executable, its user, its directory.
            Err(GuestError::Refused { code: Code::INVALID_ARGUMENT | Code::INTERNAL, message, .. })
                if !exec_id.is_empty() =>
            {
                Err(GuestError::Exec { message })
            }
            Err(error) => Err(error),
        }
    }

    /// Makes the guest's network what `mirror` says; returns what its kernel refused.
    pub(crate) async fn update_network(&self, mirror: &Mirror) -> Result<Vec<String>, GuestError> {
        let answer = self.network.update(with_duration(CALL), &network::request(mirror)).await;
        let problems = answer.map_err(|error| failed("network", error))?.problems;
        Ok(problems.into_iter().take(MOST_PROBLEMS).map(|problem| clean(&problem.message)).collect())
    }

    /// Answers when the process has ended.
    pub(crate) async fn wait(&self, id: &str, exec_id: &str) -> Result<GuestExit, GuestError> {
        let request = container::WaitRequest { id: id.into(), exec_id: exec_id.into(), ..Default::default() };
        // Without a deadline: a container may run for years.
        let answer =
            self.container.wait(Context::default(), &request).await.map_err(|error| failed("wait", error))?;
        Ok(GuestExit { status: exit_status(answer.exit_status), at_ns: answer.exited_at_ns })
    }

    pub(crate) async fn signal(
        &self,
        id: &str,
        exec_id: &str,
        signal: u32,
        all: bool,
    ) -> Result<(), GuestError> {
        let (id, exec_id) = (id.into(), exec_id.into());
        let request = container::SignalRequest { id, exec_id, signal, all, ..Default::default() };
        let answer = self.container.signal(with_duration(CALL), &request).await;
        answer.map(drop).map_err(|error| failed("signal", error))
    }

    /// Of a container: unmounts and syncs its disks; when this is answered they are clean.
    pub(crate) async fn delete(&self, id: &str, exec_id: &str) -> Result<(), GuestError> {
        let request =
            container::DeleteRequest { id: id.into(), exec_id: exec_id.into(), ..Default::default() };
        let answer = self.container.delete(with_duration(CALL), &request).await;
        answer.map(drop).map_err(|error| failed("delete", error))
    }

    pub(crate) async fn resize(
        &self,
        id: &str,
        exec_id: &str,
        width: u32,
        height: u32,
    ) -> Result<(), GuestError> {
        let (id, exec_id) = (id.into(), exec_id.into());
        let request = container::ResizeRequest { id, exec_id, width, height, ..Default::default() };
        let answer = self.container.resize(with_duration(CALL), &request).await;
        answer.map(drop).map_err(|error| failed("resize", error))
    }

    /// Freezes the container's processes.
    pub(crate) async fn pause(&self, id: &str) -> Result<(), GuestError> {
        let request = container::PauseRequest { id: id.into(), ..Default::default() };
        let answer = self.container.pause(with_duration(CALL), &request).await;
        answer.map(drop).map_err(|error| failed("pause", error))
    }

    pub(crate) async fn resume(&self, id: &str) -> Result<(), GuestError> {
        let request = container::ResumeRequest { id: id.into(), ..Default::default() };
        let answer = self.container.resume(with_duration(CALL), &request).await;
        answer.map(drop).map_err(|error| failed("resume", error))
    }

    /// Has the streams of a paused container part from their connections, and, with `wait`, waits until they have and its disk is written back.
    pub(crate) async fn rest(&self, id: &str, wait: bool) -> Result<(), GuestError> {
        let request = container::RestRequest { id: id.into(), wait, ..Default::default() };
        let deadline = if wait { WRITTEN_BACK } else { CALL };
        let answer = self.container.rest(with_duration(deadline), &request).await;
        answer.map(drop).map_err(|error| failed("rest", error))
    }

    /// The container's cgroup files and what they say.
    pub(crate) async fn stats(&self, id: &str) -> Result<HashMap<String, String>, GuestError> {
        let request = container::StatsRequest { id: id.into(), ..Default::default() };
        let answer = self.container.stats(with_duration(CALL), &request).await;
        Ok(answer.map_err(|error| failed("stats", error))?.files)
    }

    /// Changes limits; `resources` is an OCI linux.resources object.
    pub(crate) async fn update(&self, id: &str, resources: Vec<u8>) -> Result<(), GuestError> {
        let request = container::UpdateRequest { id: id.into(), resources, ..Default::default() };
        let answer = self.container.update(with_duration(CALL), &request).await;
        answer.map(drop).map_err(|error| failed("update", error))
    }

    /// Answers when more than `seen` processes were killed for lack of memory.
    pub(crate) async fn wait_oom(&self, id: &str, seen: u64) -> Result<u64, GuestError> {
        let request = container::WaitOomRequest { id: id.into(), seen, ..Default::default() };
        let answer = self.container.wait_oom(Context::default(), &request).await;
        Ok(answer.map_err(|error| failed("wait for OOM", error))?.kills)
    }

    /// Kills what runs in the guest, unmounts and syncs its disks; when this is answered they are
    /// clean and the guest powers itself off. Processes get `grace` after SIGTERM.
    pub(crate) async fn shutdown(&self, grace: Duration, deadline: Duration) -> Result<(), GuestError> {
        let grace_ms = u32::try_from(grace.as_millis()).unwrap_or(u32::MAX);
        let request = sandbox::ShutdownRequest { grace_ms, ..Default::default() };
        self.sandbox
            .shutdown(with_duration(deadline), &request)
            .await
            .map(drop)
            .map_err(|error| failed("shutdown", error))
    }

    /// How long the agent took from its first instruction to being ready, by the guest's clock.
    pub(crate) async fn agent_boot_ns(&self) -> Result<Option<u64>, GuestError> {
        let answer = self.sandbox.info(with_duration(INFO), &sandbox::InfoRequest::new()).await;
        let info = answer.map_err(|error| failed("info", error))?;
        Ok(info.ready_ns.checked_sub(info.started_ns))
    }

    /// The container's processes, its init among them; at most the first 4096.
    pub(crate) async fn pids(&self, id: &str) -> Result<Vec<GuestProcess>, GuestError> {
        let request = container::PidsRequest { id: id.into(), ..Default::default() };
        let answer = self.container.pids(with_duration(CALL), &request).await;
        Ok(believed(answer.map_err(|error| failed("pids", error))?.processes))
    }

    /// The pid of the container's init in the guest.
    pub(crate) async fn init_pid(&self, id: &str) -> Result<u32, GuestError> {
        let request = container::StateRequest { id: id.into(), ..Default::default() };
        let answer = self
            .container
            .state(with_duration(CALL), &request)
            .await
            .map_err(|error| failed("state", error))?;
        Ok(answer.pid)
    }

    /// Opens one stdio stream of a process, if it has it: one that is restored has those that it was created with.
    pub(crate) async fn open_stdio(
        &self,
        id: &str,
        exec_id: &str,
        kind: Kind,
    ) -> Result<Option<UnixStream>, GuestError> {
        let fail = |detail: String| GuestError::Connect { what: "open a stdio stream", detail };
        let deadline = tokio::time::Instant::now() + RELEASE;
        loop {
            let (stream, answer) = self.open_stream(id, exec_id, kind).await.map_err(fail)?;
            return match answer {
                stream::ATTACHED => Ok(Some(stream)),
                stream::REFUSED_NO_SUCH_STREAM => Ok(None),
                // The agent of a guest that was restored may still have to notice that its connections are gone.
                stream::REFUSED_ALREADY_ATTACHED if tokio::time::Instant::now() < deadline => {
                    tokio::time::sleep(ASK_AGAIN).await;
                    continue;
                }
                stream::REFUSED_ALREADY_ATTACHED => Err(fail("the stream is attached already".into())),
                stream::REFUSED_NO_SUCH_PROCESS => Err(fail("the guest knows no such process".into())),
                other => Err(fail(format!("refused with code {other}"))),
            };
        }
    }

    /// Opens the archive of what a container that does not run has changed; `None` when it has
    /// changed nothing.
    pub(crate) async fn open_changes(
        &self,
        id: &str,
    ) -> Result<Option<std::os::unix::net::UnixStream>, GuestError> {
        let fail = |detail: String| GuestError::Connect { what: "ask for the container's changes", detail };
        let (stream, answer) = self.open_stream(id, "", Kind::Changes).await.map_err(fail)?;
        match answer {
            stream::UNCHANGED => Ok(None),
            stream::ATTACHED => {
                let blocking = stream.into_std().and_then(|stream| {
                    stream.set_nonblocking(false)?;
                    Ok(stream)
                });
                blocking.map(Some).map_err(|error| fail(error.to_string()))
            }
            other => Err(fail(format!("refused with code {other}"))),
        }
    }

    /// A stream and what the agent answered.
    async fn open_stream(&self, id: &str, exec_id: &str, kind: Kind) -> Result<(UnixStream, u8), String> {
        let hello = Hello { kind, id: id.into(), exec_id: exec_id.into() };
        let hello = hello.encode().map_err(|error| error.to_string())?;
        let open = async {
            let mut stream = self.vm.connect(STDIO_PORT).await?;
            stream.write_all(&hello).await?;
            let answer = stream.read_u8().await?;
            Ok::<_, std::io::Error>((stream, answer))
        };
        let outcome = tokio::time::timeout(CALL, open).await.map_err(|_| "timed out".to_owned())?;
        outcome.map_err(|error| error.to_string())
    }
}

fn failed(call: &'static str, error: ttrpc::Error) -> GuestError {
    match error {
        ttrpc::Error::RpcStatus(status) => {
            GuestError::Refused { call, code: status.code(), message: clean(status.message()) }
        }
        other => GuestError::Lost { call, detail: clean(&other.to_string()) },
    }
}

/// A status is a byte. What is more than that is no status that a process can have: the
/// highest is the nearest.
fn exit_status(status: u32) -> u32 {
    status.min(u32::from(u8::MAX))
}

fn believed(processes: Vec<container::ProcessInfo>) -> Vec<GuestProcess> {
    let short = |text: &str| clean(&text[..text.floor_char_boundary(MOST_NAME)]);
    let told = processes.into_iter().take(MOST_PIDS).map(|process| GuestProcess {
        pid: process.pid,
        exec_id: short(&process.exec_id),
        command: short(&process.command),
    });
    told.collect()
}

/// The guest's words as they may stand in an error or a log: at most 8 KiB, on one line, and
/// nothing that a terminal would obey.
pub fn clean(text: &str) -> String {
    let shown = &text[..text.floor_char_boundary(MOST_TEXT)];
    shown
        .chars()
        .map(|c| if matches!(c, '\n' | '\r' | '\t') { ' ' } else { c })
        .filter(|c| !c.is_control())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guests_words_are_cut_and_cleaned_in_every_error() {
        let hostile = format!("\x1b]0;owned\x07no\nsuch {}", "ü".repeat(MOST_TEXT));
        let status = ttrpc::get_status(Code::NOT_FOUND, &hostile);
        let error = failed("signal", ttrpc::Error::RpcStatus(status));
        let GuestError::Refused { code: Code::NOT_FOUND, message, .. } = error else { panic!("{error}") };
        assert!(message.starts_with("]0;ownedno such ü"), "{message}");
        assert!(message.len() <= MOST_TEXT && !message.contains(char::is_control));
        let error = failed("wait", ttrpc::Error::Others(hostile));
        let GuestError::Lost { detail, .. } = error else { panic!("{error}") };
        assert!(detail.len() <= MOST_TEXT && !detail.contains(char::is_control));
    }

    #[test]
    fn statuses_and_pids_are_bounded() {
        assert_eq!((exit_status(0), exit_status(143), exit_status(255)), (0, 143, 255));
        assert_eq!((exit_status(256), exit_status(u32::MAX)), (255, 255));
        let process =
            |pid| container::ProcessInfo { pid, command: "\x1b[2J".repeat(100), ..Default::default() };
        let believed = believed((0..10_000).map(process).collect());
        assert_eq!(believed.len(), MOST_PIDS);
        assert!(believed[7].pid == 7 && believed[7].command.len() <= MOST_NAME);
        assert!(!believed[7].command.contains('\x1b'));
    }
}
