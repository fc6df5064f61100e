//! The copy of a process's input: from a client's fifo to one machine after the other.

use std::io;

use slog::{Logger, debug};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::unix::OwnedWriteHalf;
use tokio::net::unix::pipe::Receiver;
use tokio::sync::mpsc;

use super::{CHUNK, Turn};

/// Bytes of the client's that the guest has still to take.
struct Pending {
    buffer: Vec<u8>,
    start: usize,
    end: usize,
}

/// Copies to one machine after the other, of the input as it comes.
pub(super) async fn copy_input(
    fifo: Receiver,
    mut guest: OwnedWriteHalf,
    mut next: mpsc::UnboundedReceiver<Turn>,
    log: Logger,
) {
    let mut fifo = Some(fifo);
    let mut pending = Pending { buffer: vec![0; CHUNK], start: 0, end: 0 };
    loop {
        let turn = tokio::select! {
            biased;
            turn = next.recv() => turn,
            ended = feed(fifo.as_mut(), &mut guest, &mut pending) => {
                // A process that does not read its input to the end is no fault.
                debug!(log, "stdin ended"; "result" => ?ended);
                // So a client that goes on learns it.
                fifo = None;
                (pending.start, pending.end) = (0, 0);
                next.recv().await
            }
        };
        match turn {
            Some(Turn::Machine(other)) => guest = other,
            // What the guest has been sent it has, and what it has not stays here.
            Some(Turn::Rest(done)) => {
                let ended = guest.shutdown().await;
                debug!(log, "stdin rests"; "result" => ?ended);
                let _ = done.send(());
                match machine(&mut next).await {
                    Some(other) => guest = other,
                    None => return,
                }
            }
            None => return,
        }
    }
}

/// Rests until there is one.
async fn machine(next: &mut mpsc::UnboundedReceiver<Turn>) -> Option<OwnedWriteHalf> {
    loop {
        match next.recv().await? {
            Turn::Machine(other) => return Some(other),
            Turn::Rest(done) => drop(done.send(())),
        }
    }
}

/// To the input's end. May be dropped at any time: `pending` has what was not taken then.
async fn feed(
    mut fifo: Option<&mut Receiver>,
    guest: &mut OwnedWriteHalf,
    pending: &mut Pending,
) -> io::Result<()> {
    loop {
        while pending.start < pending.end {
            pending.start += guest.write(&pending.buffer[pending.start..pending.end]).await?;
        }
        let length = match &mut fifo {
            Some(fifo) => fifo.read(&mut pending.buffer).await?,
            None => 0,
        };
        (pending.start, pending.end) = (0, length);
        if length == 0 {
            return guest.shutdown().await;
        }
    }
}
