//! `spore rollback`.

use std::time::Duration;

use containerd_shim_spore::api::v1::snapshots::RollbackRequest;
use containerd_shim_spore::api::v1::snapshots_ttrpc::SnapshotsClient;
use serde_json::json;
use ttrpc::context::Context;

use crate::failure::Failure;
use crate::progress::Progress;
use crate::remote::shim_of;
use crate::{Global, show, snapshot};

/// Between two looks at the clock.
const TICK: Duration = Duration::from_millis(100);

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
    let client = SnapshotsClient::new(shim_of(global, &container).await?);
    let id = snapshot::store()?.find(&snapshot)?.to_string();
    let request = RollbackRequest { id: container.clone(), snapshot: id.clone(), ..Default::default() };
    // As long as it takes: the shim bounds each step, and its end ends the call.
    let call = client.rollback(Context::default(), &request);
    tokio::pin!(call);
    let (progress, mut ticks) = (Progress::waiting(), tokio::time::interval(TICK));
    let interrupted = tokio::signal::ctrl_c();
    tokio::pin!(interrupted);
    let answer = loop {
        tokio::select! {
            answer = &mut call => break answer,
            _ = &mut interrupted => {
                progress.finish();
                eprintln!("spore: warning: {container} goes back to snapshot {id} all the same, or goes on if that fails");
                return Err(Failure::Interrupted);
            }
            _ = ticks.tick() => progress.now(0, &format!("rolling {container} back")),
        }
    };
    progress.finish();
    let answer = answer.map_err(|error| Failure::of_shim(&container, error))?;
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
