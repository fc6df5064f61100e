//! Snapshots that somebody damaged or made up.

use super::*;

fn damage(path: &std::path::Path, at: u64) {
    let file = File::options().read(true).write(true).open(path).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 0x10], at).unwrap();
}

fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}

#[test]
fn every_flipped_bit_of_a_manifest_is_noticed() {
    let place = Place::new();
    let made = make(&place.store, "a", &place.disk_file("disk", 5)).unwrap();
    let path = place.file(made.id, "manifest.json");
    let whole = std::fs::read(&path).unwrap();
    for at in 0..whole.len() - 1 {
        for bit in [0, 5] {
            let mut bad = whole.clone();
            bad[at] ^= 1 << bit;
            let read = Manifest::decode(&bad);
            // Whitespace outside of the digested part may change to other whitespace.
            assert!(read.is_err(), "byte {at}, bit {bit}: {read:?}");
        }
        assert!(Manifest::decode(&whole[..at]).is_err(), "cut at {at}");
    }
    std::fs::write(&path, &whole[..100]).unwrap();
    let listing = place.store.list().unwrap();
    assert_eq!((listing.entries.len(), listing.broken[0].0), (0, made.id), "it is listed as what it is");
    place.store.remove(made.id).unwrap();
    assert!(place.names().is_empty());
}

#[test]
fn damaged_files_are_named() {
    let place = Place::new();
    let made = make(&place.store, "a", &place.disk_file("disk", 5)).unwrap();
    let state = place.file(made.id, "state.bin");
    let disk = place.file(made.id, &made.layers[1].file_name());
    damage(&state, 3);
    assert!(text(place.store.open(made.id).unwrap_err()).contains("state.bin: it is damaged"));
    damage(&state, 3);
    damage(&disk, 600 << 20);
    let opened = place.store.open(made.id).unwrap();
    let message = text(opened.verify().unwrap_err());
    assert!(message.contains(&made.layers[1].file_name()) && message.contains("damaged"), "{message}");
    damage(&disk, 600 << 20);
    place.store.open(made.id).unwrap().verify().unwrap();
    File::options().write(true).open(&disk).unwrap().set_len(77).unwrap();
    assert!(text(place.store.open(made.id).unwrap_err()).contains("it has 77 bytes"));
    std::fs::remove_file(&disk).unwrap();
    assert!(text(place.store.open(made.id).unwrap_err()).contains("the file is missing"));
    let makers: [fn(&std::path::Path); 3] = [
        |path| std::os::unix::fs::symlink("/etc/passwd", path).unwrap(),
        |path| nix::unistd::mkfifo(path, nix::sys::stat::Mode::S_IRUSR).unwrap(),
        |path| std::fs::create_dir(path).unwrap(),
    ];
    for make in makers {
        make(&disk);
        assert!(text(place.store.open(made.id).unwrap_err()).contains("no regular file"));
        std::fs::remove_file(&disk).or_else(|_| std::fs::remove_dir(&disk)).unwrap();
    }
}

#[test]
fn a_snapshot_under_another_ones_name_is_refused() {
    let place = Place::new();
    let made = make(&place.store, "a", &place.disk_file("disk", 5)).unwrap();
    let other = SnapshotId::random().unwrap();
    std::fs::rename(place.store.path(made.id), place.store.path(other)).unwrap();
    let message = text(place.store.open(other).unwrap_err());
    assert!(message.contains("the id is") && message.contains("directory's name"), "{message}");
    // Nor is a link to one a snapshot.
    std::os::unix::fs::symlink(place.store.path(other), place.store.path(made.id)).unwrap();
    assert!(place.store.open(made.id).is_err());
}

#[test]
fn a_newer_version_is_refused_as_such_and_foreign_files_as_foreign() {
    let newer = br#"{"format":"spore-snapshot","version":3,"payload":[]}"#;
    assert!(matches!(Manifest::decode(newer), Err(ManifestError::Newer { found: 3 })));
    let older = br#"{"format":"spore-snapshot","version":0}"#;
    assert!(matches!(Manifest::decode(older), Err(ManifestError::Field { .. })));
    for foreign in [&b""[..], b"[]", b"{}", b"\xff\xfe", br#"{"format":"docker","version":1}"#] {
        assert!(matches!(Manifest::decode(foreign), Err(ManifestError::Foreign(_))));
    }
    let long = vec![b' '; 5 << 20];
    assert!(matches!(Manifest::decode(&long), Err(ManifestError::TooLong { .. })));
}

