//! Out and in again, and what others may send.

use proptest::prelude::*;
use tar::{EntryType, Header};

use super::*;

fn exported() -> (Manifest, Vec<u8>) {
    let place = Place::new();
    let made = make(&place.store, "a", &place.disk_file("disk", 5)).unwrap();
    let mut tar = Vec::new();
    export_tar(&place.store.open(made.id).unwrap(), &mut tar).unwrap();
    (made, tar)
}

fn import(place: &Place, tar: &[u8]) -> Result<SnapshotId, ImportError> {
    import_tar(&place.store, &mut &tar[..], &Policy::default())
}

fn entry(name: &str, kind: EntryType, content: &[u8]) -> Vec<u8> {
    let mut header = Header::new_gnu();
    header.as_mut_bytes()[..name.len()].copy_from_slice(name.as_bytes());
    header.set_entry_type(kind);
    header.set_size(content.len() as u64);
    header.set_mode(0o600);
    header.set_cksum();
    let mut bytes = header.as_bytes().to_vec();
    bytes.extend(content);
    bytes.resize(bytes.len().next_multiple_of(512), 0);
    bytes
}

fn ended(entries: &[Vec<u8>]) -> Vec<u8> {
    [entries.concat(), vec![0; 1024]].concat()
}

/// The files of an export, by name.
fn files(tar: &[u8]) -> Vec<(String, Vec<u8>)> {
    let mut files = Vec::new();
    let mut at = 0;
    while tar[at] != 0 {
        let header = Header::from_byte_slice(&tar[at..at + 512]);
        let size = usize::try_from(header.entry_size().unwrap()).unwrap();
        let name = header.path().unwrap().to_string_lossy().into_owned();
        files.push((name, tar[at + 512..at + 512 + size].to_vec()));
        at += 512 + size.next_multiple_of(512);
    }
    files
}

#[test]
fn an_export_has_no_holes_and_is_the_same_snapshot_elsewhere() {
    let (made, tar) = exported();
    assert!(tar.len() < 1 << 20, "{} bytes of a disk of 1 GiB", tar.len());
    let place = Place::new();
    assert_eq!(import(&place, &tar).unwrap(), made.id);
    let opened = place.store.open(made.id).unwrap();
    opened.verify().unwrap();
    assert_eq!(opened.manifest, made);
    let disk = opened.layers().nth(1).unwrap().1.metadata().unwrap();
    assert!(disk.len() == 1 << 30 && disk.blocks() * 512 < 1 << 20, "sparse again");
    assert_eq!(import(&place, &tar).unwrap(), made.id, "it is there");
    assert_eq!(place.names(), [made.id.to_string()]);
}

#[test]
fn a_known_snapshot_is_not_read_twice() {
    let (made, tar) = exported();
    let place = Place::new();
    import(&place, &tar).unwrap();
    let manifest_alone = &tar[..512 * 8];
    assert_eq!(import(&place, manifest_alone).unwrap(), made.id);
}

#[test]
fn a_directory_that_another_tar_packed_comes_in_too() {
    let (made, tar) = exported();
    let long = "x".repeat(200);
    let mut entries = vec![entry("./", EntryType::Directory, b"")];
    // Sorted otherwise, with records of what we do not need.
    for (name, content) in files(&tar).into_iter().rev() {
        let records = format!("30 mtime=1700000000.123456789\n{} comment={long}\n", 9 + 4 + long.len());
        assert_eq!(records.find('\n'), Some(29));
        entries.push(entry("PaxHeaders.0/x", EntryType::XHeader, records.as_bytes()));
        entries.push(entry(&format!("./{name}"), EntryType::Regular, &content));
    }
    let place = Place::new();
    assert_eq!(import(&place, &ended(&entries)).unwrap(), made.id);
    place.store.open(made.id).unwrap().verify().unwrap();
}

#[test]
fn a_directory_goes_out_and_comes_in() {
    let place = Place::new();
    let made = make(&place.store, "a", &place.disk_file("disk", 5)).unwrap();
    let out = place.path("out");
    std::fs::create_dir(&out).unwrap();
    std::fs::write(out.join("config.json"), "somebody else's").unwrap();
    let opened = place.store.open(made.id).unwrap();
    export_directory(&opened, &out).unwrap();
    let other = Place::new();
    assert_eq!(import_directory(&other.store, &out, &Policy::default()).unwrap(), made.id);
    other.store.open(made.id).unwrap().verify().unwrap();
    // A name that is taken: nothing is overwritten, nothing half stays.
    std::fs::remove_file(out.join("manifest.json")).unwrap();
    let before = std::fs::read_dir(&out).unwrap().count();
    export_directory(&opened, &out).unwrap_err();
    assert_eq!(std::fs::read_dir(&out).unwrap().count(), before);
}

