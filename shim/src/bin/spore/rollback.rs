//! `spore rollback`.

use containerd_shim_spore::api::v1::snapshots::{RollbackRequest, RollbackResponse};
use containerd_shim_spore::api::v1::snapshots_ttrpc::SnapshotsClient;
use containerd_shim_spore::snapshot::SnapshotId;
use serde_json::json;
use ttrpc::context::Context;

use crate::failure::Failure;
use crate::remote::{check_id, shim_of};
use crate::{Global, progress, show, snapshot};

/// What its processes have done since the snapshot is undone, in memory and on its disk, and what was begun in it since has ended as if
/// it had been killed. Its volumes, its network and its clients stay.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The container's id
    container: String,
    /// The snapshot's id, or enough of its beginning: one of this container's, from `spore snapshot ls`
    snapshot: String,
}

pub(crate) async fn run(global: &Global, args: Args) -> Result<(), Failure> {
    let Args { container, snapshot } = args;
    check_id(&container)?;
    let id = snapshot::store()?.find(&snapshot)?;
    let anyway = format!("{container} goes back to snapshot {id} all the same, or goes on if that fails");
    let call = ask(global, &container, id);
    let answer = progress::answered(call, &format!("rolling {container} back"), &anyway).await??;
    if !global.json {
        return Ok(());
    }
    show::json(&json!({
        "container": container,
        "snapshot": id,
        "total_ns": answer.total_ns,
        "gap_ns": answer.gap_ns,
        "restore_ns": answer.restore_ns,
        "agent_ns": answer.agent_ns,
        "network_ns": answer.network_ns,
        "streams_ns": answer.streams_ns,
        "disk_ns": answer.disk_ns,
        "thaw_ns": answer.thaw_ns,
    }))
}

/// Has the container's shim do it.
pub(crate) async fn ask(
    global: &Global,
    container: &str,
    to: SnapshotId,
) -> Result<RollbackResponse, Failure> {
    let client = SnapshotsClient::new(shim_of(global, container).await?);
    let request = RollbackRequest { id: container.into(), snapshot: to.to_string(), ..Default::default() };
    let answer = client.rollback(Context::default(), &request).await;
    answer.map_err(|error| Failure::of_shim(container, error))
}
