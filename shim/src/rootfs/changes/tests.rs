//! Hostile archives, what an archive leaves behind, and every state that a kill can leave.

use std::fs::{self, File};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};

use spore_agent_api::changes::{
    BLOCK, END, FAILED, LINK, MTIME, OPAQUE, PATH, SPARSE_MAP, SPARSE_SIZE, XATTR, push_record,
};
use tar::{EntryType, Header};

use super::apply::{ApplyError, apply};
use super::layer::{BASE, BASE_UNFINISHED, Marker, copy};
use super::*;
use crate::rootfs::writable;

const LIMITS: Limits = Limits { entries: 100, bytes: 1 << 20 };

/// An archive under construction.
#[derive(Default)]
struct Tar(Vec<u8>);

impl Tar {
    fn block(mut self, header: &mut Header, data: &[u8]) -> Self {
        header.set_cksum();
        self.0.extend_from_slice(header.as_bytes());
        self.0.extend_from_slice(data);
        self.0.resize(self.0.len().next_multiple_of(BLOCK), 0);
        self
    }

    fn records(self, kind: EntryType, records: &[(&str, &str)]) -> Self {
        let mut bytes = Vec::new();
        for (key, value) in records {
            push_record(&mut bytes, key.as_bytes(), value.as_bytes());
        }
        let mut header = Header::new_ustar();
        header.set_entry_type(kind);
        header.set_size(bytes.len() as u64);
        self.block(&mut header, &bytes)
    }

    fn entry(self, kind: EntryType, path: &str, more: &[(&str, &str)], data: &[u8]) -> Self {
        let records = [&[(PATH, path), (MTIME, "1000.000000007")][..], more].concat();
        let mut header = Header::new_ustar();
        header.set_entry_type(kind);
        header.set_mode(if kind == EntryType::Directory { 0o751 } else { 0o4640 });
        header.set_uid(7);
        header.set_gid(8);
        header.set_size(data.len() as u64);
        self.records(EntryType::XHeader, &records).block(&mut header, data)
    }

    fn dir(self, path: &str) -> Self {
        self.entry(EntryType::Directory, path, &[], b"")
    }

    fn file(self, path: &str, data: &[u8]) -> Self {
        self.entry(EntryType::Regular, path, &[], data)
    }

    fn end(self) -> Vec<u8> {
        self.records(EntryType::XGlobalHeader, &[(END, "")]).0
    }
}

/// A directory with one more around it, which nothing may touch.
struct Scene {
    around: tempfile::TempDir,
}

impl Scene {
    fn new() -> Self {
        let around = tempfile::tempdir().unwrap();
        for name in ["fs", "spore", "outside"] {
            fs::create_dir(around.path().join(name)).unwrap();
        }
        fs::write(around.path().join("outside/file"), "untouched").unwrap();
        Self { around }
    }

    fn at(&self, name: &str) -> PathBuf {
        self.around.path().join("fs").join(name)
    }

    fn apply(&self, archive: &[u8]) -> Result<u64, ApplyError> {
        let root: OwnedFd = File::open(self.at("")).unwrap().into();
        apply(&root, archive, LIMITS)
    }

    fn layer(&self) -> Layer {
        Layer::new(&self.at(""), &self.beside(""))
    }

    fn settled(&self) -> Ground {
        settle(&self.at(""), &self.beside("")).unwrap()
    }

    fn beside(&self, name: &str) -> PathBuf {
        self.around.path().join("spore").join(name)
    }

    /// Nothing of an export is left but the disk.
    fn is_clean(&self) -> bool {
        fs::read_dir(self.beside("")).unwrap().all(|entry| entry.unwrap().file_name() == writable::DISK)
    }

    /// As an export that succeeds does it.
    fn export(&self, archive: Vec<u8>) {
        fs::write(self.beside(writable::DISK), "the guest's").unwrap();
        self.layer().begin().unwrap();
        self.apply(&archive).unwrap();
        self.layer().complete().unwrap();
    }
}

