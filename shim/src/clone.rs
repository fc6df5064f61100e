//! Clones: tasks that are created from a snapshot in the store, or off a zygote, named by an annotation of the new container, and get an
//! identity of their own. A restored checkpoint is its source again; a clone is another.
//!
//! The snapshot is opened before anything is made, and may be removed from then on.

use std::collections::HashMap;
use std::path::Path;

use crate::checkpoint::Restored;
use crate::snapshot::manifest::Purpose;
use crate::snapshot::{ImportError, Store, StoreError};
use crate::zygote::{self, Address};

/// Names the snapshot: its id, the beginning of that, or the name of a template; or a zygote ([`Address`]).
pub const ANNOTATION: &str = "io.spore.clone-from";
/// Longest host name (hostname(7)).
const MAX_HOSTNAME: usize = 64;

#[derive(Debug, thiserror::Error)]
pub(crate) enum CloneError {
    #[error("annotation {ANNOTATION}: {0}")]
    Store(#[from] StoreError),
    #[error("annotation {ANNOTATION}: {0}")]
    Unfit(#[from] ImportError),
    #[error(
        "annotation {ANNOTATION}: the task shall also be created from a checkpoint, and it can be from one thing only; leave one of the two out"
    )]
    Both,
    #[error(
        "annotation {ANNOTATION}: snapshot {wanted:?} is of a container in namespace {found:?}, and this one is in {own:?}; take one here, or make a template of it, which is for all namespaces"
    )]
    Foreign { wanted: String, found: String, own: String },
    #[error("annotation {ANNOTATION}: {wanted:?} names no zygote; `spore clone` writes what does")]
    Malformed { wanted: String },
    #[error(
        "annotation {ANNOTATION}: {address}: the zygote is no more, or its container is not; clone that container again"
    )]
    NoZygote { address: String },
    #[error(
        "annotation {ANNOTATION}: {address}: no machine comes of it: {source}; clone its container again"
    )]
    Zygote { address: String, source: std::io::Error },
}

/// What a clone gets of its own beside what every restored guest gets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Identity {
    pub(crate) hostname: String,
}

impl Identity {
    /// Of the host name that the container's specification has, else of its id: never that of the source.
    pub(crate) fn new(hostname: &str, id: &str) -> Self {
        let hostname = if hostname.is_empty() { id } else { hostname };
        Self { hostname: hostname[..hostname.floor_char_boundary(MAX_HOSTNAME)].to_owned() }
    }
}

/// What the annotations name, if they do.
pub(crate) fn source<'a>(
    annotations: &'a HashMap<String, String>,
    checkpoint: &str,
) -> Result<Option<&'a str>, CloneError> {
    match annotations.get(ANNOTATION) {
        Some(_) if !checkpoint.is_empty() => Err(CloneError::Both),
        found => Ok(found.map(String::as_str)),
    }
}

/// The machine that a container of this namespace is going to be. Reads files, and may wait for another shim.
pub(crate) fn open(
    (store, run_dir): (&Store, &Path),
    namespace: &str,
    wanted: &str,
    identity: Identity,
) -> Result<Restored, CloneError> {
    if Address::is_one(wanted) {
        let malformed = |()| CloneError::Malformed { wanted: wanted.to_owned() };
        let address = wanted.parse().map_err(malformed)?;
        return zygote::connect(run_dir, namespace, &address, identity);
    }
    let opened = store.open(store.find(wanted)?)?;
    let manifest = &opened.manifest;
    if manifest.purpose != Purpose::Template && manifest.namespace != namespace {
        let (found, own) = (manifest.namespace.clone(), namespace.to_owned());
        return Err(CloneError::Foreign { wanted: wanted.to_owned(), found, own });
    }
    Ok(Restored { identity: Some(identity), ..Restored::new(&opened)? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clone_is_called_what_its_specification_says_or_by_its_id() {
        let name = |hostname: &str, id: &str| Identity::new(hostname, id).hostname;
        assert_eq!((name("db", "web-1"), name("", "web-1")), ("db".into(), "web-1".into()));
        assert_eq!(name("", &"x".repeat(76)).len(), MAX_HOSTNAME);
    }

    #[test]
    fn a_task_is_created_from_one_thing_only() {
        let annotations = HashMap::from([(ANNOTATION.to_owned(), "warm".to_owned())]);
        assert_eq!(source(&annotations, "").unwrap(), Some("warm"));
        assert_eq!(source(&HashMap::new(), "/checkpoint").unwrap(), None);
        assert!(matches!(source(&annotations, "/checkpoint"), Err(CloneError::Both)));
    }
}
