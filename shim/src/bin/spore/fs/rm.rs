//! `spore fs rm`.

use serde_json::json;

use super::Place;
use crate::Global;
use crate::failure::Failure;
use crate::show;

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// A directory with all that is in it
    #[arg(short, long)]
    recursive: bool,
    /// What is not there is no fault
    #[arg(short, long)]
    force: bool,
    #[command(flatten)]
    place: Place,
}

pub(super) async fn run(global: &Global, args: Args) -> Result<(), Failure> {
    let (remote, path) = args.place.connect(global).await?;
    let removed = match remote.remove(&path, args.recursive).await {
        Err(failure) if args.force && failure.is_not_found() => 0,
        other => other?,
    };
    if global.json {
        show::json(&json!({ "path": show::json_name(&path), "removed": removed }))?;
    }
    Ok(())
}
