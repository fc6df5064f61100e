//! What of an export stands on the host, and how each step of it survives a kill.
//!
//! Beside the writable disk stand `changes.json`, which says how far that has come, and
//! `changes.base`, a copy of what the directory held before. What is there after a kill:
//!
//! | `changes.json` | the upper directory | the next start |
//! |---|---|---|
//! | none, `failed` | its own content (`failed` tells the user why there are no changes) | takes it as it is |
//! | `working`, or the file is `changes.undo` | unknown | gives its content back from the copy, as `delete` does of a `working` one |
//! | `complete`, its stamp fits | the copy, with the guest's changes over it | the same, once the guest has its disks |
//! | `complete`, another stamp or no disk | that, changed since by a client | takes all of it as it is, over a new writable disk |
//! | of another version | unknown | is refused |
//!
//! The guest has written its file system back before it sends what is in it, and the host what it
//! got before it says `complete`: at that moment disk and directory hold the same, also after a
//! loss of power. In the last case but one the disk's device nodes, sockets and ACLs are lost,
//! which the export does not have.

use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde::{Deserialize, Serialize};

use super::apply;
use crate::rootfs::{RootfsError, upper, writable};

const MARKER: &str = "changes.json";
/// The marker of what is being undone: renaming takes no room on a full disk, writing would.
const UNDONE: &str = "changes.undo";
pub(super) const BASE: &str = "changes.base";
pub(super) const BASE_UNFINISHED: &str = "changes.base.new";
/// Of the marker.
const VERSION: u32 = 1;

#[derive(Debug, Serialize, Deserialize)]
struct Versioned {
    version: u32,
    #[serde(flatten)]
    marker: serde_json::Value,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "snake_case")]
pub(super) enum Marker {
    Working {
        /// The directory, for who finds only this.
        #[serde(default)]
        upper: Option<PathBuf>,
    },
    Complete {
        stamp: Option<String>,
    },
    Failed {
        reason: String,
    },
}

/// What the guest's layer of the host's upper directory is made from.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Ground {
    /// From what this directory holds.
    Directory(PathBuf),
    /// There is none.
    Nothing,
}

/// Brings a layer whose task has ended, however that was, into a state to start from.
pub(crate) fn settle(upper: &Path, beside: &Path) -> Result<Ground, RootfsError> {
    let layer = Layer::new(upper, beside);
    let Some(marker) = layer.marker()? else { return Ok(Ground::Directory(upper.into())) };
    // A sandbox that lives exports as it likes.
    let unused = writable::lock_existing(beside)?;
    match marker {
        Marker::Complete { stamp } if unused.is_some() && layer.stamp()? == stamp => {
            return Ok(Ground::Directory(layer.file(BASE)));
        }
        Marker::Complete { .. } => layer.adopt()?,
        Marker::Working { .. } | Marker::Failed { .. } => layer.undo(None)?,
    }
    Ok(Ground::Directory(upper.into()))
}

/// As [`settle`], for a layer whose disk is going to be a snapshot's. A complete export stays for clients until the
/// disk is there; what only the directory has would be lost, and is not.
pub(crate) fn settle_restored(upper: &Path, beside: &Path) -> Result<(), RootfsError> {
    let layer = Layer::new(upper, beside);
    let Some(marker) = layer.marker()? else { return Ok(()) };
    let unused = writable::lock_existing(beside)?;
    match marker {
        Marker::Complete { stamp } if unused.is_some() && layer.stamp()? == stamp => Ok(()),
        Marker::Complete { .. } => Err(RootfsError::Changed { path: upper.into() }),
        Marker::Working { .. } | Marker::Failed { .. } => layer.undo(None),
    }
}

/// Takes back what a killed shim has left of an export that it had not finished. The caller has the directory's lock.
pub(in crate::rootfs) fn sweep(beside: &Path) -> Result<(), RootfsError> {
    let Ok(Some(Marker::Working { upper: Some(upper) })) = Layer::new(Path::new(""), beside).marker() else {
        return Ok(());
    };
    // A sandbox that lives exports as it likes.
    let _unused = writable::lock_existing(beside)?;
    Layer::new(&upper, beside).undo(None)
}

/// The steps, each of which may be the last before a kill.
pub(super) struct Layer {
    upper: PathBuf,
    beside: PathBuf,
}

impl Layer {
    pub(super) fn new(upper: &Path, beside: &Path) -> Self {
        Self { upper: upper.into(), beside: beside.into() }
    }

