//! `spore template create`.

use serde_json::json;

use crate::Global;
use crate::failure::Failure;
use crate::show;
use crate::snapshot::create::{Wait, take};
use crate::snapshot::{discard, store};

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The template's name, one on this host
    name: String,
    #[command(flatten)]
    of: Of,
}

#[derive(Debug, clap::Args)]
#[group(required = true, multiple = false)]
struct Of {
    /// The id of a container, which goes on
    #[arg(long, value_name = "CONTAINER")]
    from: Option<String>,
    /// The id of a snapshot, or enough of its beginning; it stays
    #[arg(long, value_name = "ID")]
    snapshot: Option<String>,
}

pub(super) async fn run(global: &Global, args: &Args) -> Result<(), Failure> {
    let store = store()?;
    // Not after the container has stood still for nothing.
    store.check_name(&args.name)?;
    let (from, passing) = match (&args.of.from, &args.of.snapshot) {
        (Some(container), _) => {
            let answer = take(global, container, Wait::Durable, true).await?;
            (store.find(&answer.snapshot)?, true)
        }
        (None, snapshot) => (store.find(snapshot.as_deref().unwrap_or_default())?, false),
    };
    let named = store.name_template(from, &args.name);
    if passing {
        discard(&store, from);
    }
    let id = named?.id;
    match global.json {
        true => show::json(&json!({ "id": id, "name": args.name })),
        false => show::line(&id.to_string()),
    }
}
