//! `spore snapshot rm`.

use containerd_shim_spore::snapshot::manifest::Purpose;
use containerd_shim_spore::snapshot::{Manifest, SnapshotId, Store};
use containerd_shim_spore::{Config, running};
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

/// Refuses what a container hibernates in, which exists nowhere else.
fn check(store: &Store, meant: &[SnapshotId]) -> Result<(), Failure> {
    let run_dir = Config::load().unwrap_or_default().run_dir;
    let entries = store.list()?.entries;
    for Manifest { id, namespace, container, purpose, .. } in entries.iter().map(|entry| &entry.manifest) {
        if *purpose == Purpose::Hibernation
            && meant.contains(id)
            && running(&run_dir, namespace, container).hibernates_in == Some(*id)
        {
            return Err(Failure::Refused(format!(
                "snapshot {id}: container {} in namespace {} hibernates in it; resume the container, or kill and delete it",
                show::name(container.as_bytes()),
                show::name(namespace.as_bytes())
            )));
        }
    }
    Ok(())
}

/// Each of them once.
pub(crate) fn remove(global: &Global, store: &Store, mut meant: Vec<SnapshotId>) -> Result<(), Failure> {
    meant.sort();
    meant.dedup();
    check(store, &meant)?;
    for id in &meant {
        store.remove(*id)?;
    }
    if global.json {
        show::json(&json!({ "removed": meant }))?;
    }
    Ok(())
}
