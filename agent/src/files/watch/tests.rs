//! What the kernel's events become, with real directories.

use std::fs::{self, File};
use std::path::PathBuf;

use super::*;

struct Watching {
    home: tempfile::TempDir,
    watches: Watches,
}

fn watch(path: &str, recursive: bool, before: &[&str]) -> Watching {
    let home = tempfile::tempdir().unwrap();
    for name in before {
        fs::create_dir_all(home.path().join(name)).unwrap();
    }
    let root = Root::at(File::open(home.path()).unwrap().into(), "container \"c\"");
    let (watches, _) = Watches::begin(root, path.as_bytes(), recursive).unwrap();
    Watching { home, watches }
}

impl Watching {
    fn at(&self, path: &str) -> PathBuf {
        self.home.path().join(path)
    }

    /// Kinds and paths of all that has happened.
    fn told(&mut self) -> Vec<(Kind, String)> {
        let mut told = Vec::new();
        while let Ok(events) = self.watches.inotify.read_events() {
            let events = self.watches.digest(events);
            told.extend(
                events.into_iter().map(|event| (event.kind.unwrap(), String::from_utf8(event.path).unwrap())),
            );
        }
        told
    }
}

fn all(events: &[(Kind, &str)]) -> Vec<(Kind, String)> {
    events.iter().map(|(kind, path)| (*kind, (*path).to_owned())).collect()
}

#[test]
fn each_change_is_told_in_order() {
    let mut bed = watch("/", false, &[]);
    fs::write(bed.at("f"), b"x").unwrap();
    fs::rename(bed.at("f"), bed.at("g")).unwrap();
    fs::remove_file(bed.at("g")).unwrap();
    let expected = all(&[
        (Kind::CREATED, "/f"),
        (Kind::MODIFIED, "/f"),
        (Kind::WRITTEN, "/f"),
        (Kind::MOVED_FROM, "/f"),
        (Kind::MOVED_TO, "/g"),
        (Kind::REMOVED, "/g"),
    ]);
    assert_eq!(bed.told(), expected);
    assert!(bed.watches.top.is_some());
}

#[test]
fn a_single_file_is_watched_until_it_is_gone() {
    let home = tempfile::tempdir().unwrap();
    fs::write(home.path().join("f"), b"x").unwrap();
    let root = Root::at(File::open(home.path()).unwrap().into(), "container \"c\"");
    let (watches, shown) = Watches::begin(root, b"/f", true).unwrap();
    assert_eq!(shown, b"/f");
    let mut bed = Watching { home, watches };
    fs::write(bed.at("f"), b"y").unwrap();
    let told = bed.told();
    assert!(told.contains(&(Kind::WRITTEN, "/f".into())), "{told:?}");
    fs::remove_file(bed.at("f")).unwrap();
    bed.told();
    assert!(bed.watches.top.is_none());
}

#[test]
fn directories_that_come_later_are_watched_with_what_is_in_them() {
    let mut bed = watch("/top/", true, &["top/old"]);
    fs::create_dir_all(bed.at("top/new/deep")).unwrap();
    fs::write(bed.at("top/new/deep/early"), b"").unwrap();
    let told = bed.told();
    for path in ["/top/new", "/top/new/deep", "/top/new/deep/early"] {
        assert!(told.contains(&(Kind::CREATED, path.into())), "{path}: {told:?}");
    }
    fs::write(bed.at("top/new/deep/late"), b"").unwrap();
    fs::write(bed.at("top/old/file"), b"").unwrap();
    let told = bed.told();
    for path in ["/top/new/deep/late", "/top/old/file"] {
        assert!(told.contains(&(Kind::CREATED, path.into())), "{path}: {told:?}");
    }
}

#[test]
fn a_moved_directory_is_followed_inside_and_forgotten_outside() {
    let mut bed = watch("/top", true, &["top/a/below", "elsewhere"]);
    fs::rename(bed.at("top/a"), bed.at("top/b")).unwrap();
    assert_eq!(bed.told(), all(&[(Kind::MOVED_FROM, "/top/a"), (Kind::MOVED_TO, "/top/b")]));
    File::create(bed.at("top/b/below/f")).unwrap();
    let told = bed.told();
    assert_eq!(told[0], (Kind::CREATED, "/top/b/below/f".into()));
    fs::rename(bed.at("top/b"), bed.at("elsewhere/b")).unwrap();
    assert_eq!(bed.told(), all(&[(Kind::MOVED_FROM, "/top/b")]));
    File::create(bed.at("elsewhere/b/below/g")).unwrap();
    File::create(bed.at("top/h")).unwrap();
    let told = bed.told();
    assert_eq!(told[0], (Kind::CREATED, "/top/h".into()), "{told:?}");
    assert_eq!(bed.watches.paths.len(), 1);
}

#[test]
fn what_is_not_there_cannot_be_watched() {
    let home = tempfile::tempdir().unwrap();
    let root = Root::at(File::open(home.path()).unwrap().into(), "container \"c\"");
    let error = Watches::begin(root, b"/nothing", false).map(|_| ()).unwrap_err();
    assert_eq!(error.to_string(), "container \"c\": watch \"/nothing\": No such file or directory");
}
