//! The ttrpc services: decode, delegate, encode. Sole mapping of [`AgentError`] to status
//! codes.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use protobuf::EnumOrUnknown;
use spore_agent_api::API_VERSION;
use spore_agent_api::v1::container as pb;
use spore_agent_api::v1::container_ttrpc::{self, create_container};
use spore_agent_api::v1::files_ttrpc::create_files;
use spore_agent_api::v1::network_ttrpc::create_network;
use spore_agent_api::v1::sandbox as sb;
use spore_agent_api::v1::sandbox_ttrpc::{self, create_sandbox};
use tokio::sync::Notify;
use ttrpc::r#async::TtrpcContext;
use ttrpc::r#async::transport::Listener;
use ttrpc::{Code, get_status};

use crate::container::life::Container;
use crate::container::oom;
use crate::container::process::Status;
use crate::container::registry::{CreateContainer, ExecProcess, Registry};
use crate::error::AgentError;
use crate::files::service::Files;
use crate::identity;
use crate::identity::generation::Generation;
use crate::network::service::Network;
use crate::say;
use crate::stdio::make::Wanted;
use crate::vsock::{VsockListener, VsockStream};

/// Between the answer to Shutdown and the power-off, for the answer to leave the guest: vsock
/// has no way to ask whether it has.
const ANSWER_GRACE: Duration = Duration::from_millis(50);
const MIN_ENTROPY: usize = 32;
const MAX_ENTROPY: usize = 4096;

/// When the agent began and when it was ready, CLOCK_MONOTONIC nanoseconds.
pub struct Clock {
    pub started_ns: u64,
    pub ready_ns: AtomicU64,
}

/// The running services.
pub struct Service {
    server: ttrpc::r#async::Server,
    ended: Arc<Notify>,
}

impl Service {
    /// Returns once a Shutdown request has been served and answered.
    pub async fn shut_down(&self) {
        self.ended.notified().await;
        tokio::time::sleep(ANSWER_GRACE).await;
        let _ = &self.server;
    }
}

/// Serves every service on `listener`.
pub async fn serve(
    listener: VsockListener,
    registry: Arc<Registry>,
    clock: Arc<Clock>,
    generation: Arc<Generation>,
) -> io::Result<Service> {
    let ended = Arc::new(Notify::new());
    let (own, end) = (Arc::clone(&registry), Arc::clone(&ended));
    let sandbox = Arc::new(Sandbox { registry: own, clock, generation, ended: end });
    let connections = futures::stream::unfold(listener, |listener| async move {
        let accepted = listener.accept().await.and_then(VsockStream::new);
        Some((accepted, listener))
    });
    let mut server = ttrpc::r#async::Server::new()
        .add_listener(Listener::new(connections))
        .register_service(create_sandbox(sandbox))
        .register_service(create_network(Arc::new(Network::default())))
        .register_service(create_files(Arc::new(Files::new(Arc::clone(&registry)))))
        .register_service(create_container(Arc::new(Containers { registry })));
    server.start().await.map_err(io::Error::other)?;
    Ok(Service { server, ended })
}

pub(crate) fn status(error: AgentError) -> ttrpc::Error {
    let code = match &error {
        AgentError::NotFound(_) => Code::NOT_FOUND,
        AgentError::AlreadyExists(_) => Code::ALREADY_EXISTS,
        AgentError::InvalidArgument(_) => Code::INVALID_ARGUMENT,
        AgentError::FailedPrecondition(_) => Code::FAILED_PRECONDITION,
        AgentError::Unimplemented(_) => Code::UNIMPLEMENTED,
        AgentError::Internal(_) => Code::INTERNAL,
    };
    ttrpc::Error::RpcStatus(get_status(code, error))
}

fn internal(what: &str, error: impl std::fmt::Display) -> ttrpc::Error {
    status(AgentError::internal(what, error))
}

/// Runs work to its end even if its client goes away.
pub(crate) async fn detached<T: Send + 'static>(
    work: impl Future<Output = Result<T, AgentError>> + Send + 'static,
) -> ttrpc::Result<T> {
    match tokio::spawn(work).await {
        Ok(result) => result.map_err(status),
        Err(error) => Err(internal("task", error)),
    }
}