#[test]
fn archives_that_are_no_export_are_refused_and_leave_nothing() {
    let (made, tar) = exported();
    let parts = files(&tar);
    let all: Vec<_> = parts.iter().map(|(name, content)| entry(name, EntryType::Regular, content)).collect();
    let with = |extra: Vec<u8>| ended(&[all.clone(), vec![extra]].concat());
    let without = |at: usize| {
        let mut some = all.clone();
        some.remove(at);
        ended(&some)
    };
    let changed = |at: usize, byte: usize| {
        let mut content = parts[at].1.clone();
        let byte = content.len() - 1 - byte;
        content[byte] ^= 1;
        let mut some = all.clone();
        some[at] = entry(&parts[at].0, EntryType::Regular, &content);
        ended(&some)
    };
    let layer = format!("pack-{}.disk", "0".repeat(32));
    let pack = parts[2].1.clone();
    let cases = [
        (with(entry("../../etc/passwd", EntryType::Regular, b"x")), "no file of a snapshot"),
        (with(entry("/etc/passwd", EntryType::Regular, b"x")), "no file of a snapshot"),
        (with(entry("pack-../x.disk", EntryType::Regular, b"x")), "no file of a snapshot"),
        (with(entry("link", EntryType::Symlink, b"")), "only files"),
        (with(entry("link", EntryType::Link, b"")), "only files"),
        (with(entry("null", EntryType::Char, b"")), "only files"),
        (with(entry("dir", EntryType::Directory, b"")), "only files"),
        (with(entry("state.bin", EntryType::Regular, b"x")), "twice"),
        (with(entry(&layer, EntryType::Regular, &pack)), "does not name it"),
        (with(entry(&layer, EntryType::Regular, b"short")), "ends early"),
        (without(0), "manifest.json is missing"),
        (without(1), "is missing"),
        (without(3), "state.bin is missing"),
        (without(4), "volumes.json is missing"),
        (changed(1, 0), "damaged"),
        (changed(2, 5000), "damaged"),
        (changed(3, 2), "damaged"),
        (changed(4, 2), "damaged"),
        (tar[..tar.len() - 5000].to_vec(), "ends early"),
        (tar[..700].to_vec(), "ends early"),
        (vec![1; 4096], "checksum"),
        (ended(&[entry("x", EntryType::XHeader, &[b'x'; 70_000])]), "64 KiB"),
        (ended(&[entry("x", EntryType::XHeader, b"17 GNU.sparse.a=1\n"), all[0].clone()]), "malformed"),
    ];
    let place = Place::new();
    for (at, (tar, expected)) in cases.into_iter().enumerate() {
        let message = import(&place, &tar).unwrap_err().to_string();
        assert!(message.contains(expected), "case {at}: {message} instead of {expected}");
        assert!(place.names().is_empty(), "case {at}: {:?}", place.names());
    }
    // Another snapshot that says it is this one.
    import(&place, &tar).unwrap();
    let mut other = made.clone();
    other.vcpus = 9;
    let tar = ended(&[entry("manifest.json", EntryType::Regular, &other.encode().unwrap())]);
    assert!(matches!(import(&place, &tar), Err(ImportError::Store(StoreError::Exists { .. }))));
    place.store.open(made.id).unwrap().verify().unwrap();
}

/// Packed files whose header lies.
#[test]
fn a_packed_file_is_believed_nothing() {
    let file = tempfile::tempfile().unwrap();
    let unpack = |bytes: &[u8]| pack::unpack(bytes, bytes.len() as u64, &file);
    let pack = |length: u64, extents: &[(u64, u64)], data: usize| {
        let mut bytes = b"SPORPACK\x01\0\0\0\0\0\0\0".to_vec();
        bytes.extend(length.to_le_bytes());
        bytes.extend((extents.len() as u64).to_le_bytes());
        extents.iter().for_each(|(a, b)| bytes.extend([a.to_le_bytes(), b.to_le_bytes()].concat()));
        bytes.extend(vec![1; data]);
        bytes
    };
    unpack(&pack(100, &[(0, 10), (10, 10)], 20)).unwrap();
    for (bad, expected) in [
        (pack(100, &[(0, 10), (5, 10)], 20), "extent 1"),
        (pack(100, &[(90, 11)], 11), "extent 0"),
        (pack(100, &[(u64::MAX, 2)], 2), "at most 100"),
        (pack(100, &[(0, 0)], 0), "extent 0"),
        (pack(100, &[(0, 10)], 9), "9 are there"),
        (pack(100, &[(0, 10)], 11), "11 are there"),
        (pack(1 << 50, &[], 0), "at most"),
    ] {
        let message = unpack(&bad).unwrap_err().to_string();
        assert!(message.contains(expected), "{message} instead of {expected}");
    }
    let mut many = pack(100, &[], 0);
    many[24..32].copy_from_slice(&u64::MAX.to_le_bytes());
    assert!(unpack(&many).unwrap_err().to_string().contains("extents"));
    many[8] = 2;
    assert!(unpack(&many).unwrap_err().to_string().contains("version 2"));
    assert!(unpack(b"SPORE").is_err() && unpack(&[0; 64]).is_err());
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 100, ..ProptestConfig::default() })]

    #[test]
    fn a_damaged_archive_never_gives_a_snapshot_that_is_damaged(
        edits in proptest::collection::vec((any::<proptest::sample::Index>(), any::<u8>()), 1..6), cut: bool,
    ) {
        thread_local!(static TAR: (Manifest, Vec<u8>) = exported());
        let (made, mut tar) = TAR.with(Clone::clone);
        for (at, byte) in &edits {
            let at = at.index(tar.len());
            tar[at] = *byte;
            if cut {
                tar.truncate(at.max(1));
                break;
            }
        }
        let place = Place::new();
        if let Ok(id) = import(&place, &tar) {
            // What was changed means nothing: padding, a time, a mode.
            let opened = place.store.open(id).unwrap();
            opened.verify().unwrap();
            prop_assert_eq!(&opened.manifest, &made);
        } else {
            prop_assert!(place.names().is_empty());
        }
    }
}
