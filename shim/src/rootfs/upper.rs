//! What the host's upper directory holds becomes a read-only image of its own, with its
//! whiteouts and opaque marks. The directory may change between two tasks (`docker cp` into a
//! stopped container, an edit): a digest of its metadata beside the image tells.

use std::fs::{File, Metadata};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use super::images::{self, hex};
use super::{RootfsError, blocking};

/// Opens the image of the upper directory, made anew when the directory changed. `None`
/// when there is nothing in it.
pub(super) async fn image(
    state_dir: &Path,
    directory: &Path,
    beside: &Path,
) -> Result<Option<File>, RootfsError> {
    refreshed(directory, beside, async |target: &Path, replace| {
        images::tree(state_dir, directory, target, replace).await
    })
    .await
}

async fn refreshed(
    directory: &Path,
    beside: &Path,
    open: impl AsyncFnOnce(&Path, bool) -> Result<File, RootfsError>,
) -> Result<Option<File>, RootfsError> {
    let (target, note) = (beside.join("upper.erofs"), beside.join("upper.stamp"));
    let walked = directory.to_path_buf();
    let stamp = blocking(move || {
        let host =
            |(path, source)| RootfsError::Host { operation: "look at the upper directory's", path, source };
        stamp(&walked).map_err(host)
    });
    let Some(stamp) = stamp.await? else {
        remove(&note)?;
        remove(&target)?;
        return Ok(None);
    };
    if std::fs::read_to_string(&note).is_ok_and(|known| known == stamp) {
        return open(&target, false).await.map(Some);
    }
    // Before the image, which is made durable together with this.
    remove(&note)?;
    let image = open(&target, true).await?;
    // Of the time before the image was made. Without it the image is made again.
    let _ = std::fs::write(&note, stamp);
    Ok(Some(image))
}

fn remove(path: &Path) -> Result<(), RootfsError> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(RootfsError::Host { operation: "remove", path: path.into(), source: error })
        }
        _ => Ok(()),
    }
}

/// A digest of everything below `root` but the data: no change of data leaves the change
/// time as it was. `None` for an empty directory. Fails with the path concerned.
fn stamp(root: &Path) -> Result<Option<String>, (PathBuf, io::Error)> {
    let Some(mut hash) = below(root, add)? else { return Ok(None) };
    let metadata = std::fs::symlink_metadata(root).map_err(|error| (root.into(), error))?;
    add(&mut hash, &metadata);
    Ok(Some(hex(&hash.finalize())))
}

/// The same without what overlayfs changes of directories when one is mounted with them, or only looked through:
/// their times, and attributes of its own. What is put into one or taken away shows by itself.
pub(super) fn content(root: &Path) -> Result<Option<String>, (PathBuf, io::Error)> {
    Ok(below(root, add_lasting)?.map(|hash| hex(&hash.finalize())))
}

fn below(root: &Path, add: fn(&mut Sha256, &Metadata)) -> Result<Option<Sha256>, (PathBuf, io::Error)> {
    let mut hash = Sha256::new();
    let mut directories = vec![root.to_path_buf()];
    let mut count = 0_u64;
    while let Some(directory) = directories.pop() {
        let failed = |error| (directory.clone(), error);
        for (name, metadata) in entries(&directory).map_err(failed)? {
            let path = directory.join(name);
            let bytes = path.as_os_str().as_encoded_bytes();
            hash.update((bytes.len() as u64).to_le_bytes());
            hash.update(bytes);
            add(&mut hash, &metadata);
            count += 1;
            if metadata.is_dir() {
                directories.push(path);
            }
        }
    }
    Ok((count > 0).then_some(hash))
}

