//! The copy of one output of a process: from one machine after the other to a client.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use slog::{Logger, debug, warn};
use tokio::io::AsyncReadExt;
use tokio::sync::{mpsc, watch};

use super::CHUNK;
use super::guest_ends::GuestOutput;
use super::sink::Sink;

/// Most that is kept of what a client has not taken, while a machine is emptied that is put away. More than the buffers on the way hold.
const MOST_KEPT: usize = 4 << 20;

/// Guest's ends of a process's outputs.
#[derive(Debug, Default, Clone, Copy)]
pub(super) struct Counts {
    /// Those that have not been copied to their end.
    pub(super) running: usize,
    /// Those of them from which nothing can come any more.
    pub(super) resting: usize,
}

impl Counts {
    pub(super) fn none_runs(&self) -> bool {
        self.running == 0
    }
}

/// What a copy shares with the others of its process.
pub(super) struct Shared {
    pub(super) counts: watch::Sender<Counts>,
    pub(super) resting: watch::Receiver<bool>,
    pub(super) progress: Arc<AtomicU64>,
}

/// Bytes of the guest's that the client has still to take.
#[derive(Default)]
struct Pending {
    buffer: Vec<u8>,
    start: usize,
    end: usize,
}

impl Pending {
    fn bytes(&self) -> &[u8] {
        &self.buffer[self.start..self.end]
    }

    fn is_empty(&self) -> bool {
        self.start == self.end
    }

    /// For what follows. There is never more than twice what is pending.
    fn room(&mut self) -> &mut [u8] {
        if self.is_empty() {
            (self.start, self.end) = (0, 0);
            self.buffer.truncate(CHUNK);
        }
        if self.start >= CHUNK {
            self.buffer.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
        if self.buffer.len() - self.end < CHUNK {
            self.buffer.resize(self.end + CHUNK, 0);
        }
        &mut self.buffer[self.end..]
    }

    async fn write_to(&mut self, sink: Option<&mut Sink>, progress: &AtomicU64) -> io::Result<()> {
        match sink {
            Some(sink) => {
                let written = sink.write(self.bytes()).await?;
                progress.fetch_add(written as u64, Ordering::Relaxed);
                self.start += written;
            }
            None => self.start = self.end,
        }
        Ok(())
    }
}

/// Copies one machine's output after the other's. Ends when nothing can follow.
pub(super) async fn copy_outputs(
    first: GuestOutput,
    mut next: mpsc::UnboundedReceiver<GuestOutput>,
    mut sink: Option<Sink>,
    mut shared: Shared,
    log: Logger,
) {
    let mut pending = Pending::default();
    let mut current = Some(first);
    while let Some(output) = current {
        let (name, mut total) = (output.name, 0);
        if let Err(error) = copy_output(output, sink.as_mut(), &mut pending, &mut total, &mut shared).await {
            warn!(log, "stream broken"; "stream" => name, "bytes" => total, "error" => %error);
        }
        shared.counts.send_modify(|counts| counts.resting += 1);
        current = follower(&mut next, &mut shared, sink.as_mut(), &mut pending).await;
        let last = current.is_none();
        if last {
            let finished = finish(sink.take(), &mut pending, &shared.progress).await;
            debug!(log, "stream ended"; "stream" => name, "bytes" => total, "finished" => ?finished);
        }
        shared.counts.send_modify(|counts| {
            counts.resting -= 1;
            counts.running -= 1;
        });
        if last {
            current = next.recv().await;
        }
    }
}

/// The machine that there is after one, or the one that comes while the streams rest. Meanwhile the client takes what is pending.
async fn follower(
    next: &mut mpsc::UnboundedReceiver<GuestOutput>,
    shared: &mut Shared,
    mut sink: Option<&mut Sink>,
    pending: &mut Pending,
) -> Option<GuestOutput> {
    loop {
        tokio::select! {
            biased;
            Some(found) = next.recv() => return Some(found),
            _ = shared.resting.wait_for(|resting| !*resting) => return None,
            written = pending.write_to(sink.as_deref_mut(), &shared.progress), if !pending.is_empty() => {
                if written.is_err() {
                    // Who reads it is gone for good; its end says so.
                    pending.start = pending.end;
                }
            }
        }
    }
}

async fn finish(sink: Option<Sink>, pending: &mut Pending, progress: &AtomicU64) -> io::Result<()> {
    let Some(mut sink) = sink else { return Ok(()) };
    while !pending.is_empty() {
        pending.write_to(Some(&mut sink), progress).await?;
    }
    sink.finish(progress).await
}

/// To the end of what a machine sends. What a client has not taken by then is pending only if the machine is put away.
async fn copy_output(
    output: GuestOutput,
    mut sink: Option<&mut Sink>,
    pending: &mut Pending,
    total: &mut u64,
    shared: &mut Shared,
) -> io::Result<()> {
    let mut from = output.from;
    loop {
        let length = if pending.is_empty() {
            from.read(pending.room()).await?
        } else {
            let resting = *shared.resting.borrow_and_update();
            let more = resting && pending.bytes().len() < MOST_KEPT;
            tokio::select! {
                biased;
                written = pending.write_to(sink.as_deref_mut(), &shared.progress) => {
                    written?;
                    continue;
                }
                Ok(()) = shared.resting.changed() => continue,
                readable = from.readable(), if more => readable?,
            }
            match from.try_read(pending.room()) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => continue,
                read => read?,
            }
        };
        if length == 0 {
            return Ok(());
        }
        pending.end += length;
        *total += length as u64;
    }
}
