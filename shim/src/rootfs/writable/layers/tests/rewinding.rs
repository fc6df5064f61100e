use slog::{Logger, o};

use super::*;

fn log() -> Logger {
    Logger::root(slog::Discard, o!())
}

/// What the disk has been captured with, as a snapshot's own files: by further names for them.
fn snapshot(place: &Place, layers: &Layers, to: &Path) -> Vec<File> {
    let files = layers.names.iter().map(|name| {
        let path = to.join(format!("{}-{name}", layers.names.len()));
        std::fs::hard_link(place.path(name), &path).unwrap();
        File::open(path).unwrap()
    });
    files.collect()
}

/// Puts a layer on top, after something was written to the one that is.
fn grow(disk: &mut WritableDisk, text: &str) {
    if disk.layers.names.len() > 1 {
        disk.top.write_all(text.as_bytes()).unwrap();
    }
    let staged = disk.layers.stage().unwrap();
    disk.layers.add(&staged).unwrap();
    disk.top = staged.file;
}

fn go_back(disk: &mut WritableDisk, files: &[File]) {
    let (next, mut rewind) = disk.layers.rewind(files).unwrap();
    rewind.commit(&log()).unwrap();
    *disk = next;
    rewind.finish();
}

#[test]
fn a_disk_goes_back_and_forth_while_it_is_in_use() {
    let (place, store) = (Place::new(), tempfile::tempdir().unwrap());
    let mut disk = place.open().unwrap();
    let first = snapshot(&place, &disk.layers, store.path());
    grow(&mut disk, "");
    grow(&mut disk, "one");
    let own = |disk: &WritableDisk| disk.layers.names[..disk.layers.names.len() - 1].to_vec();
    let second = {
        let mut captured = disk.layers.clone();
        captured.names.pop();
        snapshot(&place, &captured, store.path())
    };
    let names = own(&disk);
    grow(&mut disk, "two");

    // Its own layers, with no new names.
    go_back(&mut disk, &second);
    assert_eq!((own(&disk), place.count()), (names.clone(), 4));
    assert!(matches!(place.open(), Err(RootfsError::InUse { .. })), "the new top is locked");
    go_back(&mut disk, &first);
    assert_eq!((disk.layers.names.len(), place.count()), (2, 3));
    // The layer is the snapshot's alone now.
    go_back(&mut disk, &second);
    assert_eq!(disk.layers.names.len(), 3);
    assert_ne!(own(&disk), names);
    assert_eq!(std::fs::read(place.path(&disk.layers.names[1])).unwrap(), b"one");
    drop(disk);
    assert_eq!(place.open().unwrap().below.len(), 2);
}

#[test]
fn what_comes_to_nothing_leaves_the_disk_as_it_was() {
    let (place, store) = (Place::new(), tempfile::tempdir().unwrap());
    let mut disk = place.open().unwrap();
    let first = snapshot(&place, &disk.layers, store.path());
    let never = disk.layers.rewind(&first).unwrap_err().to_string();
    assert!(never.contains("never captured"), "{never}");
    grow(&mut disk, "");
    let (names, count) = (disk.layers.names.clone(), place.count());
    for commits in [false, true] {
        let (next, mut rewind) = disk.layers.rewind(&first).unwrap();
        if commits {
            rewind.commit(&log()).unwrap();
            rewind.undo(&log());
        }
        drop((next, rewind));
        let found = Layers::find(place.0.path()).unwrap().unwrap().names;
        assert_eq!((found, place.count()), (names.clone(), count), "committed: {commits}");
    }
    let other = Place::new();
    std::fs::write(other.path(DISK), vec![2; 4096]).unwrap();
    let message = disk.layers.rewind(&[File::open(other.path(DISK)).unwrap()]).unwrap_err().to_string();
    assert!(message.contains("of another disk"), "{message}");
    assert!(disk.layers.rewind(&[]).is_err());
    assert_eq!(place.count(), count);
}