fn xattr(path: &Path, name: &str) -> Option<Vec<u8>> {
    let mut value = vec![0; 256];
    let length = rustix::fs::lgetxattr(path, name, &mut value[..]).ok()?;
    value.truncate(length);
    Some(value)
}

fn is_whiteout(path: &Path) -> bool {
    let metadata = fs::symlink_metadata(path).unwrap();
    metadata.file_type().is_char_device() && metadata.rdev() == 0
}

fn text(path: &Path) -> String {
    fs::read_to_string(path).unwrap()
}

#[test]
fn every_kind_of_change_arrives_with_all_that_belongs_to_it() {
    let scene = Scene::new();
    let colour = (&*format!("{XATTR}user.colour"), "green\n=1");
    let opaque = (&*format!("{XATTR}{OPAQUE}"), "y");
    let archive = Tar::default()
        .dir(".")
        .entry(EntryType::Directory, "dir", &[colour], b"")
        .file("dir/file", b"data")
        .entry(EntryType::Fifo, "fifo", &[], b"")
        .entry(EntryType::Char, "gone", &[], b"")
        .entry(EntryType::Link, "hard", &[(LINK, "dir/file")], b"")
        .entry(EntryType::Directory, "opaque", &[opaque], b"")
        .entry(EntryType::Regular, "sparse", &[(SPARSE_SIZE, "1073741824"), (SPARSE_MAP, "4096,4")], b"hole")
        .entry(EntryType::Symlink, "symbolic", &[(LINK, "/etc/passwd")], b"")
        .end();
    assert_eq!(scene.apply(&archive).unwrap(), 0);
    let file = fs::metadata(scene.at("dir/file")).unwrap();
    assert_eq!((file.mode() & 0o7777, file.uid(), file.gid(), file.nlink()), (0o4640, 7, 8, 2));
    assert_eq!((file.mtime(), file.mtime_nsec()), (1000, 7));
    assert_eq!(text(&scene.at("hard")), "data");
    let dir = fs::metadata(scene.at("dir")).unwrap();
    assert_eq!((dir.mode() & 0o7777, dir.mtime()), (0o751, 1000), "its time is set when it is full");
    assert_eq!(xattr(&scene.at("dir"), "user.colour").as_deref(), Some(b"green\n=1".as_slice()));
    assert!(is_whiteout(&scene.at("gone")));
    assert!(fs::symlink_metadata(scene.at("fifo")).unwrap().file_type().is_fifo());
    assert_eq!(xattr(&scene.at("opaque"), OPAQUE).as_deref(), Some(b"y".as_slice()));
    let sparse = fs::metadata(scene.at("sparse")).unwrap();
    assert!(sparse.len() == 1 << 30 && sparse.blocks() < 1024, "{} blocks", sparse.blocks());
    let link = fs::symlink_metadata(scene.at("symbolic")).unwrap();
    assert_eq!(
        (fs::read_link(scene.at("symbolic")).unwrap().as_path(), link.uid()),
        (Path::new("/etc/passwd"), 7)
    );
}

#[test]
fn changes_come_over_what_was_there_as_overlayfs_has_it() {
    let scene = Scene::new();
    for name in ["merged", "opaque", "replaced", "now-a-file"] {
        fs::create_dir(scene.at(name)).unwrap();
        fs::write(scene.at(name).join("old"), "old").unwrap();
    }
    fs::write(scene.at("deleted"), "old").unwrap();
    fs::write(scene.at("was-a-file"), "old").unwrap();
    let archive = Tar::default()
        .dir(".")
        .entry(EntryType::Char, "deleted", &[], b"")
        .dir("merged")
        .file("merged/new", b"new")
        .file("now-a-file", b"new")
        .entry(EntryType::Directory, "opaque", &[(&format!("{XATTR}{OPAQUE}"), "y")], b"")
        .entry(EntryType::Char, "replaced", &[], b"")
        .dir("was-a-file")
        .end();
    scene.apply(&archive).unwrap();
    assert_eq!((text(&scene.at("merged/old")), text(&scene.at("merged/new"))), ("old".into(), "new".into()));
    assert_eq!(text(&scene.at("now-a-file")), "new");
    assert!(!scene.at("opaque/old").exists());
    assert!(is_whiteout(&scene.at("deleted")) && is_whiteout(&scene.at("replaced")));
    assert!(xattr(&scene.at("was-a-file"), OPAQUE).is_some(), "what the file hid does not come back");
    assert!(xattr(&scene.at("merged"), OPAQUE).is_none());
}

