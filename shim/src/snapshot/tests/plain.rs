//! Directories of clients' that stay: what they share, what they never share, and what becomes of them.

use std::path::Path;

use super::*;

fn inode(path: &Path) -> (u64, u64) {
    let metadata = std::fs::metadata(path).unwrap();
    (metadata.dev(), metadata.ino())
}

/// Writes a snapshot of the store's into a new directory.
fn put(place: &Place, id: SnapshotId, name: &str) -> (PathBuf, Placed) {
    let out = place.path("out").join(name);
    std::fs::create_dir_all(&out).unwrap();
    let placed = export_plain(&place.store.open(id).unwrap(), &out).unwrap();
    (out, placed)
}

fn import(store: &Store, dir: &Path) -> Result<SnapshotId, ImportError> {
    import_directory(store, dir, &Policy::default())
}

fn whole(made: &Manifest, dir: &Path) {
    let other = Place::new();
    assert_eq!(import(&other.store, dir).unwrap(), made.id);
    let opened = other.store.open(made.id).unwrap();
    opened.verify().unwrap();
    assert_eq!(&opened.manifest, made);
}

/// All combinations of file systems are told apart by what happened.
fn all_of(placed: Placed, expected: Placed) {
    let Placed { reflinked, linked, copied } = expected;
    let cloned = Placed { reflinked: reflinked + linked + copied, ..Placed::default() };
    assert!(placed == expected || placed == cloned, "{placed:?} instead of {expected:?}");
}

const COPIED: Placed = Placed { reflinked: 0, linked: 0, copied: 2 };
const LINKED: Placed = Placed { reflinked: 0, linked: 2, copied: 0 };

#[test]
fn it_shares_with_the_one_beside_it_and_never_with_the_store() {
    let place = Place::new();
    let made = make(&place.store, "a", &place.disk_file("disk", 5)).unwrap();
    let later = make_above(&place.store, made.id);
    let (first, placed) = put(&place, made.id, "first");
    all_of(placed, COPIED);
    let (second, placed) = put(&place, later.id, "second");
    all_of(placed, LINKED);
    for layer in &later.layers {
        let name = layer.file_name();
        let [own, one, two] =
            [place.file(later.id, &name), first.join(&name), second.join(&name)].map(|path| inode(&path));
        assert_ne!(own, one, "{name}: it is the store's");
        assert_ne!(own, two, "{name}: it is the store's");
        assert_eq!(one == two, placed.linked > 0, "{name}");
        let file = std::fs::metadata(second.join(&name)).unwrap();
        assert!(file.blocks() * 512 < 1 << 20 && file.mode() & 0o777 == 0o600, "{name}");
    }
    // Each has all that it needs, and so has the store.
    whole(&made, &first);
    std::fs::remove_dir_all(&first).unwrap();
    whole(&later, &second);
    place.store.remove(made.id).unwrap();
    place.store.remove(later.id).unwrap();
    whole(&later, &second);
    assert_eq!(import(&place.store, &second).unwrap(), later.id);
    // What is done to the directory is nothing to the store.
    for layer in &later.layers {
        let name = layer.file_name();
        assert_ne!(inode(&second.join(&name)), inode(&place.file(later.id, &name)), "{name}");
        let file = File::options().write(true).open(second.join(&name)).unwrap();
        file.write_all_at(&[0xee; 4096], 4096).unwrap();
    }
    place.store.open(later.id).unwrap().verify().unwrap();
}

/// What somebody else may have written to, or is of something else, is not shared, and what is written is right.
#[test]
fn it_takes_nothing_from_one_that_may_not_be_right() {
    let place = Place::new();
    let made = make(&place.store, "a", &place.disk_file("disk", 5)).unwrap();
    let later = make_above(&place.store, made.id);
    let names: Vec<_> = made.layers.iter().map(Layer::file_name).collect();
    let change = |name: &str| {
        let file = File::options().write(true).open(place.path("out/first").join(name)).unwrap();
        file.write_all_at(&[0xee; 100], 5000).unwrap();
    };
    let changes: [&dyn Fn(&str); 5] = [
        &|_| {
            let mut other = made.clone();
            other.container = "another".into();
            for layer in &mut other.layers {
                layer.id = SnapshotId::random().unwrap();
            }
            std::fs::write(place.path("out/first/manifest.json"), other.encode().unwrap()).unwrap();
        },
        &change,
        &|name| {
            let open = std::fs::Permissions::from_mode(0o640);
            std::fs::set_permissions(place.path("out/first").join(name), open).unwrap();
        },
        &|name| {
            let path = place.path("out/first").join(name);
            std::fs::rename(&path, place.path("out/first/moved")).unwrap();
            std::os::unix::fs::symlink("moved", &path).unwrap();
        },
        &|name| std::fs::remove_file(place.path("out/first").join(name)).unwrap(),
    ];
    for (at, change) in changes.iter().enumerate() {
        put(&place, made.id, "first");
        names.iter().for_each(|name| change(name));
        let (second, placed) = put(&place, later.id, "second");
        assert_eq!(placed.linked, 0, "case {at}");
        whole(&later, &second);
        std::fs::remove_dir_all(place.path("out")).unwrap();
    }
    // Nor are files that are no checkpoints in anybody's way.
    std::fs::create_dir_all(place.path("out/odd")).unwrap();
    std::fs::write(place.path("out/odd/manifest.json"), "{}").unwrap();
    std::fs::write(place.path("out/file"), "").unwrap();
    std::os::unix::fs::symlink("/", place.path("out/link")).unwrap();
    let (first, _) = put(&place, made.id, "first");
    whole(&made, &first);
}

