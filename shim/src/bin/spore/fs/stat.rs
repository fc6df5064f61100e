//! `spore fs stat`.

use super::{Place, as_json, kind_name, mode_text};
use crate::Global;
use crate::failure::Failure;
use crate::show;

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Show what a link points to
    #[arg(short = 'L', long)]
    follow: bool,
    #[command(flatten)]
    place: Place,
}

pub(super) async fn run(global: &Global, args: Args) -> Result<(), Failure> {
    let (remote, path) = args.place.connect(global).await?;
    let found = remote.stat(&path, args.follow).await?;
    if global.json {
        let mut value = as_json(&found.attributes);
        value["path"] = show::json_name(&path);
        if !found.target.is_empty() {
            value["target"] = show::json_name(&found.target);
        }
        return show::json(&value);
    }
    let told = &found.attributes;
    let mut rows = vec![
        ("path", show::name(&path)),
        ("kind", kind_name(found.kind()).to_owned()),
        ("mode", format!("{:04o} {}", told.mode, mode_text(told))),
        ("owner", format!("{}:{}", told.uid, told.gid)),
        ("size", told.size.to_string()),
        ("allocated", told.allocated.to_string()),
        ("links", told.links.to_string()),
        ("accessed", show::time(told.accessed_ns)),
        ("modified", show::time(told.modified_ns)),
        ("changed", show::time(told.changed_ns)),
    ];
    if !found.target.is_empty() {
        rows.insert(1, ("target", show::name(&found.target)));
    }
    let rows: Vec<_> = rows.into_iter().map(|(key, value)| vec![key.to_owned(), value]).collect();
    show::table(&rows)
}