#[test]
fn a_hostile_archive_is_refused_and_nothing_outside_is_touched() {
    let link = |target: &'static str| [(LINK, target)];
    let root = || Tar::default().dir(".");
    let device = {
        let mut header = Header::new_ustar();
        header.set_entry_type(EntryType::Char);
        header.set_device_major(1).unwrap();
        header.set_device_minor(3).unwrap();
        header.set_size(0);
        root().records(EntryType::XHeader, &[(PATH, "null")]).block(&mut header, b"").end()
    };
    let cases: Vec<(&str, Vec<u8>)> = vec![
        ("leaves", root().file("../outside/file", b"x").end()),
        ("leaves", root().file("/outside/file", b"x").end()),
        ("leaves", root().dir("a").file("a/../../outside/file", b"x").end()),
        ("leaves", root().file("a//b", b"x").end()),
        ("leaves", root().file(&"n".repeat(256), b"x").end()),
        ("too long", root().file(&"n/".repeat(2048), b"x").end()),
        ("too long", root().file("a\0b", b"x").end()),
        (
            "open its directory",
            root().entry(EntryType::Symlink, "a", &link("../outside"), b"").file("a/file", b"x").end(),
        ),
        (
            "open its directory",
            root()
                .entry(EntryType::Symlink, "a", &link("../outside"), b"")
                .entry(EntryType::Link, "b", &link("a/file"), b"")
                .end(),
        ),
        ("leaves", root().entry(EntryType::Link, "b", &link("../outside/file"), b"").end()),
        ("does not come before", root().entry(EntryType::Link, "b", &link("c"), b"").end()),
        ("out of order", root().file("a", b"1").file("a", b"2").end()),
        ("out of order", root().file("b", b"1").file("a", b"2").end()),
        ("out of order", root().dir("b").file("b/x", b"1").dir("b").end()),
        ("a device node", device),
        (
            "not exported",
            root()
                .entry(EntryType::Regular, "a", &[("SCHILY.xattr.trusted.overlay.redirect", "/x")], b"")
                .end(),
        ),
        (
            "not exported",
            root().entry(EntryType::Regular, "a", &[("SCHILY.xattr.security.selinux", "x")], b"").end(),
        ),
        (
            "holes do not fit",
            root().entry(EntryType::Regular, "a", &[(SPARSE_SIZE, "8"), (SPARSE_MAP, "6,4")], b"1234").end(),
        ),
        (
            "holes do not fit",
            root()
                .entry(EntryType::Regular, "a", &[(SPARSE_SIZE, "8"), (SPARSE_MAP, "4,2,2,2")], b"1234")
                .end(),
        ),
        (
            "holes do not fit",
            root()
                .entry(
                    EntryType::Regular,
                    "a",
                    &[(SPARSE_SIZE, "8"), (SPARSE_MAP, "0,18446744073709551615,1,5")],
                    b"1234",
                )
                .end(),
        ),
        (
            "beyond any file system",
            root()
                .entry(EntryType::Regular, "a", &[(SPARSE_SIZE, "99999999999999"), (SPARSE_MAP, "")], b"")
                .end(),
        ),
        ("data of what is not", root().entry(EntryType::Fifo, "a", &[], b"x").end()),
        ("as something else", Tar::default().file(".", b"x").end()),
        ("more than 1048576 bytes", root().file("a", &vec![0; (1 << 20) + 1]).end()),
        (
            "more than 100 entries",
            (100..201).fold(Tar::default(), |tar, n| tar.file(&n.to_string(), b"")).end(),
        ),
        ("without records", {
            let mut header = Header::new_ustar();
            header.set_size(0);
            root().block(&mut header, b"").end()
        }),
        ("checksum", vec![0; 10 * BLOCK]),
        ("ended early", root().file("a", b"x").0),
        ("ended early", root().file("a", &[0; 4096]).0[..3072].to_vec()),
        ("ended early", Vec::new()),
        (
            "cannot read them: a: Input/output error",
            root().records(EntryType::XGlobalHeader, &[(FAILED, "a: Input/\x1boutput error")]).0,
        ),
        ("no end", root().records(EntryType::XGlobalHeader, &[("comment", "x")]).0),
    ];
    for (needle, archive) in cases {
        let scene = Scene::new();
        let message = scene.apply(&archive).unwrap_err().to_string();
        assert!(message.contains(needle), "{needle}: {message}");
        let outside = scene.around.path().join("outside");
        assert_eq!(text(&outside.join("file")), "untouched", "{needle}");
        assert_eq!(fs::metadata(outside.join("file")).unwrap().nlink(), 1, "{needle}");
        assert_eq!(fs::read_dir(&outside).unwrap().count(), 1, "{needle}");
    }
}

