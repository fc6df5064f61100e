//! `spore fs mv`: renames inside one container; into a directory when there is one.

use std::ffi::OsString;

use serde_json::json;

use super::{Place, absolute};
use crate::Global;
use crate::failure::Failure;
use crate::show;

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Do not replace what is there
    #[arg(short = 'N', long)]
    no_clobber: bool,
    #[command(flatten)]
    from: Place,
    /// The new path, or a directory to move into
    to: OsString,
}

pub(super) async fn run(global: &Global, args: Args) -> Result<(), Failure> {
    let (remote, from) = args.from.connect(global).await?;
    let mut to = absolute(&args.to);
    if remote.find(&to, true).await?.is_some_and(|found| found.is_directory()) {
        let name = from.split(|byte| *byte == b'/').rfind(|name| !name.is_empty()).unwrap_or_default();
        if !to.ends_with(b"/") {
            to.push(b'/');
        }
        to.extend_from_slice(name);
    }
    remote.rename(&from, &to, !args.no_clobber).await?;
    if global.json {
        show::json(&json!({ "from": show::json_name(&from), "to": show::json_name(&to) }))?;
    }
    Ok(())
}
