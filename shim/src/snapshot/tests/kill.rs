//! `kill -9` at every step of what changes a store. The child is this test binary again, with one test of its own
//! that does the work and ends itself where it is told to.

use std::io::{BufRead, Write};
use std::process::{Command, Stdio};
use std::sync::Mutex;

use super::*;

/// What the child does: an operation, and the step at which it dies.
static DIES_AT: Mutex<Option<String>> = Mutex::new(None);

fn die_at_step(step: &str) {
    if DIES_AT.lock().unwrap().as_deref() == Some(step) {
        nix::sys::signal::kill(nix::unistd::Pid::this(), nix::sys::signal::Signal::SIGKILL).unwrap();
    }
}

/// Runs as a child only, told what to do on its standard input.
#[test]
#[ignore = "the other tests' child"]
fn child() {
    let mut lines = std::io::stdin().lock().lines().map_while(Result::ok);
    let [dir, work, step] = [(); 3].map(|()| lines.next().unwrap());
    *DIES_AT.lock().unwrap() = Some(step);
    let mut store = Store::new(std::path::Path::new(&dir));
    store.on_step = die_at_step;
    let disk = File::open(format!("{dir}/disk")).unwrap();
    match work.split_once(' ').unwrap_or((&work, "")) {
        ("make", _) => drop(make(&store, "killed", &disk).unwrap()),
        ("remove", id) => store.remove(id.parse().unwrap()).unwrap(),
        ("import", file) => {
            import_tar(&store, &mut File::open(file).unwrap(), &Policy::default()).unwrap();
        }
        other => panic!("{other:?}"),
    }
}

/// Whether the child was killed, rather than done.
fn run_child(place: &Place, work: &str, step: &str) -> bool {
    use std::os::unix::process::ExitStatusExt;
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "snapshot::tests::kill::child", "--ignored", "--nocapture"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let text = format!("{}\n{work}\n{step}\n", place.dir.path().display());
    child.stdin.take().unwrap().write_all(text.as_bytes()).unwrap();
    let status = child.wait().unwrap();
    assert!(status.success() || status.signal() == Some(9), "{work} until {step}: {status}");
    !status.success()
}

const MAKING: [&str; 8] = [
    "begun",
    "state written",
    "layer made",
    "layer linked",
    "layers durable",
    "manifest written",
    "directory durable",
    "published",
];

#[test]
fn a_snapshot_whose_maker_is_killed_is_there_whole_or_not_at_all() {
    let place = Place::new();
    place.disk_file("disk", 5);
    for step in MAKING {
        assert!(run_child(&place, "make", step), "there is no step {step:?}");
        let listing = place.store.list().unwrap();
        assert!(listing.broken.is_empty(), "{step}: {:?}", listing.broken);
        let expected = usize::from(step == "published");
        assert_eq!(listing.entries.len(), expected, "{step}");
        for entry in listing.entries {
            place.store.open(entry.manifest.id).unwrap().verify().unwrap();
        }
        // The next one that makes a snapshot takes the rest away.
        drop(place.store.begin().unwrap());
        assert_eq!(place.names().len(), expected, "{step}: {:?}", place.names());
    }
}

#[test]
fn a_snapshot_whose_remover_is_killed_is_gone_and_others_are_whole() {
    let place = Place::new();
    let disk = place.disk_file("disk", 5);
    for step in ["renamed away", "durably gone"] {
        let first = make(&place.store, "a", &disk).unwrap();
        let second = make_above(&place.store, first.id);
        assert!(run_child(&place, &format!("remove {}", first.id), step));
        assert!(matches!(place.store.open(first.id), Err(StoreError::NoSuch { .. })));
        place.store.open(second.id).unwrap().verify().unwrap();
        place.store.sweep();
        assert_eq!(place.names(), [second.id.to_string()]);
        place.store.remove(second.id).unwrap();
    }
}

#[test]
fn an_import_that_is_killed_leaves_nothing_and_works_again() {
    let place = Place::new();
    let disk = place.disk_file("disk", 5);
    let made = make(&place.store, "a", &disk).unwrap();
    let file = place.path("export.tar");
    export_tar(&place.store.open(made.id).unwrap(), &mut File::create(&file).unwrap()).unwrap();
    place.store.remove(made.id).unwrap();
    let work = format!("import {}", file.display());
    for step in ["begun", "manifest written", "directory durable"] {
        assert!(run_child(&place, &work, step));
        assert!(place.store.list().unwrap().entries.is_empty());
    }
    assert!(!run_child(&place, &work, "never"));
    assert_eq!(place.names(), [made.id.to_string()]);
}
