//! The root directory that a writable layer in the state directory belongs to. A layer is
//! user data: only what is certain to be gone loses it. Device numbers are therefore no part
//! of the identity (those of btrfs, overlay and NFS are made up at each mount, those of
//! device-mapper and NVMe disks at each boot), and a directory whose disk may just not be
//! mounted is not gone.

use std::fs::Metadata;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::{images::hex, mountinfo};

/// What a directory is recognised by, beside its path.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct Identity {
    inode: u64,
    /// Birth time where the file system knows it: inode numbers are used again.
    born_ns: Option<u128>,
}

/// A root directory, as it was when its layer was made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Owner {
    path: PathBuf,
    directory: Identity,
    parent: Identity,
    /// The path is a mount's root: without the mount it is missing or another directory.
    mount_point: bool,
}

impl Identity {
    fn of(path: &Path) -> io::Result<Self> {
        let metadata = std::fs::metadata(path)?;
        if !metadata.is_dir() {
            return Err(io::Error::from_raw_os_error(libc::ENOTDIR));
        }
        Ok(Self { inode: metadata.ino(), born_ns: born(&metadata) })
    }

    /// A birth time that only one of the two knows tells nothing.
    fn may_be(&self, other: &Self) -> bool {
        let born = self.born_ns.zip(other.born_ns);
        self.inode == other.inode && born.is_none_or(|(ours, theirs)| ours == theirs)
    }
}

fn born(metadata: &Metadata) -> Option<u128> {
    let time = metadata.created().ok()?;
    Some(time.duration_since(std::time::UNIX_EPOCH).ok()?.as_nanos())
}

impl Owner {
    pub(super) fn of(path: &Path) -> io::Result<Self> {
        let path = std::fs::canonicalize(path)?;
        let parent = Identity::of(path.parent().unwrap_or(&path))?;
        Ok(Self { directory: Identity::of(&path)?, parent, mount_point: is_mount_point(&path)?, path })
    }

    /// The name of the layer's directory.
    pub(super) fn key(&self) -> String {
        let mut hash = Sha256::new();
        hash.update(self.path.as_os_str().as_encoded_bytes());
        hash.update([0]);
        hash.update(self.directory.inode.to_le_bytes());
        hash.update(self.directory.born_ns.unwrap_or(0).to_le_bytes());
        hex(&hash.finalize()[..16])
    }

    /// Whether the directory was removed or replaced, for certain: its parent stands where
    /// it stood, and no mount is involved that may be absent, or cover it.
    pub(super) fn is_gone(&self) -> bool {
        let parent = self.path.parent().and_then(|parent| Identity::of(parent).ok());
        if self.mount_point || !parent.is_some_and(|parent| parent.may_be(&self.parent)) {
            return false;
        }
        match std::fs::metadata(&self.path) {
            Err(error) => error.kind() == io::ErrorKind::NotFound,
            Ok(_) if is_mount_point(&self.path).unwrap_or(true) => false,
            Ok(_) => Identity::of(&self.path).is_ok_and(|now| !now.may_be(&self.directory)),
        }
    }
}

fn is_mount_point(path: &Path) -> io::Result<bool> {
    // The thread's: it may have left the process's mount namespace.
    let text = std::fs::read_to_string("/proc/thread-self/mountinfo")?;
    Ok(mountinfo::find(&mountinfo::parse(&text), path).is_some())
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Place(tempfile::TempDir);

    impl Place {
        fn new() -> (Self, Owner) {
            let place = Self(tempfile::tempdir().unwrap());
            std::fs::create_dir_all(place.root()).unwrap();
            let owner = Owner::of(&place.root()).unwrap();
            assert!(!owner.is_gone());
            (place, owner)
        }

        fn parent(&self) -> PathBuf {
            self.0.path().join("disk")
        }

        fn root(&self) -> PathBuf {
            self.parent().join("root")
        }
    }

    #[test]
    fn a_removed_and_a_replaced_directory_are_gone() {
        let (place, owner) = Place::new();
        std::fs::remove_dir(place.root()).unwrap();
        assert!(owner.is_gone());
        std::fs::create_dir(place.0.path().join("new")).unwrap();
        std::fs::rename(place.0.path().join("new"), place.root()).unwrap();
        assert!(owner.is_gone());
        assert_ne!(Owner::of(&place.root()).unwrap().key(), owner.key());
    }

    #[test]
    fn what_a_reboot_changes_is_no_part_of_the_identity() {
        let (_place, owner) = Place::new();
        let text = serde_json::to_string(&owner).unwrap();
        assert!(!text.contains("dev"), "{text}");
        // Another kernel may tell birth times, or no longer.
        for (directory, parent) in [(None, None), (owner.directory.born_ns, None)] {
            let mut other = owner.clone();
            (other.directory.born_ns, other.parent.born_ns) = (directory, parent);
            assert!(!other.is_gone());
        }
    }

    #[test]
    fn a_directory_whose_disk_may_not_be_mounted_is_not_gone() {
        let (place, owner) = Place::new();
        let aside = place.0.path().join("unmounted");
        std::fs::rename(place.parent(), &aside).unwrap();
        assert!(!owner.is_gone(), "the parent is absent");
        std::fs::create_dir(place.parent()).unwrap();
        assert!(!owner.is_gone(), "the parent is a bare mount point");
        std::fs::create_dir(place.root()).unwrap();
        assert!(!owner.is_gone(), "another disk is mounted there");
        std::fs::remove_dir_all(place.parent()).unwrap();
        std::fs::rename(aside, place.parent()).unwrap();
        std::fs::remove_dir(place.root()).unwrap();
        assert!(owner.is_gone());
        assert!(!Owner { mount_point: true, ..owner }.is_gone(), "it was a mount's root itself");
    }

    #[test]
    fn mount_points_are_recognised() {
        assert!(is_mount_point(Path::new("/proc")).unwrap());
        assert!(Owner::of(Path::new("/proc")).unwrap().mount_point);
        let (_place, owner) = Place::new();
        assert!(!owner.mount_point);
    }

    #[test]
    fn one_directory_has_one_layer_whatever_it_is_called() {
        let (place, owner) = Place::new();
        let link = place.0.path().join("link");
        std::os::unix::fs::symlink(place.root(), &link).unwrap();
        assert_eq!(Owner::of(&link).unwrap(), owner);
        assert!(Owner::of(Path::new("/proc/version")).is_err());
    }
}
