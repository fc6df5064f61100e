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
    StartResponse, StateRequest, StateResponse, StatsRequest, StatsResponse, Status, UpdateTaskRequest,
    WaitRequest, WaitResponse,
};
use containerd_shim_protos::shim::oci::ProcessDetails;
use containerd_shim_protos::shim_async::{Task, create_task};
use protobuf::well_known_types::any::Any;
use tokio::sync::Notify;
use ttrpc::r#async::{Service, TtrpcContext};

use crate::checkpoint::{Wishes, targets};
use crate::container::{Container, Exec, timestamp};
use crate::error::Error;
use crate::io::Stdio;
use crate::sandbox::Sandbox;

const V2: &str = "containerd.task.v2.Task";
/// Names of messages as containerd's clients register them.
const METRICS: &str = "io.containerd.cgroups.v2.Metrics";
const PROCESS_DETAILS: &str = "containerd.runc.v1.ProcessDetails";

/// The service's state.
#[derive(Clone)]
pub(crate) struct TaskService {
    pub(crate) sandbox: Arc<Sandbox>,
    /// Told when the shim may end.
    pub(crate) done: Arc<Notify>,
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
    fn find(&self, id: &str) -> Result<Arc<Container>, Error> {
        self.sandbox.container(id)
    }

    /// The process that a call is about.
    fn process(&self, id: &str, exec_id: &str) -> Result<Process, Error> {
        let container = self.find(id)?;
        if exec_id.is_empty() {
            return Ok(Process::Init(container));
        }
        let exec = container.exec(exec_id)?;
        Ok(Process::Exec(container, exec))
    }
}

fn any(name: &str, message: &impl protobuf::Message) -> ttrpc::Result<Any> {
    let value = message.write_to_bytes();
    let value = value.map_err(|error| ttrpc::Error::Others(format!("encode {name}: {error}")))?;
    Ok(Any { type_url: name.into(), value, ..Default::default() })
}

/// A container's init, or a further process in it.
enum Process {
    Init(Arc<Container>),
    Exec(Arc<Container>, Arc<Exec>),
}