#[test]
fn any_bytes_give_an_error_and_no_panic() {
    let good = Tar::default()
        .dir(".")
        .entry(EntryType::Regular, "sparse", &[(SPARSE_SIZE, "9000"), (SPARSE_MAP, "4096,4")], b"hole")
        .entry(EntryType::Symlink, "z", &[(LINK, "x")], b"")
        .end();
    let scene = Scene::new();
    for at in 0..good.len() {
        for value in [0, b'9', 0xff] {
            let mut bad = good.clone();
            bad[at] = value;
            let _ = scene.apply(&bad);
            scene.layer().clear().unwrap();
        }
    }
    assert_eq!(fs::read_dir(scene.around.path()).unwrap().count(), 3, "nothing beside the directory");
}

#[test]
fn an_export_shows_until_it_is_taken_back_and_is_replaced_by_the_next() {
    let scene = Scene::new();
    scene.export(Tar::default().dir(".").file("a", b"1").file("b", b"1").end());
    let nothing = scene.beside(BASE);
    assert_eq!(scene.settled(), Ground::Directory(nothing.clone()), "the guest's disk has it");
    assert_eq!(fs::read_dir(nothing).unwrap().count(), 0);
    scene.export(Tar::default().dir(".").file("a", b"2").end());
    assert_eq!((text(&scene.at("a")), scene.at("b").exists()), ("2".into(), false));
    scene.layer().undo(None).unwrap();
    assert_eq!(fs::read_dir(scene.at("")).unwrap().count(), 0);
    assert_eq!(scene.settled(), Ground::Directory(scene.at("")));
    assert!(scene.is_clean());
}

#[test]
fn an_export_that_was_not_finished_is_taken_back_by_delete() {
    let scene = Scene::new();
    fs::write(scene.at("kept"), "kept").unwrap();
    scene.layer().begin().unwrap();
    fs::write(scene.at("part"), "half").unwrap();
    crate::rootfs::sweep_layer(scene.beside(BASE).parent().unwrap());
    assert_eq!((text(&scene.at("kept")), scene.at("part").exists()), ("kept".into(), false));
    assert!(scene.is_clean());
}

#[test]
fn what_was_there_before_is_the_guests_lower_layer_and_comes_back() {
    let scene = Scene::new();
    fs::write(scene.at("kept"), "kept").unwrap();
    fs::set_permissions(scene.at("kept"), fs::Permissions::from_mode(0o604)).unwrap();
    fs::write(scene.at("changed"), "old").unwrap();
    scene.export(
        Tar::default().dir(".").file("changed", b"new").entry(EntryType::Char, "kept", &[], b"").end(),
    );
    assert!(is_whiteout(&scene.at("kept")));
    let base = scene.beside(BASE);
    assert_eq!(scene.settled(), Ground::Directory(base.clone()));
    assert_eq!((text(&base.join("kept")), text(&base.join("changed"))), ("kept".into(), "old".into()));
    scene.layer().undo(None).unwrap();
    assert_eq!((text(&scene.at("kept")), text(&scene.at("changed"))), ("kept".into(), "old".into()));
    assert_eq!(fs::metadata(scene.at("kept")).unwrap().mode() & 0o777, 0o604);
    assert!(!base.exists());
}

