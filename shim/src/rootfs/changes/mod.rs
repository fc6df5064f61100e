//! The export of a container's changes (DESIGN 5): while a container is paused or stopped, the host's
//! upper directory holds what it changed, for clients that commit, diff or copy. Before the
//! container runs on, the directory gets back what it held before.
//!
//! Beside the writable disk stand `changes.json`, which says how far that has come, and
//! `changes.base`, a copy of what the directory held before. What is there after a kill:
//!
//! | `changes.json` | the upper directory | the next start |
//! |---|---|---|
//! | none, `failed` | its own content (`failed` tells the user why there are no changes) | takes it as it is |
//! | `working` | unknown | gives its content back from the copy |
//! | `complete`, its stamp fits | the copy, with the guest's changes over it | the same, once the guest has its disks |
//! | `complete`, another stamp | that, changed since by a client | takes all of it as it is, over a new writable disk |
//!
//! In the last case nothing is lost, for all that the disk held is in the directory too.

mod apply;
mod archive;
mod confine;
pub(crate) mod helper;

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde::{Deserialize, Serialize};

use self::archive::Limits;
use super::{RootfsError, blocking, upper, writable};

const MARKER: &str = "changes.json";
const BASE: &str = "changes.base";
const BASE_UNFINISHED: &str = "changes.base.new";
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

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "snake_case")]
enum Marker {
    Working { base: bool },
    Complete { base: bool, stamp: Option<String> },
    Failed { reason: String },
}

impl Marker {
    /// Whether there is a copy of what the directory held before.
    fn has_base(&self) -> bool {
        match self {
            Self::Working { base } | Self::Complete { base, .. } => *base,
            Self::Failed { .. } => false,
        }
    }
}

/// What the guest's layer of the host's upper directory is made from.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Ground {
    Directory(PathBuf),
    Nothing,
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
    /// much could not be exported. What fails leaves the directory as it was.
    pub(crate) async fn export(&self, stream: Option<UnixStream>) -> Result<u64, ChangesError> {
        let outcome = match stream {
            Some(stream) => self.fill(stream).await,
            None => self.take_back().await.map(|()| 0),
        };
        if let Err(error) = &outcome {
            self.fail(&error.detail).await?;
        }
        outcome
    }

    async fn fill(&self, stream: UnixStream) -> Result<u64, ChangesError> {
        self.off_thread("prepare", |layer| layer.begin()).await?;
        let filled = helper::fill(&self.upper, self.limits, stream).await;
        let skipped = filled.map_err(self.error("export"))?;
        self.off_thread("complete", |layer| layer.complete()).await?;
        Ok(skipped)
    }

    /// Notes why there are no changes, and leaves the directory as it was.
    pub(crate) async fn fail(&self, reason: &str) -> Result<(), ChangesError> {
        let reason = reason.to_owned();
        self.off_thread("undo", |layer| layer.undo(Some(reason))).await
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
        let layer = Layer { upper: self.upper.clone(), beside: self.beside.clone() };
        let done = blocking(move || work(&layer)).await;
        done.map_err(|error| self.error(operation)(error.to_string()))
    }
}

/// Brings a layer whose task has ended, however that was, into a state to start from.
pub(super) fn settle(upper: &Path, beside: &Path) -> Result<Ground, RootfsError> {
    let layer = Layer { upper: upper.into(), beside: beside.into() };
    let Some(marker) = layer.marker()? else { return Ok(Ground::Directory(upper.into())) };
    let disk = layer.file(writable::DISK);
    // A sandbox that lives exports as it likes.
    let _unused = if disk.exists() { Some(writable::open_locked(&disk)?) } else { None };
    match marker {
        Marker::Complete { base, stamp } if layer.stamp()? == stamp => {
            return Ok(if base { Ground::Directory(layer.file(BASE)) } else { Ground::Nothing });
        }
        Marker::Complete { .. } => layer.adopt()?,
        Marker::Working { .. } | Marker::Failed { .. } => layer.undo(None)?,
    }
    Ok(Ground::Directory(upper.into()))
}

/// The steps, each of which may be the last before a kill.
struct Layer {
    upper: PathBuf,
    beside: PathBuf,
}

impl Layer {
    fn file(&self, name: &str) -> PathBuf {
        self.beside.join(name)
    }