/// Runs work to its end even if the caller does not wait for it.
pub(crate) async fn to_the_end<T: Send + 'static>(
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
        let process = self.process(&request.id, &request.exec_id)?;
        let sandbox = Arc::clone(&self.sandbox);
        let pid = to_the_end("start", async move {
            match process {
                Process::Init(_) => sandbox.start(&request.id).await,
                Process::Exec(container, exec) => {
                    container.start_exec(&exec.id).await.map(|()| container.pid)
                }
            }
        })
        .await?;
        // After the answer is on its way.
        tokio::spawn(async { crate::process::trim_memory() });
        Ok(StartResponse { pid, ..Default::default() })
    }

    async fn state(&self, _: &TtrpcContext, request: StateRequest) -> ttrpc::Result<StateResponse> {
        let process = self.process(&request.id, &request.exec_id)?;
        // The status first: what has stopped has its exit.
        let (container, status, exit, stdio) = match &process {
            Process::Init(init) => (init, init.status(), init.exited(), &init.stdio),
            Process::Exec(container, exec) => {
                // What runs in a paused container stands still with it.
                let status = match (exec.status(), container.status()) {
                    (Status::RUNNING, Status::PAUSED) => Status::PAUSED,
                    (own, _) => own,
                };
                (container, status, exec.exited(), &exec.stdio)
            }
        };
        Ok(StateResponse {
            id: container.id.clone(),
            bundle: container.bundle.clone(),
            pid: container.pid,
            status: status.into(),
            stdin: stdio.stdin.clone(),
            stdout: stdio.stdout.clone(),
            stderr: stdio.stderr.clone(),
            terminal: stdio.terminal,
            exit_status: exit.map_or(0, |exit| exit.status),
            exited_at: exit.map_or_else(Default::default, |exit| timestamp(exit.at)),
            exec_id: request.exec_id,
            ..Default::default()
        })
    }

    async fn wait(&self, _: &TtrpcContext, request: WaitRequest) -> ttrpc::Result<WaitResponse> {
        let exit = match self.process(&request.id, &request.exec_id)? {
            Process::Init(container) => container.wait().await.ok_or(Error::NoContainer)?,
            Process::Exec(_, exec) => exec.wait().await.ok_or(Error::NoProcess(request.exec_id))?,
        };
        Ok(WaitResponse { exit_status: exit.status, exited_at: timestamp(exit.at), ..Default::default() })
    }

    async fn kill(&self, _: &TtrpcContext, request: KillRequest) -> ttrpc::Result<Empty> {
        let process = self.process(&request.id, &request.exec_id)?;
        to_the_end("kill", async move {
            match process {
                Process::Init(container) => container.kill(request.signal, request.all).await,
                Process::Exec(container, exec) => container.kill_exec(&exec.id, request.signal).await,
            }
        })
        .await?;
        Ok(Empty::new())
    }

    async fn delete(&self, _: &TtrpcContext, request: DeleteRequest) -> ttrpc::Result<DeleteResponse> {
        let process = self.process(&request.id, &request.exec_id)?;
        let sandbox = Arc::clone(&self.sandbox);
        let (pid, exit) = to_the_end("delete", async move {
            match process {
                Process::Init(_) => sandbox.delete(&request.id).await,
                Process::Exec(container, exec) => Ok((container.pid, container.delete_exec(&exec.id).await?)),
            }
        })
        .await?;
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

    /// The host has one process of a container, its holder; those in the guest are told by the
    /// details, for their pids are of another machine.
    async fn pids(&self, _: &TtrpcContext, request: PidsRequest) -> ttrpc::Result<PidsResponse> {
        let container = self.find(&request.id)?;
        let inside = container.processes().await?;
        let mut processes = vec![ProcessInfo { pid: container.pid, ..Default::default() }];
        for process in inside.into_iter().skip(1) {
            let exec =
                if process.exec_id.is_empty() { String::new() } else { format!("{}: ", process.exec_id) };
            let details = ProcessDetails {
                exec_id: format!("{exec}guest pid {} ({})", process.pid, process.command),
                ..Default::default()
            };
            let info = Some(any(PROCESS_DETAILS, &details)?).into();
            processes.push(ProcessInfo { pid: container.pid, info, ..Default::default() });
        }
        Ok(PidsResponse { processes, ..Default::default() })
    }

    async fn close_io(&self, _: &TtrpcContext, request: CloseIORequest) -> ttrpc::Result<Empty> {
        let process = self.process(&request.id, &request.exec_id)?;
        if request.stdin {
            match process {
                Process::Init(container) => container.close_stdin(),
                Process::Exec(_, exec) => exec.close_stdin(),
            }
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

    async fn pause(&self, _: &TtrpcContext, request: PauseRequest) -> ttrpc::Result<Empty> {
        let container = self.find(&request.id)?;
        to_the_end("pause", async move { container.freeze(true).await }).await?;
        Ok(Empty::new())
    }

    async fn resume(&self, _: &TtrpcContext, request: ResumeRequest) -> ttrpc::Result<Empty> {
        let sandbox = Arc::clone(&self.sandbox);
        to_the_end("resume", async move { sandbox.resume(&request.id).await }).await?;
        Ok(Empty::new())
    }

    async fn exec(&self, _: &TtrpcContext, request: ExecProcessRequest) -> ttrpc::Result<Empty> {
        let container = self.find(&request.id)?;
        let stdio = Stdio {
            stdin: request.stdin,
            stdout: request.stdout,
            stderr: request.stderr,
            terminal: request.terminal,
        };
        let process = request.spec.into_option().unwrap_or_default().value;
        to_the_end("exec", async move { container.add_exec(&request.exec_id, process, stdio).await }).await?;
        Ok(Empty::new())
    }

    async fn resize_pty(&self, _: &TtrpcContext, request: ResizePtyRequest) -> ttrpc::Result<Empty> {
        self.process(&request.id, &request.exec_id)?;
        self.find(&request.id)?.resize(&request.exec_id, request.width, request.height).await?;
        Ok(Empty::new())
    }

    async fn update(&self, _: &TtrpcContext, request: UpdateTaskRequest) -> ttrpc::Result<Empty> {
        let container = self.find(&request.id)?;
        let resources = request.resources.into_option().unwrap_or_default().value;
        to_the_end("update", async move { container.update(&resources).await }).await?;
        Ok(Empty::new())
    }

    async fn stats(&self, _: &TtrpcContext, request: StatsRequest) -> ttrpc::Result<StatsResponse> {
        let metrics = self.find(&request.id)?.stats().await?;
        Ok(StatsResponse { stats: Some(any(METRICS, &metrics)?).into(), ..Default::default() })
    }

    /// containerd's client has paused the task. containerd packs the directory afterwards, unless the client named it.
    async fn checkpoint(&self, _: &TtrpcContext, request: CheckpointTaskRequest) -> ttrpc::Result<Empty> {
        let container = self.find(&request.id)?;
        let wishes = Wishes::decode(request.options.as_ref())?;
        let to = targets(request.path, wishes.image_path)?;
        let store = self.sandbox.store();
        to_the_end("checkpoint", async move { container.checkpoint(store, to, wishes.exit).await }).await?;
        Ok(Empty::new())
    }
}