/// The directory's entries in a fixed order. What vanishes meanwhile is not there.
fn entries(directory: &Path) -> io::Result<Vec<(std::ffi::OsString, Metadata)>> {
    let mut entries = Vec::new();
    for entry in std::fs::read_dir(directory)? {
        let entry = entry?;
        match entry.metadata() {
            Ok(metadata) => entries.push((entry.file_name(), metadata)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    entries.sort_by(|a, b| a.0.cmp(&b.0));
    Ok(entries)
}

fn add(hash: &mut Sha256, metadata: &Metadata) {
    // No device: its number may change at each boot.
    for number in [metadata.ino(), metadata.size(), metadata.rdev(), metadata.nlink()] {
        hash.update(number.to_le_bytes());
    }
    for number in [metadata.mode(), metadata.uid(), metadata.gid()] {
        hash.update(number.to_le_bytes());
    }
    for number in [metadata.ctime(), metadata.ctime_nsec(), metadata.mtime(), metadata.mtime_nsec()] {
        hash.update(number.to_le_bytes());
    }
}

fn add_lasting(hash: &mut Sha256, metadata: &Metadata) {
    if !metadata.is_dir() {
        return add(hash, metadata);
    }
    hash.update(metadata.ino().to_le_bytes());
    for number in [metadata.mode(), metadata.uid(), metadata.gid()] {
        hash.update(number.to_le_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whether the image was made anew, `None` when there is none.
    async fn refresh(root: &Path) -> Option<bool> {
        let mut made = None;
        let open = async |target: &Path, replace: bool| {
            made = Some(replace);
            std::fs::write(target, b"image").unwrap();
            Ok(File::open(target).unwrap())
        };
        let image = refreshed(&root.join("fs"), &root.join("spore"), open).await.unwrap();
        assert_eq!(image.is_some(), made.is_some());
        made
    }

    #[tokio::test]
    async fn what_is_put_there_between_two_tasks_makes_a_new_image() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["fs", "spore"] {
            std::fs::create_dir(dir.path().join(name)).unwrap();
        }
        let file = dir.path().join("fs/copied");
        assert_eq!(refresh(dir.path()).await, None, "nothing there, no image");
        std::fs::write(&file, b"1").unwrap();
        assert_eq!(refresh(dir.path()).await, Some(true));
        assert_eq!(refresh(dir.path()).await, Some(false), "nothing changed");
        std::fs::write(&file, b"edited").unwrap();
        assert_eq!(refresh(dir.path()).await, Some(true));
        // A shim that is killed here has removed the stamp and not yet written the new one.
        std::fs::remove_file(dir.path().join("spore/upper.stamp")).unwrap();
        assert_eq!(refresh(dir.path()).await, Some(true));
        std::fs::remove_file(&file).unwrap();
        assert_eq!(refresh(dir.path()).await, None);
        assert_eq!(std::fs::read_dir(dir.path().join("spore")).unwrap().count(), 0, "no stale image");
    }

    #[test]
    fn any_change_changes_the_stamp_and_none_does_not() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(stamp(dir.path()).unwrap(), None, "empty");
        let deep = dir.path().join("a/b");
        std::fs::create_dir_all(&deep).unwrap();
        let mut seen = vec![stamp(dir.path()).unwrap().unwrap()];
        assert_eq!(stamp(dir.path()).unwrap().as_ref(), seen.last());
        let steps: [&dyn Fn() -> io::Result<()>; 7] = [
            &|| std::fs::write(deep.join("x"), b"1"),
            &|| std::fs::write(deep.join("x"), b"22"),
            &|| std::fs::rename(deep.join("x"), deep.join("y")),
            &|| std::os::unix::fs::symlink("/nowhere", deep.join("z")),
            &|| std::os::unix::fs::lchown(deep.join("z"), Some(7), None),
            &|| std::fs::hard_link(deep.join("y"), dir.path().join("link")),
            &|| std::fs::remove_file(deep.join("z")),
        ];
        for (number, step) in steps.iter().enumerate() {
            step().unwrap();
            let now = stamp(dir.path()).unwrap().unwrap();
            assert!(!seen.contains(&now), "step {number}");
            assert_eq!(stamp(dir.path()).unwrap().as_ref(), Some(&now));
            seen.push(now);
        }
        let (path, error) = stamp(&dir.path().join("missing")).unwrap_err();
        assert!(path.ends_with("missing") && error.kind() == io::ErrorKind::NotFound);
    }
}
