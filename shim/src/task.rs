//! The Task service (containerd.task.v2 and v3): decodes, delegates to the sandbox, encodes.
//! The messages of both versions are the same on the wire, so one table serves both.
//!
//! ttrpc drops a handler half-way when its client goes away or its deadline passes, so whatever
//! changes a container's state runs in a task of its own, to its end.

use std::collections::HashMap;
use std::sync::Arc;

use async_trait::async_trait;
use containerd_shim_protos::api::{
    CheckpointTaskRequest, CloseIORequest, ConnectRequest, ConnectResponse, CreateTaskRequest,
    CreateTaskResponse, DeleteRequest, DeleteResponse, Empty, ExecProcessRequest, KillRequest, PauseRequest,
    PidsRequest, PidsResponse, ProcessInfo, ResizePtyRequest, ResumeRequest, ShutdownRequest, StartRequest,
    StartResponse, StateRequest, StateResponse, StatsRequest, StatsResponse, UpdateTaskRequest, WaitRequest,
    WaitResponse,
};
use containerd_shim_protos::shim_async::{Task, create_task};
use slog::{Logger, debug};
use tokio::sync::Notify;
use ttrpc::r#async::{Service, TtrpcContext};

use crate::container::{Container, timestamp};
use crate::error::Error;
use crate::sandbox::Sandbox;

const V2: &str = "containerd.task.v2.Task";

/// The service's state.
#[derive(Clone)]
pub(crate) struct TaskService {
    pub(crate) sandbox: Arc<Sandbox>,
    /// Told when the shim may end.
    pub(crate) done: Arc<Notify>,
    pub(crate) log: Logger,
}

/// The method tables of both versions.
pub(crate) fn services(task: TaskService) -> HashMap<String, Service> {
    let task: Arc<dyn Task + Send + Sync> = Arc::new(task);
    let mut services = create_task(Arc::clone(&task));
    for (_, service) in create_task(task) {
        services.insert(V2.into(), service);
    }
    services
}

impl TaskService {
    /// The container, for a call about its init process.
    fn init(&self, id: &str, exec_id: &str) -> Result<Arc<Container>, Error> {
        let container = self.sandbox.container(id)?;
        if exec_id.is_empty() { Ok(container) } else { Err(Error::NoProcess(exec_id.into())) }
    }

    fn refuse<T>(&self, method: &str) -> ttrpc::Result<T> {
        debug!(self.log, "refused"; "method" => method);
        Err(Error::Unimplemented(format!("task method {method}")).into())
    }
}

/// Runs work to its end even if the caller does not wait for it.
async fn to_the_end<T: Send + 'static>(
    operation: &'static str,
    work: impl Future<Output = Result<T, Error>> + Send + 'static,
) -> ttrpc::Result<T> {
    match tokio::spawn(work).await {
        Ok(result) => Ok(result?),
        Err(error) => Err(ttrpc::Error::Others(format!("{operation}: cut short in the shim: {error}"))),
    }
}

#[async_trait]
impl Task for TaskService {
    async fn create(
        &self,
        _: &TtrpcContext,
        request: CreateTaskRequest,
    ) -> ttrpc::Result<CreateTaskResponse> {
        let pid = self.sandbox.create(request).await?;
        Ok(CreateTaskResponse { pid, ..Default::default() })
    }

    async fn start(&self, _: &TtrpcContext, request: StartRequest) -> ttrpc::Result<StartResponse> {
        self.init(&request.id, &request.exec_id)?;
        let sandbox = Arc::clone(&self.sandbox);
        let pid = to_the_end("start", async move { sandbox.start(&request.id).await }).await?;
        // After the answer is on its way.
        tokio::spawn(async { crate::process::trim_memory() });
        Ok(StartResponse { pid, ..Default::default() })
    }

    async fn state(&self, _: &TtrpcContext, request: StateRequest) -> ttrpc::Result<StateResponse> {
        let container = self.init(&request.id, &request.exec_id)?;
        // The status first: a stopped container has its exit.
        let status = container.status();
        let exit = container.exited();
        Ok(StateResponse {
            id: container.id.clone(),
            bundle: container.bundle.clone(),
            pid: container.pid,
            status: status.into(),
            stdin: container.stdio.stdin.clone(),
            stdout: container.stdio.stdout.clone(),
            stderr: container.stdio.stderr.clone(),
            terminal: container.stdio.terminal,
            exit_status: exit.map_or(0, |exit| exit.status),
            exited_at: exit.map_or_else(Default::default, |exit| timestamp(exit.at)),
            exec_id: request.exec_id,
            ..Default::default()
        })
    }

