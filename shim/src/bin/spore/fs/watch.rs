//! `spore fs watch`: each change on a line of its own, as soon as it happens. The first line says
//! that the watch stands.

use serde_json::json;
use spore_agent_api::v1::files::WatchEvent;
use spore_agent_api::v1::files::watch_event::Kind;

use super::Place;
use crate::Global;
use crate::failure::Failure;
use crate::show;

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Every directory below too
    #[arg(short, long)]
    recursive: bool,
    #[command(flatten)]
    place: Place,
}

pub(super) async fn run(global: &Global, args: Args) -> Result<(), Failure> {
    let (remote, path) = args.place.connect(global).await?;
    let mut watching = remote.watch(&path, args.recursive).await?;
    loop {
        let event = tokio::select! {
            event = watching.next() => event?,
            interrupt = tokio::signal::ctrl_c() => {
                return interrupt.map_err(|source| Failure::Host { operation: "watch", path: "SIGINT".into(), source });
            }
        };
        // The guest says GONE before it ends a watch; without that it was cut off.
        let Some(event) = event else {
            let detail = "the watch ended before it was told why".into();
            return Err(Failure::Container { id: remote.id().into(), detail });
        };
        let Some(kind) = word(&event) else { continue };
        if global.json {
            let mut value =
                json!({ "event": kind, "path": show::json_name(&event.path), "directory": event.directory });
            if event.cookie != 0 {
                value["cookie"] = event.cookie.into();
            }
            show::json(&value)?;
        } else {
            let slash = if event.directory && !event.path.ends_with(b"/") { "/" } else { "" };
            show::line(format!("{kind:<10} {}{slash}", show::name(&event.path)).trim_end())?;
        }
        if event.kind.enum_value() == Ok(Kind::GONE) {
            return Ok(());
        }
    }
}

/// Nothing for a sign of life, and for what a newer guest may tell.
fn word(event: &WatchEvent) -> Option<&'static str> {
    match event.kind.enum_value().ok()? {
        Kind::ALIVE => None,
        Kind::WATCHING => Some("watching"),
        Kind::CREATED => Some("created"),
        Kind::MODIFIED => Some("modified"),
        Kind::WRITTEN => Some("written"),
        Kind::ATTRIBUTES => Some("attributes"),
        Kind::MOVED_FROM => Some("moved-from"),
        Kind::MOVED_TO => Some("moved-to"),
        Kind::REMOVED => Some("removed"),
        Kind::OVERFLOW => Some("overflow"),
        Kind::GONE => Some("gone"),
    }
}
