//! `spore fs mkdir`.

use serde_json::json;

use super::{Place, octal};
use crate::Global;
use crate::failure::Failure;
use crate::show;

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Make missing parents; a directory that is there is no fault
    #[arg(short, long)]
    parents: bool,
    /// The directory's mode
    #[arg(short, long, value_parser = octal, default_value = "0755")]
    mode: u32,
    #[command(flatten)]
    place: Place,
}

pub(super) async fn run(global: &Global, args: Args) -> Result<(), Failure> {
    let (remote, path) = args.place.connect(global).await?;
    let made = remote.make_directory(&path, args.mode, args.parents).await?;
    if global.json {
        show::json(&json!({ "path": show::json_name(&path), "made": made }))?;
    }
    Ok(())
}