struct Containers {
    registry: Arc<Registry>,
}

impl Containers {
    fn find(&self, id: &str) -> ttrpc::Result<Arc<Container>> {
        self.registry.find(id).map_err(status)
    }
}

/// Which streams, and whether they are a terminal.
fn wanted(stdio: pb::Stdio) -> ttrpc::Result<(Wanted, bool)> {
    if stdio.terminal && stdio.stderr {
        let message = "stdio: a terminal has no stderr of its own".into();
        return Err(status(AgentError::InvalidArgument(message)));
    }
    Ok((Wanted { stdin: stdio.stdin, stdout: stdio.stdout, stderr: stdio.stderr }, stdio.terminal))
}

#[async_trait]
impl container_ttrpc::Container for Containers {
    async fn create(
        &self,
        _: &TtrpcContext,
        request: pb::CreateRequest,
    ) -> ttrpc::Result<pb::CreateResponse> {
        let registry = Arc::clone(&self.registry);
        let rootfs = request.rootfs.unwrap_or_default();
        let (streams, terminal) = wanted(request.stdio.unwrap_or_default())?;
        let request = CreateContainer {
            id: request.id,
            spec: request.spec,
            lower: rootfs.lower,
            writable: rootfs.writable,
            streams,
            terminal,
        };
        let pid = detached(async move { registry.create(request).await }).await?;
        Ok(pb::CreateResponse { pid, ..Default::default() })
    }

    async fn start(&self, _: &TtrpcContext, request: pb::StartRequest) -> ttrpc::Result<pb::StartResponse> {
        let registry = Arc::clone(&self.registry);
        let pid = detached(async move { registry.start(&request.id, &request.exec_id).await }).await?;
        Ok(pb::StartResponse { pid, ..Default::default() })
    }

    async fn state(&self, _: &TtrpcContext, request: pb::StateRequest) -> ttrpc::Result<pb::StateResponse> {
        let (state, paused) = self.registry.state(&request.id, &request.exec_id).map_err(status)?;
        let status = match state.status {
            Status::Created => pb::Status::CREATED,
            Status::Running if paused => pb::Status::PAUSED,
            Status::Running => pb::Status::RUNNING,
            Status::Stopped => pb::Status::STOPPED,
        };
        Ok(pb::StateResponse {
            status: EnumOrUnknown::new(status),
            pid: state.pid,
            exit_status: state.exit.map_or(0, |exit| exit.status),
            exited_at_ns: state.exit.map_or(0, |exit| exit.at_ns),
            ..Default::default()
        })
    }

    async fn wait(&self, _: &TtrpcContext, request: pb::WaitRequest) -> ttrpc::Result<pb::WaitResponse> {
        let exit = self.registry.wait(&request.id, &request.exec_id).await.map_err(status)?;
        Ok(pb::WaitResponse { exit_status: exit.status, exited_at_ns: exit.at_ns, ..Default::default() })
    }

    async fn signal(
        &self,
        _: &TtrpcContext,
        request: pb::SignalRequest,
    ) -> ttrpc::Result<pb::SignalResponse> {
        let sent = self.registry.signal(&request.id, &request.exec_id, request.signal, request.all);
        sent.map_err(status)?;
        Ok(pb::SignalResponse::default())
    }

    async fn delete(
        &self,
        _: &TtrpcContext,
        request: pb::DeleteRequest,
    ) -> ttrpc::Result<pb::DeleteResponse> {
        let registry = Arc::clone(&self.registry);
        let exit = detached(async move { registry.delete(&request.id, &request.exec_id).await }).await?;
        Ok(pb::DeleteResponse {
            exit_status: exit.map_or(0, |exit| exit.status),
            exited_at_ns: exit.map_or(0, |exit| exit.at_ns),
            ..Default::default()
        })
    }

