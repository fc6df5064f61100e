//! A snapshot that a user asks for: what a checkpoint is (`super::checkpoint`), but for the store alone, and for a container
//! that goes on meanwhile.

use std::sync::Arc;
use std::time::Duration;

use slog::{info, warn};
use tokio::task::JoinHandle;

use super::Container;
use crate::error::{Error, chain};
use crate::snapshot::manifest::Purpose;
use crate::snapshot::{SnapshotId, Store};
use crate::vm::SnapshotTimes;

/// A snapshot whose container goes on. The store has it when it is written.
pub(crate) struct Underway {
    pub(crate) id: SnapshotId,
    /// For how long the container stood still.
    pub(crate) stood: Duration,
    /// Of its VM within that.
    pub(crate) times: SnapshotTimes,
    writing: JoinHandle<Result<(), Error>>,
}

impl Container {
    /// Returns when the container goes on. What is written then has one owner, the task that writes it: whatever ends
    /// that takes the half-made draft away.
    pub(crate) async fn snapshot(
        self: &Arc<Self>,
        store: Store,
        purpose: Purpose,
    ) -> Result<Underway, Error> {
        let staying = Arc::clone(&self.staying).read_owned().await;
        let (turn, taken) = self.stand_and_take(&store, false).await?;
        drop(turn);
        let (id, stood, times) = (taken.id(), taken.stood, taken.times());
        let this = Arc::clone(self);
        let writing = tokio::spawn(async move {
            let finished = this.finish(taken, purpose).await;
            drop(staying);
            tokio::spawn(Arc::clone(&this).look_after_layers());
            match finished {
                Ok(_) => {
                    info!(this.log, "snapshot"; "snapshot" => %id);
                    Ok(())
                }
                // Perhaps nobody waits for it.
                Err(error) => {
                    warn!(this.log, "a snapshot is lost"; "snapshot" => %id, "error" => chain(&error));
                    Err(error)
                }
            }
        });
        Ok(Underway { id, stood, times, writing })
    }
}

impl Underway {
    /// Waits until it is in the store, durable. Who does not wait leaves it to itself.
    pub(crate) async fn written(self) -> Result<(), Error> {
        let cut = |error| Error::State(format!("snapshot {}: cut short in the shim: {error}", self.id));
        self.writing.await.map_err(cut)?
    }
}