    fn file(&self, name: &str) -> PathBuf {
        self.beside.join(name)
    }

    pub(super) fn marker(&self) -> Result<Option<Marker>, RootfsError> {
        if self.file(UNDONE).exists() {
            return Ok(Some(Marker::Working { upper: None }));
        }
        let path = self.file(MARKER);
        let text = match std::fs::read(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(failed("read", &path)(error)),
        };
        // It is written at once or not at all, so it is not half of one of ours.
        let found: Result<Versioned, _> = serde_json::from_slice(&text);
        let ours = found.ok().filter(|found| found.version == VERSION);
        let marker = ours.and_then(|found| serde_json::from_value(found.marker).ok());
        marker.map(Some).ok_or_else(|| {
            failed("read", &path)(io::Error::other(format!(
                "not of version {VERSION}: it was written by another version of Spore, with which the container has to be started or removed"
            )))
        })
    }

    pub(super) fn mark(&self, marker: &Marker) -> Result<(), RootfsError> {
        let path = self.file(MARKER);
        let text = serde_json::to_value(marker)
            .and_then(|marker| serde_json::to_vec(&Versioned { version: VERSION, marker }))
            .map_err(|error| failed("write", &path)(error.into()))?;
        writable::publish(&self.beside, MARKER, |mut file: &File| file.write_all(&text))
            .map_err(failed("write", &path))
    }

    fn stamp(&self) -> Result<Option<String>, RootfsError> {
        upper::content(&self.upper).map_err(|(path, error)| failed("look at", &path)(error))
    }

    /// Puts what the directory holds aside, for the changes to come over it.
    pub(super) fn begin(&self) -> Result<(), RootfsError> {
        self.undo(None)?;
        copy(&self.upper, &self.file(BASE_UNFINISHED))?;
        let target = self.file(BASE);
        std::fs::rename(self.file(BASE_UNFINISHED), &target).map_err(failed("rename", &target))?;
        self.mark(&Marker::Working { upper: Some(self.upper.clone()) })
    }

    /// After the directory was filled.
    pub(super) fn complete(&self) -> Result<(), RootfsError> {
        let directory = File::open(&self.upper).map_err(failed("open", &self.upper))?;
        rustix::fs::syncfs(&directory).map_err(|error| failed("write back", &self.upper)(error.into()))?;
        self.mark(&Marker::Complete { stamp: self.stamp()? })
    }

    /// Notes that the directory is not to be believed, without which a half-emptied one would be taken for one
    /// that a client changed, and an old one for a new. Returns whether there is an export at all.
    pub(super) fn outdate(&self) -> Result<bool, RootfsError> {
        match self.marker()? {
            None | Some(Marker::Failed { .. }) => return Ok(false),
            Some(Marker::Working { .. }) => {}
            Some(Marker::Complete { .. }) => {
                let target = self.file(UNDONE);
                std::fs::rename(self.file(MARKER), &target).map_err(failed("rename", &target))?;
                let directory = File::open(&self.beside).map_err(failed("open", &self.beside))?;
                directory.sync_all().map_err(failed("write back", &self.beside))?;
            }
        }
        Ok(true)
    }

    /// Gives the directory its own content back, if it has another.
    pub(super) fn undo(&self, reason: Option<String>) -> Result<(), RootfsError> {
        if self.outdate()? {
            self.clear()?;
            copy(&self.file(BASE), &self.upper)?;
        }
        match reason {
            Some(reason) => self.mark(&Marker::Failed { reason })?,
            None => remove_file(&self.file(MARKER))?,
        }
        remove_file(&self.file(UNDONE))?;
        // Without the marker nobody looks at them.
        remove_tree(&self.file(BASE_UNFINISHED))?;
        remove_tree(&self.file(BASE))
    }

    pub(super) fn clear(&self) -> Result<(), RootfsError> {
        let directory = File::open(&self.upper).map_err(failed("open", &self.upper))?;
        apply::clear(&directory.into()).map_err(|error| failed("empty", &self.upper)(error.into()))
    }

    /// Makes all that is in the directory its own content, and the writable disk a new one.
    fn adopt(&self) -> Result<(), RootfsError> {
        writable::layers::remove(&self.beside)?;
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

/// Copies what is in a directory, and its own attributes, with all that overlayfs looks at. Mostly there is
/// nothing. Names and content may be a guest's: `cp` follows no link below `from` and takes no name for an option.
pub(super) fn copy(from: &Path, to: &Path) -> Result<(), RootfsError> {
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
