//! Calls of containerd's API that `ctr` has no word for.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use containerd_client::Client;
use containerd_client::services::v1::snapshots::MountsRequest;
use containerd_client::services::v1::{
    CloseIoRequest, CreateTaskRequest, DeleteProcessRequest, DeleteTaskRequest, ExecProcessRequest,
    GetRequest, KillRequest, MetricsRequest, PauseTaskRequest, ResizePtyRequest, ResumeTaskRequest,
    StartRequest, UpdateTaskRequest, WaitRequest,
};
use containerd_client::tonic::metadata::MetadataValue;
use containerd_client::tonic::{Request, Status};
use serde_json::Value;

use crate::bed::Subject;

/// The types of OCI resources and of an OCI process as containerd's clients send them, in JSON.
const RESOURCES: &str = "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources";
const PROCESS: &str = "types.containerd.io/opencontainers/runtime-spec/1/Process";
const RUNC_OPTIONS: &str = "containerd.runc.v1.Options";
/// The tag of `criu_image_path` in them, of a string shorter than 128 bytes.
const CRIU_IMAGE_PATH: u8 = 10 << 3 | 2;
const SIGKILL: u32 = 9;
/// For one call. Emulated machines are slow.
const DEADLINE: Duration = Duration::from_secs(240);

/// What the runtime answered.
pub type Answer<T> = std::result::Result<T, Status>;

/// Paths of fifos; none where empty.
#[derive(Debug, Clone, Default)]
pub struct Streams {
    pub stdin: String,
    pub stdout: String,
    pub stderr: String,
    pub terminal: bool,
}

/// Tasks.Update with OCI resources.
pub fn update(subject: &Subject, id: &str, resources: &Value) -> Result<Answer<()>> {
    let request = UpdateTaskRequest {
        container_id: id.to_owned(),
        resources: Some(prost_types::Any {
            type_url: RESOURCES.to_owned(),
            value: resources.to_string().into_bytes(),
        }),
        ..Default::default()
    };
    calling(subject, async |client, namespace| {
        Ok(client.tasks().update(namespace.of(request)?).await.map(drop))
    })
}

/// Tasks.Create of a container that is there; its pid.
pub fn create(subject: &Subject, id: &str, streams: Streams) -> Result<u32> {
    Ok(create_with(subject, id, streams, None)??)
}

/// Tasks.Create of a container that is there from a checkpoint in a directory, which containerd from 2.0 on takes from runc's options for
/// any runtime; its pid.
pub fn create_from(subject: &Subject, id: &str, checkpoint: &Path) -> Result<Answer<u32>> {
    let path = checkpoint.to_str().context("a path")?;
    let length = u8::try_from(path.len()).ok().filter(|length| *length < 0x80).context("a shorter path")?;
    let value = [&[CRIU_IMAGE_PATH, length], path.as_bytes()].concat();
    let options = prost_types::Any { type_url: RUNC_OPTIONS.to_owned(), value };
    create_with(subject, id, Streams::default(), Some(options))
}

fn create_with(
    subject: &Subject,
    id: &str,
    streams: Streams,
    options: Option<prost_types::Any>,
) -> Result<Answer<u32>> {
    calling(subject, async |client, namespace| {
        // `ctr` names the snapshot after its container.
        let mounts = MountsRequest { snapshotter: "overlayfs".into(), key: id.to_owned() };
        let mounts = client.snapshots().mounts(namespace.of(mounts)?).await?.into_inner();
        let create = CreateTaskRequest {
            container_id: id.to_owned(),
            rootfs: mounts.mounts,
            stdin: streams.stdin,
            stdout: streams.stdout,
            stderr: streams.stderr,
            terminal: streams.terminal,
            options,
            ..Default::default()
        };
        Ok(client.tasks().create(namespace.of(create)?).await.map(|answer| answer.into_inner().pid))
    })
}

/// Tasks.Start of a task, or of a process in it.
pub fn start(subject: &Subject, id: &str, exec_id: &str) -> Result<Answer<()>> {
    let request = StartRequest { container_id: id.to_owned(), exec_id: exec_id.to_owned() };
    calling(subject, async |client, namespace| {
        Ok(client.tasks().start(namespace.of(request)?).await.map(drop))
    })
}

/// Tasks.Create of a container that is there, and Tasks.Start, with something done between, which is told
/// the pid.
pub fn create_and_start(subject: &Subject, id: &str, between: impl FnOnce(u32) -> Result<()>) -> Result<()> {
    between(create(subject, id, Streams::default())?)?;
    Ok(start(subject, id, "")??)
}

/// Tasks.Exec of an OCI process.
pub fn exec(
    subject: &Subject,
    id: &str,
    exec_id: &str,
    process: &Value,
    streams: Streams,
) -> Result<Answer<()>> {
    let request = ExecProcessRequest {
        container_id: id.to_owned(),
        exec_id: exec_id.to_owned(),
        stdin: streams.stdin,
        stdout: streams.stdout,
        stderr: streams.stderr,
        terminal: streams.terminal,
        spec: Some(prost_types::Any {
            type_url: PROCESS.to_owned(),
            value: process.to_string().into_bytes(),
        }),
    };
    calling(subject, async |client, namespace| {
        Ok(client.tasks().exec(namespace.of(request)?).await.map(drop))
    })
}

