//! Calls of containerd's API that `ctr` has no word for.

use anyhow::{Context, Result, ensure};
use containerd_client::Client;
use containerd_client::services::v1::snapshots::MountsRequest;
use containerd_client::services::v1::{CreateTaskRequest, MetricsRequest, StartRequest, UpdateTaskRequest};
use containerd_client::tonic::metadata::MetadataValue;
use containerd_client::tonic::{Request, Status};
use spore_harness::bed::Subject;

/// The type of OCI resources as containerd's clients send them, in JSON.
const RESOURCES: &str = "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources";

/// Tasks.Update with OCI resources.
pub(crate) fn update(
    subject: &Subject,
    id: &str,
    resources: &serde_json::Value,
) -> Result<std::result::Result<(), Status>> {
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

/// Tasks.Create of a container that is there, and Tasks.Start, with something done between, which is told
/// the pid.
pub(crate) fn create_and_start(
    subject: &Subject,
    id: &str,
    between: impl FnOnce(u32) -> Result<()>,
) -> Result<()> {
    calling(subject, async |client, namespace| {
        // `ctr` names the snapshot after its container.
        let mounts = MountsRequest { snapshotter: "overlayfs".into(), key: id.to_owned() };
        let mounts = client.snapshots().mounts(namespace.of(mounts)?).await?.into_inner();
        let create =
            CreateTaskRequest { container_id: id.to_owned(), rootfs: mounts.mounts, ..Default::default() };
        let created = client.tasks().create(namespace.of(create)?).await?.into_inner();
        between(created.pid)?;
        let start = StartRequest { container_id: id.to_owned(), ..Default::default() };
        client.tasks().start(namespace.of(start)?).await?;
        Ok(())
    })
}

/// Tasks.Metrics of one task, `io.containerd.cgroups.v2.Metrics` as bytes. `ctr` knows an older version of it,
/// without networks.
pub(crate) fn metrics(subject: &Subject, id: &str) -> Result<Vec<u8>> {
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
    runtime.block_on(async {
        let client = Client::from_path(&socket).await.context("connecting to containerd")?;
        act(client, Namespace(namespace)).await
    })
}
