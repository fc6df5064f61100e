//! `spore snapshot import`.

use std::fs::File;
use std::io::{self, BufReader, IsTerminal, Read};
use std::path::PathBuf;

use containerd_shim_spore::snapshot::{Policy, import_tar};
use serde_json::json;

use super::transfer::{self, Metered, STANDARD};
use crate::Global;
use crate::failure::Failure;
use crate::show;

/// Bytes that are read at once.
const BUFFER: usize = 1 << 20;

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The archive; - is standard input
    file: PathBuf,
}

pub(super) async fn run(global: &Global, args: Args) -> Result<(), Failure> {
    let store = super::store()?;
    let input: Box<dyn Read + Send> = if args.file.as_os_str() == STANDARD {
        if io::stdin().is_terminal() {
            return Err(Failure::Usage(
                "an archive is nothing for a terminal; name a file, or redirect".into(),
            ));
        }
        Box::new(io::stdin())
    } else {
        Box::new(File::open(&args.file).map_err(Failure::host("open", &args.file))?)
    };
    let name = show::name(args.file.as_os_str().as_encoded_bytes());
    let id = transfer::run(&name, move |meter| {
        let mut input = BufReader::with_capacity(BUFFER, Metered::new(input, meter));
        Ok(import_tar(&store, &mut input, &Policy::ADMITTED)?)
    })
    .await?;
    if global.json { show::json(&json!({ "id": id })) } else { show::line(&id.to_string()) }
}
