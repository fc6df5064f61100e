//! Quota, age and admission.

use std::time::{Duration, SystemTime};

use super::*;

/// With data of its own, of so many MiB.
fn make_sized(place: &Place, name: &str, mib: usize, purpose: Purpose) -> SnapshotId {
    let mut draft = place.store.begin().unwrap();
    draft.state(b"x").unwrap();
    let (_, file) = draft.new_layer(LayerKind::Memory).unwrap();
    file.write_all_at(&vec![1; mib << 20], 0).unwrap();
    let mut about = about(name, None);
    about.purpose = purpose;
    let id = draft.publish(about).unwrap().id;
    arrive(place, id);
    id
}

/// The clock of directories is coarse: what arrives in a test arrives a second after what came before.
fn arrive(place: &Place, id: SnapshotId) {
    let count = u64::try_from(place.names().len()).unwrap();
    let time = SystemTime::now() - Duration::from_secs(1000) + Duration::from_secs(count);
    File::open(place.store.path(id)).unwrap().set_modified(time).unwrap();
}

/// Days after now.
fn later(days: u64) -> SystemTime {
    SystemTime::now() + Duration::from_secs(days * 86400)
}

#[test]
fn shared_layers_count_once_and_removing_one_frees_only_its_own() {
    let place = Place::new();
    let first = make(&place.store, "a", &place.disk_file("disk", 5)).unwrap();
    let before = place.store.used().unwrap();
    let second = make_above(&place.store, first.id);
    [first.id, second.id].into_iter().for_each(|id| arrive(&place, id));
    let grown = place.store.used().unwrap() - before;
    assert!(grown <= 16384, "a manifest and a state: {grown}");
    let policy = Policy { max_age: Some(Duration::from_secs(86400)), ..Policy::default() };
    assert_eq!(place.store.prune(&policy, 0, SystemTime::now()).unwrap(), Pruned::default());
    let pruned = place.store.prune(&policy, 0, later(2)).unwrap();
    assert_eq!(pruned.removed.len(), 2);
    assert_eq!(pruned.freed, before + grown);
}

#[test]
fn a_size_is_what_goes_and_what_stays_with_others() {
    let place = Place::new();
    let first = make(&place.store, "a", &place.disk_file("disk", 5)).unwrap();
    let disk = std::fs::metadata(place.path("disk")).unwrap().blocks() * 512;
    let alone = place.store.size(first.id);
    assert_eq!(alone.shared, disk, "the container's own");
    let second = make_above(&place.store, first.id);
    let size = place.store.size(second.id);
    assert!(size.shared > disk && size.own < alone.own, "{size:?}, before {alone:?}");
    std::fs::remove_file(place.path("disk")).unwrap();
    place.store.remove(first.id).unwrap();
    let left = place.store.size(second.id);
    assert_eq!((left.shared, left.own), (0, size.own + size.shared));
    assert_eq!(place.store.size(first.id), Size::default());
}

#[test]
fn purposes_are_told_by_the_manifests_words() {
    for purpose in [Purpose::Snapshot, Purpose::Checkpoint, Purpose::Template, Purpose::Hibernation] {
        assert_eq!(serde_json::to_value(purpose).unwrap(), purpose.name());
    }
}

#[test]
fn the_oldest_go_until_the_quota_holds() {
    let place = Place::new();
    let ids = ["a", "b", "c"].map(|name| make_sized(&place, name, 4, Purpose::Snapshot));
    let policy = Policy { quota: Some(9 << 20), ..Policy::default() };
    assert!(matches!(place.store.admit(&policy, 1), Err(StoreError::Quota { .. })));
    assert_eq!(place.store.prune(&policy, 0, later(0)).unwrap().removed, [ids[0]]);
    place.store.admit(&policy, 1024).unwrap();
    assert_eq!(place.store.prune(&policy, 4 << 20, later(0)).unwrap().removed, [ids[1]], "room for more");
}

#[test]
fn a_task_that_hibernates_is_never_pruned() {
    let place = Place::new();
    let kept = make_sized(&place, "h", 4, Purpose::Hibernation);
    make_sized(&place, "t", 4, Purpose::Template);
    let policy = Policy { quota: Some(0), max_age: Some(Duration::ZERO), ..Policy::default() };
    assert_eq!(place.store.prune(&policy, 0, later(1)).unwrap().removed.len(), 1);
    assert_eq!(place.names(), [kept.to_string()]);
}

#[test]
fn a_disk_that_would_be_full_admits_nothing() {
    let place = Place::new();
    place.store.admit(&Policy::default(), 1 << 20).unwrap();
    let message = place.store.admit(&Policy::default(), 1 << 60).unwrap_err().to_string();
    assert!(message.contains("bytes are needed") && message.contains("free"), "{message}");
    let policy = Policy { reserve: 1 << 60, ..Policy::default() };
    assert!(matches!(place.store.admit(&policy, 1), Err(StoreError::NoRoom { .. })));
}
