//! `spore hibernate`.

use containerd_shim_spore::api::v1::snapshots::{HibernateRequest, HibernateResponse};
use containerd_shim_spore::api::v1::snapshots_ttrpc::SnapshotsClient;
use serde_json::json;
use ttrpc::context::Context;

use crate::failure::Failure;
use crate::remote::{check_id, shim_of};
use crate::{Global, progress, show};

/// Its memory and its disk go to disk, its machine ends. Its task stays, with its pid, its network and its clients, and is paused for
/// containerd; `spore resume`, or containerd's own resume, has it go on where it was.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The container's id
    container: String,
}

pub(crate) async fn run(global: &Global, Args { container }: Args) -> Result<(), Failure> {
    check_id(&container)?;
    let anyway = format!("{container} hibernates all the same, or goes on if that fails");
    let call = ask(global, &container);
    let answer = progress::answered(call, &format!("putting {container} away"), &anyway).await??;
    if !global.json {
        return Ok(());
    }
    show::json(&json!({
        "container": container,
        "snapshot": answer.snapshot,
        "total_ns": answer.total_ns,
        "rest_ns": answer.rest_ns,
        "save_ns": answer.save_ns,
        "write_ns": answer.write_ns,
    }))
}

/// Has the container's shim do it.
pub(crate) async fn ask(global: &Global, container: &str) -> Result<HibernateResponse, Failure> {
    let client = SnapshotsClient::new(shim_of(global, container).await?);
    let request = HibernateRequest { id: container.into(), ..Default::default() };
    let answer = client.hibernate(Context::default(), &request).await;
    answer.map_err(|error| Failure::of_shim(container, error))
}
