//! The guest's ends of one process's streams.

use spore_agent_api::stream::Kind;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};

use crate::guest::{Guest, GuestError, GuestStdio};

const STDOUT: &str = "stdout";
pub(super) const STDERR: &str = "stderr";
/// Stands for standard output, and for input.
const TERMINAL: &str = "terminal";

/// See the module.
pub(crate) struct GuestEnds {
    pub(super) stdin: Option<OwnedWriteHalf>,
    pub(super) outputs: Vec<GuestOutput>,
}

pub(super) struct GuestOutput {
    pub(super) name: &'static str,
    pub(super) from: OwnedReadHalf,
    /// The unused direction: closing it would look as if the client had gone.
    pub(super) _keep: Option<OwnedWriteHalf>,
}

impl GuestEnds {
    /// Connects to the streams that are wanted. A process that was `restored` has those that it was created with: fewer than
    /// are wanted now, or more, which nobody reads, so that they must be emptied.
    pub(super) async fn open(
        guest: &Guest,
        (id, exec_id): (&str, &str),
        wanted: GuestStdio,
        restored: bool,
    ) -> Result<Self, GuestError> {
        let open = async |name: &'static str, kind: Kind| match guest.open_stdio(id, exec_id, kind).await? {
            None if !restored => Err(GuestError::Connect {
                what: "open a stdio stream",
                detail: format!("the process has no {name}"),
            }),
            stream => Ok(stream),
        };
        let mut ends = Self { stdin: None, outputs: Vec::new() };
        if wanted.terminal {
            if (wanted.stdin || wanted.stdout || restored)
                && let Some(stream) = open(TERMINAL, Kind::Stdin).await?
            {
                let (from, to_guest) = stream.into_split();
                let (stdin, keep) =
                    if wanted.stdin { (Some(to_guest), None) } else { (None, Some(to_guest)) };
                ends.stdin = stdin;
                ends.outputs.push(GuestOutput { name: TERMINAL, from, _keep: keep });
            }
            return Ok(ends);
        }
        for (name, kind, wanted) in
            [(STDOUT, Kind::Stdout, wanted.stdout), (STDERR, Kind::Stderr, wanted.stderr)]
        {
            if (wanted || restored)
                && let Some(stream) = open(name, kind).await?
            {
                let (from, keep) = stream.into_split();
                ends.outputs.push(GuestOutput { name, from, _keep: Some(keep) });
            }
        }
        // Last: to be hung up, because another cannot be had, is its end for the process.
        if wanted.stdin
            && let Some(stream) = open("stdin", Kind::Stdin).await?
        {
            // Nothing comes back on it.
            ends.stdin = Some(stream.into_split().1);
        }
        Ok(ends)
    }
}
