//! `spore fs cat`: a file's bytes as they are; `--json` changes nothing about them.

use spore_agent_api::files::MAX_CHUNK;

use super::Place;
use crate::Global;
use crate::failure::Failure;
use crate::show;

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Begin at this byte
    #[arg(long, default_value_t = 0, value_name = "BYTES")]
    offset: u64,
    /// Write this many bytes at most
    #[arg(long, value_name = "BYTES")]
    length: Option<u64>,
    #[command(flatten)]
    place: Place,
}

pub(super) async fn run(global: &Global, args: Args) -> Result<(), Failure> {
    let (remote, path) = args.place.connect(global).await?;
    let mut at = args.offset;
    let mut left = args.length.unwrap_or(u64::MAX);
    while left > 0 {
        let wanted = usize::try_from(left).unwrap_or(usize::MAX).min(MAX_CHUNK);
        let piece = remote.read(&path, at, wanted, false).await?;
        show::bytes(&piece.data)?;
        let length = piece.data.len() as u64;
        (at, left) = (at.saturating_add(length), left.saturating_sub(length));
        if piece.end {
            break;
        }
    }
    Ok(())
}
