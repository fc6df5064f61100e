//! Calls of containerd's API that `ctr` has no word for.

use anyhow::{Context, Result};
use containerd_client::Client;
use containerd_client::services::v1::UpdateTaskRequest;
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
    let (socket, namespace) =
        subject.with(|containerd| Ok((containerd.socket(), containerd.namespace().to_owned())))?;
    let mut request = Request::new(UpdateTaskRequest {
        container_id: id.to_owned(),
        resources: Some(prost_types::Any {
            type_url: RESOURCES.to_owned(),
            value: resources.to_string().into_bytes(),
        }),
        ..Default::default()
    });
    request.metadata_mut().insert("containerd-namespace", MetadataValue::try_from(namespace)?);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let client = Client::from_path(&socket).await.context("connecting to containerd")?;
        Ok(client.tasks().update(request).await.map(drop))
    })
}