    async fn pids(&self, _: &TtrpcContext, request: pb::PidsRequest) -> ttrpc::Result<pb::PidsResponse> {
        let pids = self.find(&request.id)?.pids().map_err(status)?;
        let processes = pids.into_iter().map(|process| pb::ProcessInfo {
            pid: process.pid,
            exec_id: process.exec_id,
            command: process.command,
            ..Default::default()
        });
        Ok(pb::PidsResponse { processes: processes.collect(), ..Default::default() })
    }

    async fn exec(&self, _: &TtrpcContext, request: pb::ExecRequest) -> ttrpc::Result<pb::ExecResponse> {
        let registry = Arc::clone(&self.registry);
        let (streams, terminal) = wanted(request.stdio.unwrap_or_default())?;
        let process = ExecProcess { process: request.process, streams, terminal };
        detached(async move { registry.exec(&request.id, &request.exec_id, process).await }).await?;
        Ok(pb::ExecResponse::default())
    }

    async fn resize(
        &self,
        _: &TtrpcContext,
        request: pb::ResizeRequest,
    ) -> ttrpc::Result<pb::ResizeResponse> {
        let resized = self.registry.resize(&request.id, &request.exec_id, request.width, request.height);
        resized.map_err(status)?;
        Ok(pb::ResizeResponse::default())
    }

    async fn pause(&self, _: &TtrpcContext, request: pb::PauseRequest) -> ttrpc::Result<pb::PauseResponse> {
        let container = self.find(&request.id)?;
        detached(async move { container.freeze(true).await }).await?;
        Ok(pb::PauseResponse::default())
    }

    async fn resume(
        &self,
        _: &TtrpcContext,
        request: pb::ResumeRequest,
    ) -> ttrpc::Result<pb::ResumeResponse> {
        let container = self.find(&request.id)?;
        detached(async move { container.freeze(false).await }).await?;
        Ok(pb::ResumeResponse::default())
    }

    async fn rest(&self, _: &TtrpcContext, request: pb::RestRequest) -> ttrpc::Result<pb::RestResponse> {
        let container = self.find(&request.id)?;
        if !container.is_paused() {
            let message = format!("container {}: it has to be paused before it comes to rest", request.id);
            return Err(status(AgentError::FailedPrecondition(message)));
        }
        let parting = self.registry.streams.part(&request.id);
        if request.wait {
            parting.done().await;
            // A machine that is never woken leaves a disk that has everything.
            let written = tokio::task::spawn_blocking(nix::unistd::sync).await;
            written.map_err(|error| internal("write disks back", error))?;
        }
        Ok(pb::RestResponse::default())
    }

    async fn stats(&self, _: &TtrpcContext, request: pb::StatsRequest) -> ttrpc::Result<pb::StatsResponse> {
        let files = self.find(&request.id)?.stats();
        Ok(pb::StatsResponse { files, ..Default::default() })
    }

    async fn update(
        &self,
        _: &TtrpcContext,
        request: pb::UpdateRequest,
    ) -> ttrpc::Result<pb::UpdateResponse> {
        let container = self.find(&request.id)?;
        let resources = serde_json::from_slice(&request.resources).map_err(|error| {
            status(AgentError::InvalidArgument(format!("linux.resources: malformed: {error}")))
        })?;
        detached(async move { container.update(resources).await }).await?;
        Ok(pb::UpdateResponse::default())
    }

    async fn wait_oom(
        &self,
        _: &TtrpcContext,
        request: pb::WaitOomRequest,
    ) -> ttrpc::Result<pb::WaitOomResponse> {
        let container = self.find(&request.id)?;
        let kills = oom::wait(&container, request.seen).await.map_err(status)?;
        Ok(pb::WaitOomResponse { kills, ..Default::default() })
    }
}

struct Sandbox {
    registry: Arc<Registry>,
    clock: Arc<Clock>,
    generation: Arc<Generation>,
    ended: Arc<Notify>,
}

