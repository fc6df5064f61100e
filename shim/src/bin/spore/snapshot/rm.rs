//! `spore snapshot rm`.

use containerd_shim_spore::snapshot::{SnapshotId, Store};
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
    let meant = args.ids.iter().map(|wanted| store.find(wanted)).collect::<Result<_, _>>()?;
    remove(global, &store, meant)
}

/// Each of them once.
pub(crate) fn remove(global: &Global, store: &Store, mut meant: Vec<SnapshotId>) -> Result<(), Failure> {
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
