//! `spore fs put`: standard input into a file, or into a place in it.

use std::io::Read;

use serde_json::json;
use spore_agent_api::files::MAX_CHUNK;
use spore_agent_api::v1::files::write_request::Create;
use spore_agent_api::v1::files::{Mode, Owner, SetAttributesRequest, Size, WriteRequest};

use super::{Place, octal};
use crate::Global;
use crate::failure::Failure;
use crate::show;

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Write from this byte on and keep the rest, instead of replacing the file's content
    #[arg(long, value_name = "BYTES")]
    offset: Option<u64>,
    /// The file's mode; without it a new file gets 0644, and another keeps its own
    #[arg(short, long, value_parser = octal)]
    mode: Option<u32>,
    /// The file's user, by number
    #[arg(long, requires = "gid")]
    uid: Option<u32>,
    /// The file's group, by number
    #[arg(long, requires = "uid")]
    gid: Option<u32>,
    #[command(flatten)]
    place: Place,
}

const MODE: u32 = 0o644;

pub(super) async fn run(global: &Global, args: Args) -> Result<(), Failure> {
    let (remote, path) = args.place.connect(global).await?;
    let owner = args.uid.zip(args.gid).map(|(uid, gid)| Owner { uid, gid, ..Default::default() });
    // The file is there, and empty unless it is only patched, before input is waited for.
    let first = WriteRequest {
        path: path.clone(),
        create: Create::IF_MISSING.into(),
        mode: args.mode.unwrap_or(MODE),
        owner: owner.clone().into(),
        size: args.offset.is_none().then(Size::new).into(),
        ..Default::default()
    };
    remote.write(first).await?;
    let begin = args.offset.unwrap_or(0);
    let mut at = begin;
    loop {
        let data = tokio::task::spawn_blocking(read_some).await;
        let data = data.map_err(std::io::Error::other).and_then(|read| read);
        let data = data.map_err(|source| Failure::Host {
            operation: "read",
            path: "standard input".into(),
            source,
        })?;
        if data.is_empty() {
            break;
        }
        let length = data.len() as u64;
        remote.write(WriteRequest { path: path.clone(), offset: at, data, ..Default::default() }).await?;
        at = at.saturating_add(length);
    }
    if args.mode.is_some() || owner.is_some() {
        let mode = args.mode.map(|bits| Mode { bits, ..Default::default() });
        let (path, mode, owner) = (path.clone(), mode.into(), owner.into());
        remote
            .set_attributes(SetAttributesRequest { path, follow: true, mode, owner, ..Default::default() })
            .await?;
    }
    if global.json {
        show::json(&json!({ "path": show::json_name(&path), "bytes": at.saturating_sub(begin) }))?;
    }
    Ok(())
}

/// A full piece, or the rest of the input.
fn read_some() -> std::io::Result<Vec<u8>> {
    let mut data = Vec::with_capacity(MAX_CHUNK);
    std::io::stdin().lock().take(MAX_CHUNK as u64).read_to_end(&mut data)?;
    Ok(data)
}
