//! `spore resume`.

use containerd_shim_spore::api::v1::snapshots::{ResumeRequest, ResumeResponse};
use containerd_shim_spore::api::v1::snapshots_ttrpc::SnapshotsClient;
use serde_json::json;
use ttrpc::context::Context;

use crate::failure::Failure;
use crate::remote::{check_id, shim_of};
use crate::{Global, progress, show};

/// One that hibernates gets its machine back, from disk.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The container's id
    container: String,
}

pub(crate) async fn run(global: &Global, Args { container }: Args) -> Result<(), Failure> {
    check_id(&container)?;
    let anyway = format!("{container} is resumed all the same, or stays as it is if that fails");
    let call = ask(global, &container);
    let answer = progress::answered(call, &format!("resuming {container}"), &anyway).await??;
    if !global.json {
        return Ok(());
    }
    show::json(&json!({
        "container": container,
        "total_ns": answer.total_ns,
        "restore_ns": answer.restore_ns,
        "agent_ns": answer.agent_ns,
        "network_ns": answer.network_ns,
        "streams_ns": answer.streams_ns,
        "disk_ns": answer.disk_ns,
    }))
}

/// Has the container's shim do it.
pub(crate) async fn ask(global: &Global, container: &str) -> Result<ResumeResponse, Failure> {
    let client = SnapshotsClient::new(shim_of(global, container).await?);
    let request = ResumeRequest { id: container.into(), ..Default::default() };
    let answer = client.resume(Context::default(), &request).await;
    answer.map_err(|error| Failure::of_shim(container, error))
}