#[test]
fn a_manifest_of_version_1_is_one_without_volumes() {
    use sha2::{Digest, Sha256};
    let place = Place::new();
    let disk = place.disk_file("disk", 5);
    let first = make(&place.store, "a", &disk).unwrap();
    let made = make_above(&place.store, first.id);
    let text = serde_json::to_string(&made).unwrap();
    assert!(!text.contains("volumes"));
    let digest = hex(&Sha256::digest(&text));
    let file = format!(r#"{{"format":"spore-snapshot","version":1,"sha256":"{digest}","manifest":{text}}}"#);
    assert_eq!(Manifest::decode(file.as_bytes()).unwrap(), made);
}

/// Every rule of the format, broken by itself.
#[test]
fn manifests_that_make_no_sense_are_refused_by_name() {
    let place = Place::new();
    let made = make(&place.store, "a", &place.disk_file("disk", 5)).unwrap();
    let extent = made.memory.extents[0];
    let with = |extents: Vec<Extent>| {
        let mut manifest = made.clone();
        manifest.memory.extents = extents;
        manifest
    };
    let changed = |change: fn(&mut Manifest)| {
        let mut manifest = made.clone();
        change(&mut manifest);
        manifest
    };
    let cases = [
        (with(vec![extent, extent]), "overlaps"),
        (with(vec![Extent { address: 2 << 20, ..extent }, extent]), "comes before"),
        (with(vec![Extent { address: 64 << 20, ..extent }]), "beyond its memory region"),
        (with(vec![Extent { address: u64::MAX - 4095, ..extent }]), "beyond its memory region"),
        (with(vec![Extent { address: (64 << 20) - 4096, ..extent }]), "beyond its memory region"),
        (with(vec![Extent { length: 0, ..extent }]), "multiples of 4096"),
        (with(vec![Extent { address: 1, ..extent }]), "multiples of 4096"),
        (with(vec![Extent { offset: 8 << 20, ..extent }]), "beyond its layer"),
        (with(vec![Extent { offset: u64::MAX - 4095, ..extent }]), "beyond its layer"),
        (with(vec![Extent { layer: 1, ..extent }]), "of another kind"),
        (with(vec![Extent { layer: u32::MAX, ..extent }]), "which there is not"),
        (with(vec![extent; MAX_EXTENTS + 1]), "16384 are allowed"),
        (changed(|manifest| manifest.memory.regions.push((0, 4096))), "region 1 overlaps"),
        (changed(|manifest| manifest.memory.regions.push((1 << 51, 1 << 52))), "the address space"),
        (changed(|manifest| manifest.parent = Some(manifest.id)), "its own parent"),
        (changed(|manifest| manifest.disks[0].layers = vec![1, 1]), "stand on itself"),
        (changed(|manifest| manifest.disks[0].layers = vec![0]), "of another kind"),
        (changed(|manifest| manifest.disks[0].layers.clear()), "at least one"),
        (changed(|manifest| manifest.disks.push(manifest.disks[0].clone())), "each can be there once"),
        (changed(|manifest| manifest.layers.push(manifest.layers[0].clone())), "in the list of layers"),
        (changed(|manifest| manifest.layers[0].file.length = u64::MAX), "more than is allowed"),
        (changed(|manifest| manifest.layers[0].file.sha256 = "../..".into()), "64 hexadecimal digits"),
        (changed(|manifest| manifest.state.length = 1 << 40), "more than is allowed"),
        (
            changed(|manifest| {
                manifest.volumes.iter_mut().for_each(|volumes| volumes.tables.length = 1 << 40)
            }),
            "more than is allowed",
        ),
        (
            changed(|manifest| {
                let volumes = manifest.volumes.iter_mut();
                volumes.for_each(|volumes| volumes.exports[0].destination.push('\u{7}'));
            }),
            "control characters",
        ),
        (changed(|manifest| manifest.name = Some("\u{1b}[2J".into())), "control characters"),
    ];
    for (manifest, expected) in cases {
        let message = text(manifest.encode().unwrap_err());
        assert!(message.contains(expected), "{message} instead of {expected}");
    }
}

#[test]
fn ancestors_in_a_circle_are_an_error_not_an_endless_loop() {
    let place = Place::new();
    let disk = place.disk_file("disk", 5);
    let first = make(&place.store, "a", &disk).unwrap();
    let second = make_above(&place.store, first.id);
    let third = make_above(&place.store, second.id);
    assert_eq!(place.store.lineage(third.id).unwrap().len(), 3);
    let mut tampered = first.clone();
    tampered.parent = Some(third.id);
    std::fs::write(place.file(first.id, "manifest.json"), tampered.encode().unwrap()).unwrap();
    assert!(matches!(place.store.lineage(second.id), Err(StoreError::Cycle { .. })));
    place.store.open(second.id).unwrap().verify().unwrap();
}