/// Tasks.Get of a task, or of a process in it: its state, such as "PAUSED".
pub fn state(subject: &Subject, id: &str, exec_id: &str) -> Result<Answer<String>> {
    let request = GetRequest { container_id: id.to_owned(), exec_id: exec_id.to_owned() };
    calling(subject, async |client, namespace| {
        let answer = client.tasks().get(namespace.of(request)?).await;
        Ok(answer.map(|answer| {
            let process = answer.into_inner().process.unwrap_or_default();
            process.status().as_str_name().to_owned()
        }))
    })
}

/// Tasks.Pause.
pub fn pause(subject: &Subject, id: &str) -> Result<Answer<()>> {
    let request = PauseTaskRequest { container_id: id.to_owned() };
    calling(subject, async |client, namespace| {
        Ok(client.tasks().pause(namespace.of(request)?).await.map(drop))
    })
}

/// Tasks.Resume.
pub fn resume(subject: &Subject, id: &str) -> Result<Answer<()>> {
    let request = ResumeTaskRequest { container_id: id.to_owned() };
    calling(subject, async |client, namespace| {
        Ok(client.tasks().resume(namespace.of(request)?).await.map(drop))
    })
}

/// Tasks.Kill of a task, or of a process in it, by SIGKILL.
pub fn kill(subject: &Subject, id: &str, exec_id: &str) -> Result<Answer<()>> {
    let request =
        KillRequest { container_id: id.to_owned(), exec_id: exec_id.to_owned(), signal: SIGKILL, all: false };
    calling(subject, async |client, namespace| {
        Ok(client.tasks().kill(namespace.of(request)?).await.map(drop))
    })
}

/// Tasks.Delete of a task, or Tasks.DeleteProcess of one in it; its exit status. `ctr` asks for its state first.
pub fn delete(subject: &Subject, id: &str, exec_id: &str) -> Result<Answer<u32>> {
    let (container_id, exec_id) = (id.to_owned(), exec_id.to_owned());
    calling(subject, async |client, namespace| {
        let mut tasks = client.tasks();
        let answer = if exec_id.is_empty() {
            tasks.delete(namespace.of(DeleteTaskRequest { container_id })?).await
        } else {
            tasks.delete_process(namespace.of(DeleteProcessRequest { container_id, exec_id })?).await
        };
        Ok(answer.map(|answer| answer.into_inner().exit_status))
    })
}

/// Tasks.Wait for a process in a task, and Tasks.DeleteProcess; its status.
pub fn reap(subject: &Subject, id: &str, exec_id: &str) -> Result<u32> {
    let wait = WaitRequest { container_id: id.to_owned(), exec_id: exec_id.to_owned() };
    let delete = DeleteProcessRequest { container_id: id.to_owned(), exec_id: exec_id.to_owned() };
    calling(subject, async |client, namespace| {
        let status = client.tasks().wait(namespace.of(wait)?).await?.into_inner().exit_status;
        client.tasks().delete_process(namespace.of(delete)?).await?;
        Ok(status)
    })
}

/// Tasks.ResizePty of a task.
pub fn resize(subject: &Subject, id: &str) -> Result<Answer<()>> {
    let request =
        ResizePtyRequest { container_id: id.to_owned(), width: 77, height: 33, ..Default::default() };
    calling(subject, async |client, namespace| {
        Ok(client.tasks().resize_pty(namespace.of(request)?).await.map(drop))
    })
}

/// Tasks.CloseIO of a task's standard input.
pub fn close_stdin(subject: &Subject, id: &str) -> Result<()> {
    let request = CloseIoRequest { container_id: id.to_owned(), stdin: true, ..Default::default() };
    calling(subject, async |client, namespace| {
        client.tasks().close_io(namespace.of(request)?).await?;
        Ok(())
    })
}

/// Tasks.Metrics of one task, `io.containerd.cgroups.v2.Metrics` as bytes. `ctr` knows an older version of it,
/// without networks.
pub fn metrics(subject: &Subject, id: &str) -> Result<Vec<u8>> {
    calling(subject, async |client, namespace| {
        let request = MetricsRequest { filters: vec![format!("id=={id}")] };
        let metrics = client.tasks().metrics(namespace.of(request)?).await?.into_inner().metrics;
        ensure!(metrics.len() == 1, "{} tasks have the id {id}", metrics.len());
        let data = metrics.into_iter().next().and_then(|metric| metric.data);
        Ok(data.with_context(|| format!("no metrics of {id}"))?.value)
    })
}

/// The namespace that a call is about.
struct Namespace(String);

impl Namespace {
    fn of<T>(&self, message: T) -> Result<Request<T>> {
        let mut request = Request::new(message);
        request.metadata_mut().insert("containerd-namespace", MetadataValue::try_from(&self.0)?);
        Ok(request)
    }
}

fn calling<T>(subject: &Subject, act: impl AsyncFnOnce(Client, Namespace) -> Result<T>) -> Result<T> {
    let (socket, namespace) =
        subject.with(|containerd| Ok((containerd.socket(), containerd.namespace().to_owned())))?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let call = async {
        let client = Client::from_path(&socket).await.context("connecting to containerd")?;
        act(client, Namespace(namespace)).await
    };
    runtime.block_on(async { tokio::time::timeout(DEADLINE, call).await.context("calling containerd")? })
}
