//! `spore fs ls`.

use serde_json::json;

use super::{Place, as_json, mode_text};
use crate::Global;
use crate::failure::Failure;
use crate::show;

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    place: Place,
}

pub(super) async fn run(global: &Global, args: Args) -> Result<(), Failure> {
    let (remote, path) = args.place.connect(global).await?;
    let mut entries = Vec::new();
    let mut more = remote.stat(&path, true).await?.is_directory();
    if !more {
        // As ls(1): a file is listed itself.
        let found = remote.stat(&path, false).await?;
        entries.push((path.clone(), found.attributes));
    }
    let mut after = Vec::new();
    while more {
        let (page, goes_on) = remote.list(&path, &after).await?;
        more = goes_on;
        after = page.last().map(|entry| entry.name.clone()).unwrap_or_default();
        entries.extend(page.into_iter().map(|entry| (entry.name, entry.attributes.unwrap_or_default())));
    }
    if global.json {
        let entries = entries.iter().map(|(name, found)| {
            let mut value = as_json(found);
            value["name"] = show::json_name(name);
            value
        });
        return show::json(&json!(entries.collect::<Vec<_>>()));
    }
    let rows: Vec<_> = entries
        .iter()
        .map(|(name, found)| {
            vec![
                mode_text(found),
                found.uid.to_string(),
                found.gid.to_string(),
                found.size.to_string(),
                show::time(found.modified_ns),
                show::name(name),
            ]
        })
        .collect();
    show::table(&rows)
}
