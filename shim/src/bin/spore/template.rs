//! `spore template`: snapshots with a name, which containers begin with that have it as their annotation. What there is of them
//! is in the store of snapshots.

mod create;
mod ls;
mod prune;
mod rm;

use clap::Subcommand;

use crate::Global;
use crate::failure::Failure;

#[derive(Debug, Subcommand)]
pub(crate) enum Verb {
    /// Keep a container as it is now, or a snapshot of one, under a name, and print its id
    Create(create::Args),
    /// List the templates of this host
    Ls,
    /// Remove templates; containers that began with them keep what they have
    Rm(rm::Args),
    /// Remove templates that were made long ago, and print their names
    Prune(prune::Args),
}

pub(crate) async fn run(global: &Global, verb: Verb) -> Result<u8, Failure> {
    match verb {
        Verb::Create(args) => create::run(global, &args).await,
        Verb::Ls => ls::run(global),
        Verb::Rm(args) => rm::run(global, &args),
        Verb::Prune(args) => prune::run(global, &args),
    }
    .map(|()| 0)
}
