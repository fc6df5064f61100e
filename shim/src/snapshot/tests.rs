mod archive;
mod damaged;
mod hostile;
mod kill;
mod plain;
mod room;
mod template;

use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::PathBuf;

use super::manifest::*;
use super::*;

struct Place {
    dir: tempfile::TempDir,
    store: Store,
}

impl Place {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::new(dir.path());
        Self { dir, store }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A sparse file with some bytes far inside.
    fn disk_file(&self, name: &str, value: u8) -> File {
        let file = File::options().read(true).write(true).create_new(true).open(self.path(name)).unwrap();
        file.set_len(1 << 30).unwrap();
        file.write_all_at(&[value; 10_000], 600 << 20).unwrap();
        file
    }

    /// What there is in the store's directory, half-made things too.
    fn names(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.store.root()).into_iter().flatten().flatten();
        let mut names: Vec<_> = entries.map(|entry| entry.file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    fn file(&self, id: SnapshotId, name: &str) -> PathBuf {
        self.store.path(id).join(name)
    }
}

/// What a manifest has beside what the draft puts in.
fn about(name: &str, parent: Option<SnapshotId>) -> Manifest {
    Manifest {
        id: SnapshotId::random().unwrap(),
        parent,
        purpose: Purpose::Snapshot,
        created: 1_800_000_000,
        name: Some(name.into()),
        labels: [("app".to_owned(), "web".to_owned())].into(),
        namespace: "default".into(),
        container: "web".into(),
        builds: Builds { vmm: "v".into(), kernel: "k".into(), initramfs: "i".into() },
        cpu: "host".into(),
        vcpus: 2,
        devices: vec!["rng".into(), "blk".into()],
        state: manifest::File { length: 0, sha256: String::new() },
        layers: Vec::new(),
        memory: Memory::default(),
        disks: Vec::new(),
        volumes: None,
    }
}

/// A snapshot with one layer of memory and the disk `disk`.
fn make(store: &Store, name: &str, disk: &File) -> Result<Manifest, StoreError> {
    let mut draft = store.begin()?;
    draft.state(b"state of the VMM")?;
    let (memory, file) = draft.new_layer(LayerKind::Memory)?;
    file.set_len(8 << 20).unwrap();
    file.write_all_at(&[7; 4096], 4096).unwrap();
    let disk = draft.add_layer(LayerKind::Disk, disk, None)?;
    assert_eq!(draft.layers()[1].kind, LayerKind::Disk);
    let mut about = about(name, None);
    about.memory.regions = vec![(0, 64 << 20)];
    about.memory.extents = vec![Extent { address: 1 << 20, length: 1 << 20, layer: memory, offset: 4096 }];
    about.disks = vec![manifest::Disk { serial: "rw0".into(), layers: vec![disk] }];
    let exports = vec![Export { destination: "/data".into(), kind: ExportKind::Directory }];
    about.volumes = Some(Volumes { tables: draft.tables(b"the server's tables")?, exports });
    draft.publish(about)
}

/// A further one, which shares the disk of another and has memory of its own.
fn make_above(store: &Store, below: SnapshotId) -> Manifest {
    let below = store.open(below).unwrap();
    let mut draft = store.begin().unwrap();
    draft.state(b"later").unwrap();
    let mut share = |kind| {
        let at = below.manifest.layers.iter().position(|layer| layer.kind == kind).unwrap();
        draft.share_layer(&below, u32::try_from(at).unwrap()).unwrap()
    };
    let (disk, memory) = (share(LayerKind::Disk), share(LayerKind::Memory));
    let mut about = about("later", Some(below.manifest.id));
    about.memory.regions = vec![(0, 64 << 20)];
    about.memory.extents = vec![Extent { address: 0, length: 4096, layer: memory, offset: 0 }];
    about.disks = vec![manifest::Disk { serial: "rw0".into(), layers: vec![disk] }];
    draft.publish(about).unwrap()
}

#[test]
fn what_was_put_in_is_what_comes_out() {
    let place = Place::new();
    let made = make(&place.store, "a", &place.disk_file("disk", 5)).unwrap();
    let opened = place.store.open(made.id).unwrap();
    assert_eq!((&opened.manifest, &opened.state[..]), (&made, &b"state of the VMM"[..]));
    assert_eq!(opened.volumes.as_deref(), Some(&b"the server's tables"[..]));
    opened.verify().unwrap();
    let files: Vec<_> = opened.layers().map(|(layer, file)| (layer.kind, file)).collect();
    let mut bytes = [0; 10_000];
    files[1].1.read_exact_at(&mut bytes, 600 << 20).unwrap();
    assert_eq!((files[0].0, files[1].0, bytes), (LayerKind::Memory, LayerKind::Disk, [5; 10_000]));
    let listing = place.store.list().unwrap();
    assert_eq!((listing.entries.len(), listing.broken.len()), (1, 0));
    assert_eq!(listing.entries[0].manifest, made);
}

#[test]
fn a_store_is_its_owners_alone() {
    let place = Place::new();
    let made = make(&place.store, "a", &place.disk_file("disk", 5)).unwrap();
    let mode = |path: PathBuf| std::fs::metadata(path).unwrap().permissions().mode() & 0o7777;
    assert_eq!(mode(place.store.root().into()), 0o700);
    assert_eq!(mode(place.store.path(made.id)), 0o700);
    for name in ["manifest.json", "state.bin", &made.layers[0].file_name()] {
        assert_eq!(mode(place.file(made.id, name)), 0o600, "{name}");
    }
}

#[test]
fn a_layer_is_one_file_however_many_have_it_and_stays_with_the_last() {
    let place = Place::new();
    let disk = place.disk_file("disk", 5);
    let first = make(&place.store, "a", &disk).unwrap();
    let second = make_above(&place.store, first.id);
    let third = make_above(&place.store, second.id);
    let inode =
        |made: &Manifest| std::fs::metadata(place.file(made.id, &first.layers[1].file_name())).unwrap().ino();
    assert_eq!([inode(&first), inode(&second), inode(&third)], [disk.metadata().unwrap().ino(); 3]);
    for id in [second.id, first.id] {
        place.store.remove(id).unwrap();
        place.store.open(third.id).unwrap().verify().unwrap();
    }
    assert_eq!(place.names(), [third.id.to_string()]);
    assert_eq!(place.store.lineage(third.id).unwrap().len(), 1, "ancestors that are gone are gone");
}

#[test]
fn what_is_open_stays_usable_when_it_is_removed() {
    let place = Place::new();
    let made = make(&place.store, "a", &place.disk_file("disk", 5)).unwrap();
    let opened = place.store.open(made.id).unwrap();
    place.store.remove(made.id).unwrap();
    opened.verify().unwrap();
    assert!(matches!(place.store.open(made.id), Err(StoreError::NoSuch { .. })));
    assert!(matches!(place.store.remove(made.id), Err(StoreError::NoSuch { .. })));
}

#[test]
fn a_layer_on_another_file_system_is_copied_and_so_is_a_file_without_a_name() {
    let place = Place::new();
    // /dev/shm is another one than the temporary directory's on every host of ours; where it is not, it is linked.
    let elsewhere = tempfile::tempfile_in("/dev/shm").unwrap();
    elsewhere.set_len(1 << 30).unwrap();
    elsewhere.write_all_at(&[5; 10_000], 600 << 20).unwrap();
    let made = make(&place.store, "a", &elsewhere).unwrap();
    let copy = std::fs::metadata(place.file(made.id, &made.layers[1].file_name())).unwrap();
    assert_ne!((copy.dev(), copy.ino()), {
        let metadata = elsewhere.metadata().unwrap();
        (metadata.dev(), metadata.ino())
    });
    assert!(copy.blocks() * 512 < 1 << 20, "it is sparse");
    place.store.open(made.id).unwrap().verify().unwrap();
}

#[test]
fn every_reason_not_to_link_leads_to_a_copy_and_others_are_errors() {
    let place = Place::new();
    let disk = place.disk_file("disk", 5);
    for errno in [libc::EXDEV, libc::EMLINK, libc::EPERM] {
        let path = place.path(&format!("copy-{errno}"));
        let fail = |_: &File, _: &std::path::Path| Err(std::io::Error::from_raw_os_error(errno));
        draft::link_or_copy(&disk, &path, fail).unwrap();
        assert_eq!(sparse::digest(&File::open(path).unwrap()).unwrap(), sparse::digest(&disk).unwrap());
    }
    let fail = |_: &File, _: &std::path::Path| Err(std::io::Error::from_raw_os_error(libc::EIO));
    draft::link_or_copy(&disk, &place.path("x"), fail).unwrap_err();
    assert!(!place.path("x").exists());
}

#[test]
fn a_draft_that_is_dropped_or_fails_leaves_nothing() {
    let place = Place::new();
    let mut draft = place.store.begin().unwrap();
    draft.state(b"x").unwrap();
    assert_eq!((place.names().len(), place.store.list().unwrap().entries.len()), (1, 0), "invisible");
    drop(draft);
    assert!(place.names().is_empty());
    let mut draft = place.store.begin().unwrap();
    draft.state(b"x").unwrap();
    let mut bad = about("x", None);
    bad.memory.extents = vec![Extent { address: 0, length: 4096, layer: 9, offset: 0 }];
    draft.publish(bad).unwrap_err();
    assert!(place.names().is_empty());
}

#[test]
fn snapshots_are_found_by_id_by_its_beginning_and_by_name() {
    let place = Place::new();
    let disk = place.disk_file("disk", 5);
    let a = make(&place.store, "a", &disk).unwrap().id;
    let id = a.to_string();
    for wanted in [&id, &id[..12]] {
        assert_eq!(place.store.find(wanted).unwrap(), a);
    }
    assert!(matches!(place.store.find("../x"), Err(StoreError::NoSuch { .. })));
    let warm = place.store.name_template(a, "warm").unwrap().id;
    assert_eq!(place.store.find("warm").unwrap(), warm);
    // Somebody else's archive brings its name with it, which stands for nothing.
    for name in ["warm", &id[..12], "b"] {
        make(&place.store, name, &disk).unwrap();
    }
    assert_eq!(place.store.find("warm").unwrap(), warm);
    assert_eq!(place.store.find(&id[..12]).unwrap(), a);
    assert!(matches!(place.store.find("b"), Err(StoreError::NoSuch { .. })));
}

#[test]
fn a_digest_tells_content_not_holes() {
    let place = Place::new();
    let disk = place.disk_file("disk", 5);
    let filled = place.disk_file("filled", 5);
    filled.write_all_at(&vec![0; 3 << 20], 1000).unwrap();
    assert!(filled.metadata().unwrap().blocks() > disk.metadata().unwrap().blocks());
    let digest = sparse::digest(&disk).unwrap();
    assert_eq!(sparse::digest(&filled).unwrap(), digest);
    filled.write_all_at(&[1], (1 << 30) - 1).unwrap();
    let other = sparse::digest(&filled).unwrap();
    disk.set_len((1 << 30) - 1).unwrap();
    assert!(other != digest && sparse::digest(&disk).unwrap() != digest, "a byte, the length");
}

#[test]
fn many_may_make_and_remove_at_once() {
    let place = Place::new();
    let disk = place.disk_file("disk", 5);
    let kept = make(&place.store, "kept", &disk).unwrap();
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for _ in 0..5 {
                    let made = make_above(&place.store, kept.id);
                    place.store.list().unwrap();
                    place.store.open(made.id).unwrap();
                    place.store.remove(made.id).unwrap();
                }
            });
        }
    });
    assert_eq!(place.names(), [kept.id.to_string()]);
    place.store.open(kept.id).unwrap().verify().unwrap();
}

#[test]
fn a_digest_that_is_known_is_not_computed_again() {
    let place = Place::new();
    let disk = place.disk_file("disk", 5);
    let mut draft = place.store.begin().unwrap();
    draft.state(b"x").unwrap();
    for digest in [Some("a".repeat(64)), None] {
        draft.add_layer(LayerKind::Disk, &disk, digest).unwrap();
    }
    let made = draft.publish(about("x", None)).unwrap();
    let files: Vec<_> = made.layers.into_iter().map(|layer| layer.file).collect();
    assert_eq!((files[0].length, &files[0].sha256), (1 << 30, &"a".repeat(64)));
    assert_eq!(files[1].sha256, sparse::digest(&disk).unwrap());
}
