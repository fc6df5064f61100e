mod merging;
mod rewinding;

use super::*;

struct Place(tempfile::TempDir);

impl Place {
    fn new() -> Self {
        let place = Self(tempfile::tempdir().unwrap());
        std::fs::write(place.path(DISK), vec![1; 4096]).unwrap();
        place
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn open(&self) -> Result<WritableDisk, RootfsError> {
        Layers::find(self.0.path())?.ok_or(RootfsError::InUse { path: "nothing".into() })?.open()
    }

    fn count(&self) -> usize {
        std::fs::read_dir(self.0.path()).unwrap().count()
    }
}

#[test]
fn a_disk_grows_by_layers_and_its_lock_goes_along() {
    let place = Place::new();
    let mut disk = place.open().unwrap();
    assert!(disk.below.is_empty());
    let first = disk.layers.stage().unwrap();
    disk.layers.add(&first).unwrap();
    let second = disk.layers.stage().unwrap();
    disk.layers.add(&second).unwrap();
    drop((disk, first));
    assert!(matches!(place.open(), Err(RootfsError::InUse { .. })), "the VMM has the new top");
    drop(second);
    let disk = place.open().unwrap();
    assert_eq!((disk.below.len(), disk.size().unwrap()), (2, 4096));
}

#[test]
fn who_is_killed_before_the_list_is_written_leaves_the_disk_as_it_was() {
    let place = Place::new();
    let disk = place.open().unwrap();
    drop(disk.layers.stage().unwrap());
    drop(disk);
    assert_eq!(place.count(), 2);
    assert!(place.open().unwrap().below.is_empty());
    assert_eq!(place.count(), 1, "what was staged is removed");
}

#[test]
fn a_layer_that_is_taken_back_was_never_there() {
    let place = Place::new();
    let mut disk = place.open().unwrap();
    for listed in [true, false] {
        let staged = disk.layers.stage().unwrap();
        if listed {
            disk.layers.add(&staged).unwrap();
        }
        disk.layers.take_back(staged).unwrap();
    }
    drop(disk);
    assert!(place.open().unwrap().below.is_empty());
    assert_eq!(place.count(), 2, "the raw file and a list of it");
}

#[test]
fn a_file_that_a_snapshot_has_too_is_not_written_whatever_was_lost() {
    let place = Place::new();
    let mut disk = place.open().unwrap();
    let staged = disk.layers.stage().unwrap();
    disk.layers.add(&staged).unwrap();
    drop((disk, staged));
    std::fs::hard_link(place.path(DISK), place.path("snapshot")).unwrap();
    assert_eq!(place.open().unwrap().below.len(), 1);
    std::fs::remove_file(place.path(LIST)).unwrap();
    let message = place.open().unwrap_err().to_string();
    assert!(message.contains("belongs to a snapshot"), "{message}");
}

#[test]
fn a_list_that_cannot_be_one_is_refused() {
    let place = Place::new();
    let layer = format!("layer-{}.delta", "0".repeat(32));
    for list in [
        String::new(),
        r#"{"version":2,"layers":["writable.ext4"]}"#.into(),
        r#"{"version":1,"layers":[]}"#.into(),
        r#"{"version":1,"layers":["../writable.ext4"]}"#.into(),
        format!(r#"{{"version":1,"layers":["{layer}"]}}"#),
        format!(r#"{{"version":1,"layers":["writable.ext4","{layer}","{layer}"]}}"#),
        r#"{"version":1,"layers":["writable.ext4","/etc/passwd"]}"#.into(),
        r#"{"version":1,"layers":["writable.ext4"],"more":1}"#.into(),
    ] {
        std::fs::write(place.path(LIST), &list).unwrap();
        let error = place.open().unwrap_err();
        assert!(matches!(error, RootfsError::BadLayer { .. }), "{list}: {error}");
    }
    std::fs::write(place.path(LIST), format!(r#"{{"version":1,"layers":["writable.ext4","{layer}"]}}"#))
        .unwrap();
    let message = place.open().unwrap_err().to_string();
    assert!(message.contains(&layer), "it is missing: {message}");
}

#[test]
fn a_disk_has_a_largest_number_of_layers() {
    let place = Place::new();
    let mut disk = place.open().unwrap();
    for _ in 1..MAX {
        let staged = disk.layers.stage().unwrap();
        disk.layers.add(&staged).unwrap();
    }
    let message = disk.layers.stage().unwrap_err().to_string();
    assert!(message.contains("60 layers already"), "{message}");
}

#[test]
fn a_removed_disk_leaves_nothing() {
    let place = Place::new();
    let mut disk = place.open().unwrap();
    let staged = disk.layers.stage().unwrap();
    disk.layers.add(&staged).unwrap();
    remove(place.0.path()).unwrap();
    assert_eq!(place.count(), 0);
    assert!(Layers::find(place.0.path()).unwrap().is_none());
}

/// The files of a disk of three layers, as a snapshot has them.
fn captured(place: &Place) -> Vec<File> {
    ["raw", "1", "2"]
        .map(|name| {
            std::fs::write(place.path(name), name).unwrap();
            File::open(place.path(name)).unwrap()
        })
        .into()
}

#[test]
fn a_snapshot_s_layers_become_a_disk_with_a_top_of_its_own() {
    let (from, to) = (Place::new(), tempfile::tempdir().unwrap());
    let files = captured(&from);
    let layers = Layers::adopt(to.path(), &files).unwrap();
    let disk = layers.open().unwrap();
    assert_eq!((disk.below.len(), disk.top.metadata().unwrap().len()), (3, 0));
    for (below, file) in disk.below.iter().zip(&files) {
        assert_eq!(below.metadata().unwrap().ino(), file.metadata().unwrap().ino(), "shared, not copied");
    }
    assert!(matches!(Layers::find(to.path()).unwrap().unwrap().open(), Err(RootfsError::InUse { .. })));
    drop(disk);
    assert_eq!(Layers::find(to.path()).unwrap().unwrap().open().unwrap().below.len(), 3, "found again");
    assert!(Layers::adopt(to.path(), &[]).is_err());
}

#[test]
fn a_disk_without_its_lowest_file_is_none_and_is_made_anew() {
    let (from, to) = (Place::new(), tempfile::tempdir().unwrap());
    let files = captured(&from);
    Layers::adopt(to.path(), &files).unwrap();
    // As whoever is killed before the last step leaves it.
    std::fs::remove_file(to.path().join(DISK)).unwrap();
    assert!(Layers::find(to.path()).unwrap().is_none());
    let disk = Layers::adopt(to.path(), &files[..2]).unwrap().open().unwrap();
    assert_eq!(disk.below.len(), 2);
    assert_eq!(
        std::fs::read_dir(to.path()).unwrap().count(),
        5,
        "raw, one delta, the top, the list, what says that no task has it"
    );
}

/// Names in a directory, without the list.
fn layers_in(dir: &Path) -> usize {
    std::fs::read_dir(dir).unwrap().filter(|entry| entry.as_ref().unwrap().file_name() != LIST).count()
}

#[test]
fn a_disk_is_put_back_to_a_snapshot_of_it_when_that_is_committed() {
    let (from, to) = (Place::new(), tempfile::tempdir().unwrap());
    let files = captured(&from);
    let there = || Layers::find(to.path()).unwrap().unwrap();
    let mut disk = Layers::adopt(to.path(), &files).unwrap().open().unwrap();
    disk.layers.keep().unwrap();
    // Two more snapshots.
    for _ in 0..2 {
        let staged = disk.layers.stage().unwrap();
        disk.layers.add(&staged).unwrap();
        disk.top = staged.file;
        disk.top.write_all(b"since then").unwrap();
    }
    assert!(matches!(there().put_back(&files), Err(RootfsError::InUse { .. })));
    drop(disk);

    // By copies of the files too.
    let copies = captured(&Place::new());
    for files in [&files, &copies] {
        let (disk, put_back) = there().put_back(files).unwrap().unwrap();
        assert_eq!((disk.below.len(), disk.top.metadata().unwrap().len()), (3, 0));
        assert!(matches!(there().open(), Err(RootfsError::InUse { .. })), "nobody else's meanwhile");
        drop((disk, put_back));
        assert_eq!(
            (there().open().unwrap().below.len(), layers_in(to.path())),
            (5, 6),
            "as if nothing had been"
        );
    }
    let (disk, put_back) = there().put_back(&files).unwrap().unwrap();
    put_back.commit().unwrap();
    assert!(matches!(there().open(), Err(RootfsError::InUse { .. })), "it is the task's");
    drop(disk);
    assert_eq!((there().open().unwrap().below.len(), layers_in(to.path())), (3, 4));
}

#[test]
fn a_disk_is_not_put_back_to_a_snapshot_of_another() {
    let (from, to) = (Place::new(), tempfile::tempdir().unwrap());
    let mut files = captured(&from);
    Layers::adopt(to.path(), &files).unwrap().keep().unwrap();
    let refused =
        |files: &[File]| Layers::find(to.path()).unwrap().unwrap().put_back(files).unwrap().is_none();
    std::fs::write(from.path("other"), "x").unwrap();
    let other = File::open(from.path("other")).unwrap();
    assert!(refused(&[]) && refused(&[other.try_clone().unwrap()]));
    files[2] = other.try_clone().unwrap();
    assert!(refused(&files));
    files.push(other);
    assert!(refused(&files), "of all layers and more");
    assert_eq!(layers_in(to.path()), 4, "and nothing is left");
}