    async fn wait(&self, _: &TtrpcContext, request: WaitRequest) -> ttrpc::Result<WaitResponse> {
        let container = self.init(&request.id, &request.exec_id)?;
        let exit = container.wait().await.ok_or(Error::NoContainer)?;
        Ok(WaitResponse { exit_status: exit.status, exited_at: timestamp(exit.at), ..Default::default() })
    }

    async fn kill(&self, _: &TtrpcContext, request: KillRequest) -> ttrpc::Result<Empty> {
        let container = self.init(&request.id, &request.exec_id)?;
        to_the_end("kill", async move { container.kill(request.signal, request.all).await }).await?;
        Ok(Empty::new())
    }

    async fn delete(&self, _: &TtrpcContext, request: DeleteRequest) -> ttrpc::Result<DeleteResponse> {
        self.init(&request.id, &request.exec_id)?;
        let sandbox = Arc::clone(&self.sandbox);
        let (pid, exit) = to_the_end("delete", async move { sandbox.delete(&request.id).await }).await?;
        Ok(DeleteResponse {
            pid,
            exit_status: exit.status,
            exited_at: timestamp(exit.at),
            ..Default::default()
        })
    }

    async fn connect(&self, _: &TtrpcContext, request: ConnectRequest) -> ttrpc::Result<ConnectResponse> {
        let task_pid = self.sandbox.container(&request.id).map_or(0, |container| container.pid);
        let version = env!("CARGO_PKG_VERSION").to_string();
        Ok(ConnectResponse { shim_pid: std::process::id(), task_pid, version, ..Default::default() })
    }

    async fn pids(&self, _: &TtrpcContext, request: PidsRequest) -> ttrpc::Result<PidsResponse> {
        let pids = self.init(&request.id, "")?.pids().await?;
        let processes = pids.into_iter().map(|pid| ProcessInfo { pid, ..Default::default() }).collect();
        Ok(PidsResponse { processes, ..Default::default() })
    }

    async fn close_io(&self, _: &TtrpcContext, request: CloseIORequest) -> ttrpc::Result<Empty> {
        let container = self.init(&request.id, &request.exec_id)?;
        if request.stdin {
            container.close_stdin();
        }
        Ok(Empty::new())
    }

    async fn shutdown(&self, _: &TtrpcContext, _: ShutdownRequest) -> ttrpc::Result<Empty> {
        let (sandbox, done) = (Arc::clone(&self.sandbox), Arc::clone(&self.done));
        to_the_end("shutdown", async move {
            if sandbox.close().await {
                done.notify_one();
            }
            Ok(Empty::new())
        })
        .await
    }

    async fn pause(&self, _: &TtrpcContext, _: PauseRequest) -> ttrpc::Result<Empty> {
        self.refuse("Pause")
    }

    async fn resume(&self, _: &TtrpcContext, _: ResumeRequest) -> ttrpc::Result<Empty> {
        self.refuse("Resume")
    }

    async fn checkpoint(&self, _: &TtrpcContext, _: CheckpointTaskRequest) -> ttrpc::Result<Empty> {
        self.refuse("Checkpoint")
    }

    async fn exec(&self, _: &TtrpcContext, _: ExecProcessRequest) -> ttrpc::Result<Empty> {
        self.refuse("Exec")
    }

    async fn resize_pty(&self, _: &TtrpcContext, _: ResizePtyRequest) -> ttrpc::Result<Empty> {
        self.refuse("ResizePty")
    }

    async fn update(&self, _: &TtrpcContext, _: UpdateTaskRequest) -> ttrpc::Result<Empty> {
        self.refuse("Update")
    }

    async fn stats(&self, _: &TtrpcContext, _: StatsRequest) -> ttrpc::Result<StatsResponse> {
        self.refuse("Stats")
    }
}
