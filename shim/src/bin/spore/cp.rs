//! `spore cp`: files and trees between the host and a container, with Docker's rules for what
//! goes where (`place`). `pull` copies out of a container, `push` into one; `host` is what may be
//! done on the host with names that a guest gave.
//!
//! Modes, times, links and holes are kept; owners with `--archive` only. Without it what is
//! copied out is the caller's and has no set-id bits, what is copied in is root's.

mod host;
mod place;
mod pull;
mod push;

use std::ffi::OsString;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use serde_json::json;

use crate::Global;
use crate::failure::Failure;
use crate::progress::Progress;
use crate::remote::Remote;
use crate::show;
use place::Side;

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Keep users, groups and set-id bits
    #[arg(short, long)]
    archive: bool,
    /// Copy what SOURCE points to, if it is a link
    #[arg(short = 'L', long)]
    follow_link: bool,
    /// PATH, or CONTAINER:PATH
    source: OsString,
    /// CONTAINER:PATH, or PATH
    destination: OsString,
}

/// What both directions are told.
#[derive(Debug, Clone, Copy)]
struct Options {
    archive: bool,
    follow: bool,
}

/// Directories below each other that are copied.
const MAX_DEPTH: usize = 256;

pub(crate) async fn run(global: &Global, args: Args) -> Result<u8, Failure> {
    let (source, destination) = (place::side(&args.source)?, place::side(&args.destination)?);
    let progress = Progress::new();
    let follow = args.follow_link || place::follows(args.source.as_bytes());
    let options = Options { archive: args.archive, follow };
    let copied = match (source, destination) {
        (Side::Container { id, path }, Side::Host(to)) => {
            let remote = Remote::connect(global, &id).await?;
            pull::run(&remote, &path, Path::new(&to), options, &progress).await
        }
        (Side::Host(from), Side::Container { id, path }) => {
            let remote = Remote::connect(global, &id).await?;
            push::run(&remote, Path::new(&from), &path, options, &progress).await
        }
        (Side::Host(_), Side::Host(_)) => {
            let message = "one of both must be CONTAINER:PATH; copy on the host with cp";
            return Err(Failure::Usage(message.into()));
        }
        (Side::Container { .. }, Side::Container { .. }) => {
            let message = "one of both must be a path of the host; copy through it";
            return Err(Failure::Usage(message.into()));
        }
    };
    progress.finish();
    let skipped = copied?;
    if global.json {
        let (files, bytes) = progress.totals();
        let skipped: Vec<_> = skipped.iter().map(|path| show::json_name(path)).collect();
        show::json(&json!({ "entries": files, "bytes": bytes, "skipped": skipped }))?;
    }
    for path in &skipped {
        eprintln!("spore: warning: {}: neither file, directory nor link; not copied", show::name(path));
    }
    if skipped.is_empty() {
        return Ok(0);
    }
    Err(Failure::Refused(format!("not copied: {} of the entries", skipped.len())))
}

/// A name in a directory of a container.
fn join(directory: &[u8], name: &[u8]) -> Vec<u8> {
    // "DIRECTORY/." is the directory.
    let directory = directory.strip_suffix(b"/.").unwrap_or(directory);
    let slash: &[u8] = if directory.ends_with(b"/") { b"" } else { b"/" };
    [directory, slash, name].concat()
}

/// A name that nobody else has, for what is not complete.
fn draft_name() -> String {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    format!(".spore-cp-{}-{}", std::process::id(), now.as_nanos())
}

/// Ends a copy at Ctrl-C, so that what it has begun can be taken away again.
async fn until_interrupted<T>(copy: impl Future<Output = Result<T, Failure>>) -> Result<T, Failure> {
    tokio::select! {
        copied = copy => copied,
        _ = tokio::signal::ctrl_c() => Err(Failure::Interrupted),
    }
}
