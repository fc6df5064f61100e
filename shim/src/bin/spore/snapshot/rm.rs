//! `spore snapshot rm`.

use serde_json::json;

use crate::Global;
use crate::failure::Failure;
use crate::show;

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The snapshots' ids, or enough of their beginnings
    #[arg(required = true, value_name = "ID")]
    ids: Vec<String>,
}

/// With an id that means none, nothing is removed.
pub(super) fn run(global: &Global, args: &Args) -> Result<(), Failure> {
    let store = super::store()?;
    let mut meant = args.ids.iter().map(|wanted| store.find(wanted)).collect::<Result<Vec<_>, _>>()?;
    meant.sort();
    meant.dedup();
    for id in &meant {
        store.remove(*id)?;
    }
    if global.json {
        show::json(&json!({ "removed": meant }))?;
    }
    Ok(())
}