    fn marker(&self) -> Result<Option<Marker>, RootfsError> {
        let path = self.file(MARKER);
        match std::fs::read(&path) {
            // It is written at once or not at all; another version's is as good as unfinished.
            Ok(text) => Ok(Some(
                serde_json::from_slice(&text).unwrap_or(Marker::Working { base: self.file(BASE).exists() }),
            )),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(failed("read", &path)(error)),
        }
    }

    fn mark(&self, marker: &Marker) -> Result<(), RootfsError> {
        let path = self.file(MARKER);
        let text = serde_json::to_vec(marker).map_err(|error| failed("write", &path)(error.into()))?;
        writable::publish(&self.beside, MARKER, |mut file: &File| file.write_all(&text))
            .map_err(failed("write", &path))
    }

    fn stamp(&self) -> Result<Option<String>, RootfsError> {
        upper::content(&self.upper).map_err(|(path, error)| failed("look at", &path)(error))
    }

    /// Puts what the directory holds aside, for the changes to come over it.
    fn begin(&self) -> Result<(), RootfsError> {
        self.undo(None)?;
        let base = self.stamp()?.is_some();
        if base {
            copy(&self.upper, &self.file(BASE_UNFINISHED))?;
            let target = self.file(BASE);
            std::fs::rename(self.file(BASE_UNFINISHED), &target).map_err(failed("rename", &target))?;
        }
        self.mark(&Marker::Working { base })
    }

    fn complete(&self) -> Result<(), RootfsError> {
        let base = self.marker()?.is_some_and(|marker| marker.has_base());
        self.mark(&Marker::Complete { base, stamp: self.stamp()? })
    }

    /// Gives the directory its own content back, if it has another.
    fn undo(&self, reason: Option<String>) -> Result<(), RootfsError> {
        match self.marker()? {
            None | Some(Marker::Failed { .. }) => {}
            Some(marker) => {
                let base = marker.has_base();
                // A half-emptied directory must not be taken for one that a client changed.
                self.mark(&Marker::Working { base })?;
                self.clear()?;
                if base {
                    copy(&self.file(BASE), &self.upper)?;
                }
            }
        }
        match reason {
            Some(reason) => self.mark(&Marker::Failed { reason })?,
            None => remove_file(&self.file(MARKER))?,
        }
        // Without the marker nobody looks at them.
        remove_tree(&self.file(BASE_UNFINISHED))?;
        remove_tree(&self.file(BASE))
    }

    fn clear(&self) -> Result<(), RootfsError> {
        let directory = File::open(&self.upper).map_err(failed("open", &self.upper))?;
        apply::clear(&directory.into()).map_err(|error| failed("empty", &self.upper)(error.into()))
    }

    /// Makes all that is in the directory its own content, and the writable disk a new one.
    fn adopt(&self) -> Result<(), RootfsError> {
        remove_file(&self.file(writable::DISK))?;
        remove_file(&self.file(MARKER))?;
        remove_tree(&self.file(BASE))
    }
}

fn failed(operation: &'static str, path: &Path) -> impl FnOnce(io::Error) -> RootfsError {
    writable::host(operation, path)
}

fn remove_file(path: &Path) -> Result<(), RootfsError> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(failed("remove", path)(error)),
        _ => Ok(()),
    }
}

fn remove_tree(path: &Path) -> Result<(), RootfsError> {
    match std::fs::remove_dir_all(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(failed("remove", path)(error)),
        _ => Ok(()),
    }
}

/// Copies what is in a directory with all that overlayfs looks at. A client put it there, not the
/// guest; mostly there is nothing.
fn copy(from: &Path, to: &Path) -> Result<(), RootfsError> {
    let result = Command::new("cp")
        .env("PATH", "/usr/local/bin:/usr/bin:/bin")
        .args(["--archive", "--reflink=auto", "--no-target-directory", "--"])
        .args([from, to])
        .stdin(Stdio::null())
        .output()
        .map_err(failed("run cp for", from))?;
    if result.status.success() {
        return Ok(());
    }
    let text = String::from_utf8_lossy(&result.stderr).trim().replace('\n', " | ");
    Err(failed("copy", from)(io::Error::other(format!("cp: {}: {text}", result.status))))
}

#[cfg(test)]
mod tests;