#[test]
fn a_kill_in_the_middle_leaves_no_half_export_to_the_next_start() {
    let scene = Scene::new();
    fs::write(scene.at("own"), "own").unwrap();
    // While what was there is put aside.
    copy(&scene.at(""), &scene.beside(BASE_UNFINISHED)).unwrap();
    assert_eq!(scene.settled(), Ground::Directory(scene.at("")));
    // While the archive is applied.
    scene.layer().begin().unwrap();
    let half = Tar::default().dir(".").file("half", b"x").file("own", b"x").0;
    assert!(scene.apply(&half).is_err());
    assert_eq!(scene.settled(), Ground::Directory(scene.at("")));
    assert_eq!((text(&scene.at("own")), scene.at("half").exists()), ("own".into(), false));
    // While a complete one is taken back.
    scene.export(Tar::default().dir(".").file("new", b"x").end());
    assert!(scene.layer().outdate().unwrap());
    scene.layer().clear().unwrap();
    assert_eq!(scene.settled(), Ground::Directory(scene.at("")));
    assert_eq!((text(&scene.at("own")), scene.at("new").exists()), ("own".into(), false));
}

#[test]
fn what_a_client_changes_in_an_export_counts_over_a_new_disk() {
    let scene = Scene::new();
    let disk = scene.beside(writable::DISK);
    scene.export(Tar::default().dir(".").file("a", b"guest").file("b", b"guest").end());
    fs::write(scene.at("a"), "client").unwrap();
    assert_eq!(scene.settled(), Ground::Directory(scene.at("")));
    assert_eq!((text(&scene.at("a")), text(&scene.at("b"))), ("client".into(), "guest".into()));
    assert!(!disk.exists(), "all of it is in the directory now");
    assert_eq!(scene.layer().marker().unwrap(), None);
    // Not while a machine uses it.
    scene.export(Tar::default().dir(".").file("a", b"guest").end());
    fs::write(scene.at("a"), "client").unwrap();
    let used = File::open(&disk).unwrap();
    used.lock().unwrap();
    let refused = settle(&scene.at(""), &scene.beside("")).unwrap_err();
    assert!(matches!(refused, RootfsError::InUse { .. }), "{refused}");
    assert!(disk.exists());
}

#[test]
fn who_looks_through_a_mounted_overlay_does_not_change_an_export() {
    let scene = Scene::new();
    scene.export(Tar::default().dir(".").dir("etc").file("etc/a", b"1").end());
    // As the kernel notes at the mount, and when it first finds a directory in two layers.
    for (directory, name) in [("", "uuid"), ("", "impure"), ("etc", "origin")] {
        let flags = rustix::fs::XattrFlags::empty();
        rustix::fs::setxattr(scene.at(directory), format!("trusted.overlay.{name}"), b"y", flags).unwrap();
    }
    assert_eq!(scene.settled(), Ground::Directory(scene.beside(BASE)));
    // What a client does is seen nevertheless.
    fs::set_permissions(scene.at("etc"), fs::Permissions::from_mode(0o700)).unwrap();
    assert_eq!(scene.settled(), Ground::Directory(scene.at("")));
}

#[test]
fn an_export_that_is_out_of_date_is_never_believed() {
    let scene = Scene::new();
    scene.export(Tar::default().dir(".").file("old", b"1").end());
    assert!(scene.layer().outdate().unwrap());
    assert!(scene.layer().outdate().unwrap(), "again");
    // As if it had been changed by a client, too.
    fs::write(scene.at("old"), "2").unwrap();
    assert_eq!(scene.settled(), Ground::Directory(scene.at("")));
    assert!(!scene.at("old").exists() && scene.beside(writable::DISK).exists() && scene.is_clean());
    assert!(!scene.layer().outdate().unwrap(), "there is none");
}

