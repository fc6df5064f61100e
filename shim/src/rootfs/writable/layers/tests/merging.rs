//! Fewer layers of many, and whoever is killed meanwhile. What a VMM does is done here by hand: each layer is one byte.

use super::super::merge::Merge;
use super::*;

/// A disk of layers that say who they are, opened, and what a VMM has of it.
struct Scene {
    place: Place,
    disk: WritableDisk,
    /// Tops, whose lock the VMM has.
    staged: Vec<StagedLayer>,
}

impl Scene {
    fn of(layers: u8) -> Self {
        let place = Place::new();
        let mut disk = place.open().unwrap();
        let mut staged = Vec::new();
        for layer in 1..layers {
            let next = disk.layers.stage().unwrap();
            (&next.file).write_all(&[layer]).unwrap();
            disk.layers.add(&next).unwrap();
            staged.push(next);
        }
        Self { place, disk, staged }
    }

    /// Merged and durable, as a VMM says.
    fn begun(&self) -> Merge {
        let merge = self.disk.layers.begin_merge().unwrap().unwrap();
        (&merge.staged.file).write_all(b"m").unwrap();
        merge
    }

    /// After `kill -9` of everything: the content, and how many files there are.
    fn reopened(self) -> (Vec<u8>, usize) {
        let Self { place, disk, staged } = self;
        drop((disk, staged));
        let disk = place.open().unwrap();
        let files = disk.layers.files().unwrap();
        let first = |mut file: File| {
            let mut byte = [0];
            std::io::Read::read_exact(&mut file, &mut byte).unwrap();
            byte[0]
        };
        (files.into_iter().map(first).skip(1).collect(), place.count())
    }
}

#[test]
fn all_but_the_lowest_and_the_top_become_one_and_their_files_go() {
    let mut scene = Scene::of(5);
    let merge = scene.begun();
    assert_eq!(merge.numbers, 1..=3);
    scene.disk.layers.merged(&merge).unwrap();
    assert_eq!(scene.place.count(), 7, "the old ones are still there");
    scene.disk.layers.tidy();
    assert_eq!(scene.place.count(), 4, "the raw file, the merged one, the top, the list");
    drop(merge);
    assert_eq!(scene.reopened(), (b"m\x04".to_vec(), 4));
}

#[test]
fn what_is_captured_meanwhile_stays_on_top_and_more_can_be_merged() {
    let mut scene = Scene::of(4);
    let merge = scene.begun();
    let next = scene.disk.layers.stage().unwrap();
    (&next.file).write_all(b"n").unwrap();
    scene.disk.layers.add(&next).unwrap();
    scene.disk.layers.merged(&merge).unwrap();
    drop(merge);
    let again = scene.disk.layers.begin_merge().unwrap().unwrap();
    assert_eq!(again.numbers, 1..=2);
    scene.disk.layers.not_merged(&again, true).unwrap();
    drop((again, next));
    assert_eq!(scene.reopened(), (b"m\x03n".to_vec(), 5));
}

#[test]
fn who_is_killed_while_layers_are_merged_leaves_the_disk_as_it_was() {
    let scene = Scene::of(5);
    drop(scene.begun());
    assert_eq!(scene.place.count(), 7, "with what nobody names");
    assert_eq!(scene.reopened(), (b"\x01\x02\x03\x04".to_vec(), 6));
}

#[test]
fn who_is_killed_before_the_old_files_are_removed_leaves_the_merged_disk() {
    let mut scene = Scene::of(5);
    let merge = scene.begun();
    scene.disk.layers.merged(&merge).unwrap();
    drop(merge);
    assert_eq!(scene.reopened(), (b"m\x04".to_vec(), 4));
}

#[test]
fn a_merge_that_fails_leaves_the_disk_as_it_was_and_one_that_may_have_come_about_is_the_last() {
    let mut scene = Scene::of(5);
    for in_step in [true, false] {
        let merge = scene.begun();
        scene.disk.layers.not_merged(&merge, in_step).unwrap();
        assert_eq!(scene.place.count(), 6);
    }
    assert!(scene.disk.layers.begin_merge().unwrap().is_none(), "numbers may mean other layers to the VMM");
    // A list that cannot be written: nothing was given up.
    let mut scene = Scene::of(5);
    let merge = scene.begun();
    std::fs::remove_file(scene.place.path(LIST)).unwrap();
    std::fs::create_dir(scene.place.path(LIST)).unwrap();
    scene.disk.layers.merged(&merge).unwrap_err();
    scene.disk.layers.tidy();
    assert_eq!(scene.place.count(), 7, "not what it may name");
    assert!(scene.disk.layers.begin_merge().unwrap().is_none());
    drop(merge);
    std::fs::remove_dir(scene.place.path(LIST)).unwrap();
    scene.disk.layers.write(scene.disk.layers.names.clone()).unwrap();
    assert_eq!(scene.reopened(), (b"\x01\x02\x03\x04".to_vec(), 6));
}

#[test]
fn snapshots_keep_what_is_merged() {
    let mut scene = Scene::of(5);
    let store = tempfile::tempdir_in(scene.place.0.path().parent().unwrap()).unwrap();
    let kept = store.path().join("layer.disk");
    share(&scene.disk.layers.files().unwrap()[2], &kept).unwrap();
    let merge = scene.begun();
    scene.disk.layers.merged(&merge).unwrap();
    scene.disk.layers.tidy();
    assert_eq!(std::fs::read(kept).unwrap(), [2]);
}

#[test]
fn a_disk_is_not_opened_by_another_until_its_merge_is_over() {
    let scene = Scene::of(5);
    let merge = scene.begun();
    // Its VM has ended, its shim has not.
    let dir = scene.place.0.path().to_owned();
    assert!(crate::rootfs::lock::try_directory(&dir).is_none());
    assert!(scene.disk.layers.begin_merge().unwrap().is_none());
    drop(merge);
    assert!(crate::rootfs::lock::try_directory(&dir).is_some());
}

#[test]
fn a_merge_pays_from_a_number_of_layers_on() {
    let mut seen = Vec::new();
    for layers in [1, 2, 16, 17] {
        let scene = Scene::of(layers);
        seen.push((layers, scene.disk.layers.are_many(), scene.disk.layers.are_too_many()));
    }
    assert_eq!(seen, [(1, false, false), (2, false, false), (16, false, false), (17, true, false)]);
    assert!(Scene::of(2).disk.layers.begin_merge().unwrap().is_none(), "the lowest and the top stay");
    assert!(Scene::of(u8::try_from(MAX).unwrap()).disk.layers.are_too_many());
}
