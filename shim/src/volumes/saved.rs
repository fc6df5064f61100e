//! Volumes of a checkpoint: which mount of the container that is made of it stands for which.
//!
//! The guest has its mounts already, so each needs its source again, and there can be no other. What says which is which
//! is the destination; sources, and whether they may be written, are the new container's.

use std::fs::File;

use super::{Volume, VolumeError};
use crate::snapshot::manifest::Export;

/// What a checkpoint has of volumes.
#[derive(Debug)]
pub(crate) struct SavedVolumes {
    /// By number.
    pub(crate) exports: Vec<Export>,
    /// The server's tables.
    pub(crate) tables: File,
}

/// The volumes in the order of the saved ones. Of several with one destination, which hide one another, the first stands for the
/// first.
pub(crate) fn matched(saved: &[Export], given: &[Volume]) -> Result<Vec<Volume>, VolumeError> {
    let mut left: Vec<&Volume> = given.iter().collect();
    let mut ordered = Vec::with_capacity(saved.len());
    for Export { destination, .. } in saved {
        let found = left.iter().position(|volume| volume.destination() == *destination);
        let found = found.ok_or_else(|| VolumeError::Missing { destination: destination.clone() })?;
        ordered.push(left.remove(found).clone());
    }
    match left.first() {
        Some(volume) => Err(VolumeError::Surplus { destination: volume.destination() }),
        None => Ok(ordered),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::snapshot::manifest::ExportKind;

    fn volume(source: &str, destination: &str) -> Volume {
        Volume::new(source.into(), destination.as_ref(), &["rbind".to_owned()])
    }

    fn export(destination: &str) -> Export {
        Export { destination: destination.into(), kind: ExportKind::Directory }
    }

    #[test]
    fn volumes_are_matched_by_destination_and_none_may_lack_or_be_more() {
        let saved = [export("/a"), export("/b"), export("/a")];
        let given = [volume("/1", "/b"), volume("/2", "/a"), volume("/3", "/a")];
        let ordered = matched(&saved, &given).unwrap();
        let sources: Vec<_> = ordered.iter().map(|volume| volume.source.to_str().unwrap()).collect();
        assert_eq!(sources, ["/2", "/1", "/3"]);
        let refused = |saved: &[Export], given: &[Volume]| matched(saved, given).unwrap_err().to_string();
        let missing = refused(&saved, &given[..2]);
        assert!(missing.contains("on /a") && missing.contains("has none"), "{missing}");
        let surplus = refused(&saved[..1], &given[..2]);
        assert!(surplus.contains("on /b") && surplus.contains("taken without"), "{surplus}");
        assert!(matched(&[], &[]).unwrap().is_empty());
    }
}
