//! The export of a container's changes (DESIGN 5): while a container is paused or stopped, the host's
//! upper directory holds what it changed, for clients that commit, diff or copy. Before the
//! container runs on, the directory gets back what it held before.
//!
//! Rooms: `layer` what stands on the host and survives a kill, `helper` the process that fills the
//! directory (`confine`, `archive`, `apply`).

mod apply;
mod archive;
mod confine;
pub(crate) mod helper;
mod layer;
#[cfg(test)]
mod tests;

use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use self::archive::Limits;
use self::layer::Layer;
pub(super) use self::layer::{Ground, settle, settle_restored, sweep};
use super::{RootfsError, blocking};

/// A file of the guest's takes at least as much of its disk, so that it cannot send more files.
const BYTES_PER_ENTRY: u64 = 4096;

#[derive(Debug, thiserror::Error)]
#[error(
    "changes of the container in {upper}: {operation}: {detail}; annotation io.spore.export_changes=false does without the export"
)]
pub(crate) struct ChangesError {
    upper: PathBuf,
    operation: &'static str,
    detail: String,
}

/// The upper directory of one container.
#[derive(Debug, Clone)]
pub(crate) struct Changes {
    upper: PathBuf,
    beside: PathBuf,
    limits: Limits,
}

impl Changes {
    /// Of a layer whose disk holds so many bytes.
    pub(super) fn new(upper: &Path, beside: &Path, bytes: u64) -> Self {
        let limits = Limits { entries: bytes / BYTES_PER_ENTRY, bytes };
        Self { upper: upper.into(), beside: beside.into(), limits }
    }

    /// Exports what the guest sends on `stream`; without one it has changed nothing. Returns how
    /// much could not be exported. What fails, or is ended by `stop` with its reason, leaves the
    /// directory as it was.
    pub(crate) async fn export(
        &self,
        stream: Option<UnixStream>,
        stop: impl Future<Output = &'static str>,
    ) -> Result<u64, ChangesError> {
        let outcome = match stream {
            Some(stream) => self.fill(stream, stop).await,
            None => self.take_back().await.map(|()| 0),
        };
        if let Err(error) = &outcome {
            self.fail(&error.detail).await?;
        }
        outcome
    }

    async fn fill(
        &self,
        stream: UnixStream,
        stop: impl Future<Output = &'static str>,
    ) -> Result<u64, ChangesError> {
        self.off_thread("prepare", |layer| layer.begin()).await?;
        let filled = helper::fill(&self.upper, self.limits, stream, stop).await;
        let skipped = filled.map_err(self.error("export"))?;
        self.off_thread("complete", |layer| layer.complete()).await?;
        Ok(skipped)
    }

    /// Notes why there are no changes, and leaves the directory as it was.
    pub(crate) async fn fail(&self, reason: &str) -> Result<(), ChangesError> {
        let reason = reason.to_owned();
        self.off_thread("undo", |layer| layer.undo(Some(reason))).await
    }

    /// From here on an export is out of date, whatever becomes of this process. To come before
    /// anything that the container writes.
    pub(crate) async fn outdate(&self) -> Result<(), ChangesError> {
        self.off_thread("outdate", |layer| layer.outdate().map(drop)).await
    }

    /// Gives the directory back what it held before the export, if there was one.
    pub(crate) async fn take_back(&self) -> Result<(), ChangesError> {
        self.off_thread("take back", |layer| layer.undo(None)).await
    }

    fn error(&self, operation: &'static str) -> impl FnOnce(String) -> ChangesError {
        let upper = self.upper.clone();
        move |detail| ChangesError { upper, operation, detail }
    }

    async fn off_thread(
        &self,
        operation: &'static str,
        work: impl FnOnce(&Layer) -> Result<(), RootfsError> + Send + 'static,
    ) -> Result<(), ChangesError> {
        let layer = Layer::new(&self.upper, &self.beside);
        let done = blocking(move || work(&layer)).await;
        done.map_err(|error| self.error(operation)(error.to_string()))
    }
}