#[async_trait]
impl sandbox_ttrpc::Sandbox for Sandbox {
    async fn setup(&self, _: &TtrpcContext, request: sb::SetupRequest) -> ttrpc::Result<sb::SetupResponse> {
        let hostname = if request.hostname.is_empty() { "spore" } else { &request.hostname };
        let length = request.entropy.len();
        if length != 0 && !(MIN_ENTROPY..=MAX_ENTROPY).contains(&length) {
            return Err(status(AgentError::InvalidArgument(format!(
                "entropy: {length} bytes, {MIN_ENTROPY} to {MAX_ENTROPY} are allowed"
            ))));
        }
        nix::unistd::sethostname(hostname).map_err(|error| match error {
            nix::errno::Errno::EINVAL => status(AgentError::InvalidArgument(format!(
                "hostname \"{}\": at most 64 bytes are allowed",
                hostname.escape_default()
            ))),
            error => internal("set hostname", error.desc()),
        })?;
        if let Ok(since_epoch @ 1..) = u64::try_from(request.wall_clock_ns) {
            let time = nix::sys::time::TimeSpec::from_duration(Duration::from_nanos(since_epoch));
            nix::time::clock_settime(nix::time::ClockId::CLOCK_REALTIME, time)
                .map_err(|error| internal("set the clock", error.desc()))?;
        }
        if length != 0 {
            use std::os::fd::AsFd;
            let random = std::fs::File::options().write(true).open("/dev/random");
            random
                .and_then(|random| crate::sys::add_entropy(random.as_fd(), &request.entropy))
                .map_err(|error| internal("add entropy", error))?;
        }
        let renewed = identity::renew(Path::new(identity::BOOT_ID)).and_then(|_| self.generation.renew());
        renewed.map_err(|error| internal("renew boot id and generation", error))?;
        Ok(sb::SetupResponse::default())
    }

    async fn identify(
        &self,
        _: &TtrpcContext,
        request: sb::IdentifyRequest,
    ) -> ttrpc::Result<sb::IdentifyResponse> {
        let container = self.registry.find(&request.id).map_err(status)?;
        let reset = detached(identity::identify(container, request.hostname)).await?;
        let sockets = u32::try_from(reset).unwrap_or(u32::MAX);
        Ok(sb::IdentifyResponse { sockets, ..Default::default() })
    }

    async fn info(&self, _: &TtrpcContext, _: sb::InfoRequest) -> ttrpc::Result<sb::InfoResponse> {
        let kernel = nix::sys::utsname::uname().map_err(|error| internal("uname", error.desc()))?;
        let memory =
            std::fs::read_to_string("/proc/meminfo").map_err(|error| internal("/proc/meminfo", error))?;
        Ok(sb::InfoResponse {
            api_version: API_VERSION,
            agent_version: env!("CARGO_PKG_VERSION").into(),
            kernel_release: kernel.release().to_string_lossy().into_owned(),
            started_ns: self.clock.started_ns,
            ready_ns: self.clock.ready_ns.load(Ordering::Relaxed),
            memory_total: memory_bytes(&memory, "MemTotal:"),
            memory_available: memory_bytes(&memory, "MemAvailable:"),
            ..Default::default()
        })
    }

    async fn shutdown(
        &self,
        _: &TtrpcContext,
        request: sb::ShutdownRequest,
    ) -> ttrpc::Result<sb::ShutdownResponse> {
        let (registry, ended) = (Arc::clone(&self.registry), Arc::clone(&self.ended));
        let grace = Duration::from_millis(request.grace_ms.into());
        detached(async move {
            registry.shut_down(grace).await;
            ended.notify_one();
            Ok(())
        })
        .await?;
        Ok(sb::ShutdownResponse::default())
    }
}

/// A line of /proc/meminfo, which counts in KiB.
fn memory_bytes(meminfo: &str, name: &str) -> u64 {
    let line = meminfo.lines().find_map(|line| line.strip_prefix(name));
    let kib = line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok());
    if kib.is_none() {
        say!("/proc/meminfo has no {name}");
    }
    kib.unwrap_or(0) * 1024
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn meminfo_is_read_in_bytes() {
        let meminfo = "MemTotal:         123 kB\nMemAvailable:       7 kB\n";
        assert_eq!(memory_bytes(meminfo, "MemAvailable:"), 7 * 1024);
        assert_eq!(memory_bytes(meminfo, "MemTotal:"), 123 * 1024);
    }
}
