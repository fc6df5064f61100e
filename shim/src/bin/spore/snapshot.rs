//! `spore snapshot`: snapshots of containers, which their shims take (`create`), and what is in this host's store of
//! them, which every other verb reads and changes itself (`containerd_shim_spore::snapshot`).

pub(crate) mod create;
mod export;
mod import;
mod inspect;
mod ls;
pub(crate) mod rm;
mod transfer;

use clap::Subcommand;
use containerd_shim_spore::snapshot::{SnapshotId, Store, StoreError};
use containerd_shim_spore::{Config, chain};

use crate::Global;
use crate::failure::Failure;

#[derive(Debug, Subcommand)]
pub(crate) enum Verb {
    /// Take a snapshot of a container, which goes on, and print its id
    Create(create::Args),
    /// List the snapshots of this host, of every namespace
    Ls,
    /// Show all that is known of a snapshot, as JSON
    Inspect(inspect::Args),
    /// Remove snapshots; others keep what they share with these
    Rm(rm::Args),
    /// Write a snapshot as a tar archive, with the guest's memory in it
    Export(export::Args),
    /// Take a snapshot from such an archive into the store, and print its id
    Import(import::Args),
}

pub(crate) async fn run(global: &Global, verb: Verb) -> Result<u8, Failure> {
    match verb {
        Verb::Create(args) => create::run(global, args).await,
        Verb::Ls => ls::run(global),
        Verb::Inspect(args) => inspect::run(global, &args),
        Verb::Rm(args) => rm::run(global, &args),
        Verb::Export(args) => export::run(global, args).await,
        Verb::Import(args) => import::run(global, args).await,
    }
    .map(|()| 0)
}

/// The store of this host.
pub(crate) fn store() -> Result<Store, Failure> {
    let config = Config::load().map_err(|error| Failure::Refused(chain(&error)))?;
    let store = Store::new(&config.state_dir);
    if !nix::unistd::geteuid().is_root() {
        let root = store.root().display();
        return Err(Failure::Refused(format!(
            "snapshot store {root}: it holds guests' memory and is root's alone; run spore as root"
        )));
    }
    Ok(store)
}

/// Removes one that served its purpose; it goes by itself after a day if it cannot.
pub(crate) fn discard(store: &Store, id: SnapshotId) {
    match store.remove(id) {
        Ok(()) | Err(StoreError::NoSuch { .. }) => {}
        Err(error) => {
            let error = Failure::from(error);
            eprintln!("spore: warning: snapshot {id} stays for now: {error}");
        }
    }
}