#[test]
fn it_shares_with_the_one_that_its_container_was_restored_from() {
    let place = Place::new();
    let made = make(&place.store, "a", &place.disk_file("disk", 5)).unwrap();
    put(&place, made.id, "first");
    let mut other = made.clone();
    other.container = "another".into();
    std::fs::write(place.path("out/first/manifest.json"), other.encode().unwrap()).unwrap();
    let later = make_above(&place.store, made.id);
    let (second, placed) = put(&place, later.id, "second");
    all_of(placed, LINKED);
    whole(&later, &second);
}

#[test]
fn a_damaged_one_is_refused_by_name_and_leaves_nothing() {
    let place = Place::new();
    let made = make(&place.store, "a", &place.disk_file("disk", 5)).unwrap();
    let disk = made.layers[1].file_name();
    let replace = |make: &dyn Fn(&Path)| {
        let path = place.path("out/damaged").join(&disk);
        std::fs::remove_file(&path).unwrap();
        make(&path);
    };
    let written = |name: &str, at: u64| {
        let file = File::options().write(true).open(place.path("out/damaged").join(name)).unwrap();
        file.write_all_at(b"\x77", at).unwrap();
    };
    let cut = |length: u64| {
        let file = File::options().write(true).open(place.path("out/damaged").join(&disk)).unwrap();
        file.set_len(length).unwrap();
    };
    let cases: [(&dyn Fn(), &str); 11] = [
        (&|| replace(&|_| {}), "is missing"),
        (&|| replace(&|path| std::os::unix::fs::symlink("/etc/passwd", path).unwrap()), "no regular file"),
        (&|| replace(&|path| std::fs::create_dir(path).unwrap()), "no regular file"),
        (
            &|| replace(&|path| nix::unistd::mkfifo(path, nix::sys::stat::Mode::S_IRUSR).unwrap()),
            "no regular file",
        ),
        (&|| replace(&|path| std::fs::write(path, "short").unwrap()), "it has 5 bytes"),
        (&|| cut(77), "it has 77 bytes"),
        (&|| cut(2 << 30), "it has 2147483648 bytes"),
        (&|| written(&disk, 600 << 20), "it is damaged"),
        (&|| written("state.bin", 3), "state.bin: it is damaged"),
        (
            &|| std::fs::remove_file(place.path("out/damaged/manifest.json")).unwrap(),
            "manifest.json is missing",
        ),
        (&|| written("manifest.json", 90), "manifest"),
    ];
    for (at, (damage, expected)) in cases.iter().enumerate() {
        put(&place, made.id, "damaged");
        damage();
        let other = Place::new();
        let message = import(&other.store, &place.path("out/damaged")).unwrap_err().to_string();
        assert!(message.contains(expected), "case {at}: {message} instead of {expected}");
        assert!(other.names().is_empty(), "case {at}: {:?}", other.names());
        std::fs::remove_dir_all(place.path("out")).unwrap();
    }
}

#[test]
fn where_a_name_is_taken_nothing_is_overwritten_and_nothing_half_stays() {
    let place = Place::new();
    let made = make(&place.store, "a", &place.disk_file("disk", 5)).unwrap();
    let out = place.path("out");
    std::fs::create_dir(&out).unwrap();
    std::fs::write(out.join("volumes.json"), "somebody else's").unwrap();
    let message = export_plain(&place.store.open(made.id).unwrap(), &out).unwrap_err().to_string();
    assert!(message.contains("volumes.json"), "{message}");
    assert_eq!(std::fs::read_dir(&out).unwrap().count(), 1);
    assert_eq!(std::fs::read(out.join("volumes.json")).unwrap(), b"somebody else's");
}

/// `cp` and `tar` may write what was a hole.
#[test]
fn one_that_was_copied_without_holes_has_them_again() {
    let place = Place::new();
    let made = make(&place.store, "a", &place.disk_file("disk", 5)).unwrap();
    let (out, placed) = put(&place, made.id, "first");
    let memory = out.join(made.layers[0].file_name());
    let bytes = std::fs::read(&memory).unwrap();
    std::fs::remove_file(&memory).unwrap();
    std::fs::write(&memory, &bytes).unwrap();
    assert!(std::fs::metadata(&memory).unwrap().blocks() * 512 >= 8 << 20);
    let other = Place::new();
    import(&other.store, &out).unwrap();
    other.store.open(made.id).unwrap().verify().unwrap();
    let own = std::fs::metadata(other.file(made.id, &made.layers[0].file_name())).unwrap();
    assert!(placed.reflinked > 0 || own.blocks() * 512 < 1 << 20, "{} blocks", own.blocks());
}
