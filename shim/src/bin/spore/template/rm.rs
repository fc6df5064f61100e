//! `spore template rm`.

use crate::Global;
use crate::failure::Failure;
use crate::snapshot::{rm, store};

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The templates' names, or ids
    #[arg(required = true, value_name = "NAME")]
    names: Vec<String>,
}

/// With a name that means none, nothing is removed.
pub(super) fn run(global: &Global, args: &Args) -> Result<(), Failure> {
    let store = store()?;
    let meant = args.names.iter().map(|wanted| store.find_template(wanted)).collect::<Result<_, _>>()?;
    rm::remove(global, &store, meant)
}