#[test]
fn without_its_disk_an_export_is_all_there_is() {
    let scene = Scene::new();
    scene.export(Tar::default().dir(".").file("a", b"1").end());
    fs::remove_file(scene.beside(writable::DISK)).unwrap();
    assert_eq!(scene.settled(), Ground::Directory(scene.at("")));
    assert_eq!(text(&scene.at("a")), "1");
}

#[test]
fn a_disk_that_is_put_back_costs_no_client_its_changes() {
    let scene = Scene::new();
    let settled = || settle_restored(&scene.at(""), &scene.beside(""));
    settled().unwrap();
    scene.export(Tar::default().dir(".").file("a", b"guest").end());
    settled().unwrap();
    assert_eq!(text(&scene.at("a")), "guest", "it stays for clients");
    fs::write(scene.at("a"), "client").unwrap();
    let refused = settled().unwrap_err();
    assert!(matches!(refused, RootfsError::Changed { .. }), "{refused}");
    assert!(text(&scene.at("a")) == "client" && scene.beside(writable::DISK).exists());
    // What is out of date is nobody's.
    scene.layer().outdate().unwrap();
    settled().unwrap();
    assert!(!scene.at("a").exists() && scene.is_clean());
}

#[test]
fn the_marker_of_another_version_is_refused_and_nothing_is_touched() {
    let scene = Scene::new();
    scene.export(Tar::default().dir(".").file("a", b"1").end());
    let marker = scene.beside("changes.json");
    for other in [&b"{\"version\":2,\"state\":\"complete\"}"[..], b"{\"state\":\"failed\"}", b""] {
        fs::write(&marker, other).unwrap();
        let refused = settle(&scene.at(""), &scene.beside("")).unwrap_err().to_string();
        assert!(refused.contains("changes.json") && refused.contains("version"), "{refused}");
    }
    assert_eq!((text(&scene.at("a")), scene.beside(BASE).exists()), ("1".into(), true));
}

#[test]
fn the_directory_itself_gets_its_mode_and_owner_back() {
    let scene = Scene::new();
    let about = || {
        let metadata = fs::metadata(scene.at("")).unwrap();
        (metadata.mode() & 0o7777, metadata.uid(), metadata.gid())
    };
    std::os::unix::fs::chown(scene.at(""), Some(3), Some(4)).unwrap();
    fs::set_permissions(scene.at(""), fs::Permissions::from_mode(0o705)).unwrap();
    let before = about();
    scene.export(Tar::default().dir(".").end());
    assert_ne!(about(), before, "the guest's");
    scene.layer().undo(None).unwrap();
    assert_eq!(about(), before);
}

#[test]
fn a_tree_of_any_depth_is_removed() {
    let scene = Scene::new();
    let mut at: OwnedFd = File::open(scene.at("")).unwrap().into();
    // Deeper than there are descriptors, and than a path is long.
    for _ in 0..5000 {
        for name in ["d", ".spore-moved-1"] {
            rustix::fs::mkdirat(&at, name, rustix::fs::Mode::RWXU).unwrap();
        }
        let flags = rustix::fs::OFlags::DIRECTORY | rustix::fs::OFlags::CLOEXEC;
        at = rustix::fs::openat(&at, "d", flags, rustix::fs::Mode::empty()).unwrap();
    }
    scene.layer().clear().unwrap();
    assert_eq!(fs::read_dir(scene.at("")).unwrap().count(), 0);
}

#[test]
fn a_failure_is_noted_and_forgotten_with_the_next_start() {
    let scene = Scene::new();
    scene.layer().begin().unwrap();
    let _ = scene.apply(&Tar::default().dir(".").file("half", b"x").0);
    scene.layer().undo(Some("the guest stalled".into())).unwrap();
    assert_eq!(fs::read_dir(scene.at("")).unwrap().count(), 0);
    let marker = scene.layer().marker().unwrap();
    assert_eq!(marker, Some(Marker::Failed { reason: "the guest stalled".into() }));
    assert_eq!(scene.settled(), Ground::Directory(scene.at("")));
    assert_eq!(scene.layer().marker().unwrap(), None);
}
