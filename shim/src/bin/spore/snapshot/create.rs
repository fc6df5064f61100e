//! `spore snapshot create`.

use clap::ValueEnum;
use containerd_shim_spore::api::v1::snapshots::create_request::Wait as Told;
use containerd_shim_spore::api::v1::snapshots::{CreateRequest, CreateResponse};
use containerd_shim_spore::api::v1::snapshots_ttrpc::SnapshotsClient;
use serde_json::json;
use ttrpc::context::Context;

use crate::Global;
use crate::failure::Failure;
use crate::remote::shim_of;
use crate::{progress, show};

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The container's id
    container: String,
    /// What to wait for
    #[arg(long, value_enum, default_value_t = Wait::Durable)]
    wait: Wait,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Wait {
    /// The snapshot is on disk
    Durable,
    /// The container goes on, while the snapshot is being written; it is lost if the container is deleted before that is done
    Resumed,
}

pub(super) async fn run(global: &Global, args: Args) -> Result<(), Failure> {
    let Args { container, wait } = args;
    let answer = take(global, &container, wait, false).await?;
    if !global.json {
        return show::line(&answer.snapshot);
    }
    show::json(&json!({
        "id": answer.snapshot,
        "durable": wait == Wait::Durable,
        "stood_ns": answer.stood_ns,
        "pause_ns": answer.pause_ns,
        "quiesce_ns": answer.quiesce_ns,
        "save_ns": answer.save_ns,
        "fork_ns": answer.fork_ns,
        "switch_ns": answer.switch_ns,
    }))
}

/// Has the container's shim take one, and says so meanwhile; nobody keeps a `passing` one.
pub(crate) async fn take(
    global: &Global,
    container: &str,
    wait: Wait,
    passing: bool,
) -> Result<CreateResponse, Failure> {
    let goes = if passing { "; it goes by itself after a day" } else { "" };
    let anyway = format!(
        "the snapshot of {container} is being written all the same; `spore snapshot ls` tells when it is there{goes}"
    );
    let call = ask(global, container, wait, passing);
    progress::answered(call, &format!("writing the snapshot of {container}"), &anyway).await?
}

/// The same without a word.
pub(crate) async fn ask(
    global: &Global,
    container: &str,
    wait: Wait,
    passing: bool,
) -> Result<CreateResponse, Failure> {
    let client = SnapshotsClient::new(shim_of(global, container).await?);
    let told = if wait == Wait::Durable { Told::DURABLE } else { Told::RESUMED };
    let request = CreateRequest { id: container.into(), wait: told.into(), passing, ..Default::default() };
    let answer = client.create(Context::default(), &request).await;
    answer.map_err(|error| Failure::of_shim(container, error))
}
