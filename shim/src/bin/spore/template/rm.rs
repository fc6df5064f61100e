//! `spore template rm`.

use serde_json::json;

use crate::Global;
use crate::failure::Failure;
use crate::show;
use crate::snapshot::store;

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The templates' names, or ids
    #[arg(required = true, value_name = "NAME")]
    names: Vec<String>,
}

/// With a name that means none, nothing is removed.
pub(super) fn run(global: &Global, args: &Args) -> Result<(), Failure> {
    let store = store()?;
    let meant = args.names.iter().map(|wanted| store.find_template(wanted));
    let mut meant = meant.collect::<Result<Vec<_>, _>>()?;
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
