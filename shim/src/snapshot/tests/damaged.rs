//! A damaged snapshot in the store is no reason to refuse a good one of the same id.

use super::*;

/// A store with a snapshot, which is in the directory `out` as well.
fn scene() -> (Place, Manifest, PathBuf) {
    let place = Place::new();
    let made = make(&place.store, "a", &place.disk_file("disk", 5)).unwrap();
    let out = place.path("out");
    std::fs::create_dir(&out).unwrap();
    export_directory(&place.store.open(made.id).unwrap(), &out).unwrap();
    (place, made, out)
}

fn overwrite(path: &std::path::Path, at: u64) {
    File::options().write(true).open(path).unwrap().write_all_at(b"damage", at).unwrap();
}

#[test]
fn a_damaged_snapshot_is_replaced_by_a_good_one_of_the_same_id() {
    let (place, made, out) = scene();
    let [memory, disk] = [0, 1].map(|at: usize| made.layers[at].file_name());
    let damages: [(&str, &dyn Fn()); 7] = [
        ("a manifest that is none", &|| std::fs::write(place.file(made.id, FILE), "{").unwrap()),
        ("no manifest", &|| std::fs::remove_file(place.file(made.id, FILE)).unwrap()),
        ("the state's bytes", &|| overwrite(&place.file(made.id, "state.bin"), 3)),
        ("a layer that was cut", &|| {
            File::options().write(true).open(place.file(made.id, &memory)).unwrap().set_len(4096).unwrap();
        }),
        ("no layer", &|| std::fs::remove_file(place.file(made.id, &disk)).unwrap()),
        ("the memory's bytes", &|| overwrite(&place.file(made.id, &memory), 5000)),
        ("the disk's bytes", &|| overwrite(&place.file(made.id, &disk), 600 << 20)),
    ];
    for (what, damage) in damages {
        damage();
        assert_eq!(import_directory(&place.store, &out, &Policy::default()).unwrap(), made.id, "{what}");
        place.store.open(made.id).unwrap().verify().unwrap();
        assert_eq!(place.names(), [made.id.to_string()], "{what}");
    }
}

#[test]
fn a_damaged_snapshot_stays_when_what_comes_is_damaged_too() {
    let (place, made, out) = scene();
    let disk = made.layers[1].file_name();
    overwrite(&place.file(made.id, "state.bin"), 3);
    overwrite(&out.join(format!("pack-{disk}")), 100);
    import_directory(&place.store, &out, &Policy::default()).unwrap_err();
    assert_eq!(place.names(), [made.id.to_string()], "what can be saved of it is the user's");
}

#[test]
fn a_newer_release_s_snapshot_is_not_damaged() {
    let (place, made, out) = scene();
    let newer = r#"{"format": "spore-snapshot", "version": 1000000}"#;
    std::fs::write(place.file(made.id, FILE), newer).unwrap();
    let message = import_directory(&place.store, &out, &Policy::default()).unwrap_err().to_string();
    assert!(message.contains("newer"), "{message}");
    assert_eq!(std::fs::read_to_string(place.file(made.id, FILE)).unwrap(), newer);
}

#[test]
fn layers_that_nobody_wrote_to_are_not_read_again() {
    let (place, made, out) = scene();
    let disk = place.file(made.id, &made.layers[1].file_name());
    overwrite(&disk, 600 << 20);
    // As if it had been written before the manifest; so a digest would be the only one to tell.
    let long_ago = std::time::SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(1_800_000_000);
    File::options().write(true).open(&disk).unwrap().set_modified(long_ago).unwrap();
    assert!(std::fs::metadata(&disk).unwrap().modified().unwrap() == long_ago);
    let newer = long_ago + std::time::Duration::from_secs(1);
    File::options().write(true).open(place.file(made.id, FILE)).unwrap().set_modified(newer).unwrap();
    let memory = place.file(made.id, &made.layers[0].file_name());
    File::options().write(true).open(&memory).unwrap().set_modified(long_ago).unwrap();
    assert_eq!(import_directory(&place.store, &out, &Policy::default()).unwrap(), made.id);
    assert!(place.store.open(made.id).unwrap().verify().is_err(), "it was believed");
}
