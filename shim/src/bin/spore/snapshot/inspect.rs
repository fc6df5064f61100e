//! `spore snapshot inspect`.

use crate::Global;
use crate::failure::Failure;
use crate::show;

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The snapshot's id, or enough of its beginning
    id: String,
}

/// Of a snapshot that can be opened, which a damaged one cannot.
pub(super) fn run(global: &Global, args: &Args) -> Result<(), Failure> {
    let store = super::store()?;
    let manifest = store.open(store.find(&args.id)?)?.manifest;
    let nonsense = |error| Failure::Refused(format!("snapshot {}: as JSON: {error}", manifest.id));
    if global.json {
        return show::json(&serde_json::to_value(&manifest).map_err(nonsense)?);
    }
    show::line(&serde_json::to_string_pretty(&manifest).map_err(nonsense)?)
}
