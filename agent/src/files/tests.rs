//! File operations on real directories that stand for a container's root.

use std::fs::{self, File};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use spore_agent_api::files::{MAX_CHUNK, MAX_ENTRIES, MAX_PATH};
use spore_agent_api::v1::files::attributes::Kind;

use super::attributes::{Changes, change, stat};
use super::content::{Create, Write, read, write};
use super::list::list;
use super::root::Root;
use super::tree::{Removed, link, make_directory, remove, rename};
use crate::error::AgentError;

/// A root directory, and what lies outside of it.
struct Bed {
    home: tempfile::TempDir,
    root: Root,
}

impl Bed {
    fn new() -> Self {
        let home = tempfile::tempdir().unwrap();
        for name in ["root", "outside"] {
            fs::create_dir(home.path().join(name)).unwrap();
        }
        fs::write(home.path().join("outside/secret"), b"the guest's own").unwrap();
        let root = Root::at(File::open(home.path().join("root")).unwrap().into(), "container \"c\"");
        Self { home, root }
    }

    fn at(&self, path: &str) -> PathBuf {
        self.home.path().join("root").join(path.trim_start_matches('/'))
    }

    fn outside(&self) -> PathBuf {
        self.home.path().join("outside")
    }
}

fn new_file(path: &str, data: &[u8]) -> Write {
    Write {
        path: path.into(),
        offset: 0,
        data: data.into(),
        create: Create::Always,
        mode: 0o640,
        owner: (0, 0),
        size: None,
    }
}

fn names(bed: &Bed, path: &str, after: &str, limit: u32) -> (Vec<String>, bool) {
    let (entries, more) = list(&bed.root, path.as_bytes(), after.as_bytes(), limit).unwrap();
    (entries.into_iter().map(|entry| String::from_utf8(entry.name).unwrap()).collect(), more)
}

#[test]
fn links_lead_nowhere_out_of_the_root() {
    let bed = Bed::new();
    symlink(bed.outside(), bed.at("absolute")).unwrap();
    symlink("../outside", bed.at("relative")).unwrap();
    symlink("../../../../../../../../etc", bed.at("far")).unwrap();
    fs::create_dir(bed.at("etc")).unwrap();
    fs::write(bed.at("etc/inside"), b"the container's").unwrap();
    for link in ["absolute", "relative"] {
        let path = format!("/{link}/secret");
        assert!(matches!(read(&bed.root, path.as_bytes(), 0, 10, false), Err(AgentError::NotFound(_))));
        let refused = write(&bed.root, &new_file(&format!("/{link}/new"), b"x"));
        assert!(matches!(refused, Err(AgentError::NotFound(_))), "{refused:?}");
        assert!(remove(&bed.root, path.as_bytes(), true).is_err());
    }
    assert_eq!(read(&bed.root, b"/far/inside", 0, 100, false).unwrap().data, b"the container's");
    assert_eq!(read(&bed.root, b"/../../etc/inside", 0, 100, false).unwrap().data, b"the container's");
    // The kernel's own links of processes are not followed.
    fs::create_dir(bed.at("proc")).unwrap();
    symlink("/proc/self/root/etc/passwd", bed.at("magic")).unwrap();
    assert!(read(&bed.root, b"/magic", 0, 10, false).is_err());
    assert_eq!(fs::read_dir(bed.outside()).unwrap().count(), 1);
}

#[test]
fn a_path_is_checked_before_it_is_used_and_named_in_errors() {
    let bed = Bed::new();
    let long = [b"/".as_slice(), &[b'x'; MAX_PATH]].concat();
    for bad in [&b""[..], b"relative", b"/a\0b", &long] {
        assert!(matches!(stat(&bed.root, bad, true), Err(AgentError::InvalidArgument(_))), "{}", bad.len());
    }
    for no_entry in ["/", "//", "/a/..", "/."] {
        let refused = remove(&bed.root, no_entry.as_bytes(), true);
        assert!(matches!(refused, Err(AgentError::InvalidArgument(_))), "{no_entry}: {refused:?}");
    }
    let error = read(&bed.root, b"/no\x1bthing", 0, 1, false).unwrap_err().to_string();
    assert_eq!(error, "container \"c\": read \"/no\\x1bthing\": No such file or directory");
}

#[test]
fn only_regular_files_are_opened() {
    let bed = Bed::new();
    nix::unistd::mkfifo(&bed.at("fifo"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    let _socket = std::os::unix::net::UnixListener::bind(bed.at("socket")).unwrap();
    fs::create_dir(bed.at("dir")).unwrap();
    for (path, kind) in [("/fifo", Kind::FIFO), ("/socket", Kind::SOCKET), ("/dir", Kind::DIRECTORY)] {
        // None of these may wait for somebody.
        let refused = read(&bed.root, path.as_bytes(), 0, 1, false);
        assert!(matches!(refused, Err(AgentError::FailedPrecondition(_))), "{path}: {refused:?}");
        let refused = write(&bed.root, &Write { create: Create::IfMissing, ..new_file(path, b"x") });
        assert!(matches!(refused, Err(AgentError::FailedPrecondition(_))), "{path}: {refused:?}");
        assert_eq!(stat(&bed.root, path.as_bytes(), false).unwrap().0.kind.unwrap(), kind);
    }
}

#[test]
fn a_file_is_written_and_read_in_pieces() {
    let bed = Bed::new();
    let made = write(&bed.root, &new_file("/f", b"hello world")).unwrap();
    let again = write(&bed.root, &new_file("/f", b"x")).unwrap_err();
    assert!(matches!(again, AgentError::AlreadyExists(_)), "{again}");
    let change = Write { offset: 6, create: Create::Never, ..new_file("/f", b"spore") };
    assert_eq!(write(&bed.root, &change).unwrap(), made);
    assert_eq!(fs::read(bed.at("f")).unwrap(), b"hello spore");
    assert_eq!(fs::metadata(bed.at("f")).unwrap().permissions().mode() & 0o7777, 0o640);
    let piece = read(&bed.root, b"/f", 6, 3, false).unwrap();
    assert_eq!((piece.data.as_slice(), piece.end, piece.identity), (&b"spo"[..], false, made));
    let piece = read(&bed.root, b"/f", 6, 100, false).unwrap();
    assert_eq!((piece.data.as_slice(), piece.end), (&b"spore"[..], true));
    assert_eq!(read(&bed.root, b"/f", 1 << 40, 1, false).unwrap().data, b"");
    let cut = Write { data: Vec::new(), size: Some(5), create: Create::Never, ..new_file("/f", b"") };
    write(&bed.root, &cut).unwrap();
    assert_eq!(fs::read(bed.at("f")).unwrap(), b"hello");
    assert!(matches!(write(&bed.root, &Write { path: b"/g".into(), ..cut }), Err(AgentError::NotFound(_))));
}

#[test]
fn lengths_and_offsets_beyond_the_caps_are_refused() {
    let bed = Bed::new();
    fs::write(bed.at("f"), b"x").unwrap();
    let too_long = u32::try_from(MAX_CHUNK + 1).unwrap();
    for length in [0, too_long, u32::MAX] {
        let refused = read(&bed.root, b"/f", 0, length, false);
        assert!(matches!(refused, Err(AgentError::InvalidArgument(_))), "{refused:?}");
    }
    // Offsets that no file can have are the end.
    for offset in [1 << 63, u64::MAX] {
        assert!(read(&bed.root, b"/f", offset, 1, true).is_ok_and(|piece| piece.end));
        assert!(read(&bed.root, b"/f", offset, 1, false).map_or(true, |piece| piece.data.is_empty()));
    }
    let base = || Write { create: Create::Never, ..new_file("/f", b"x") };
    for bad in [
        Write { data: vec![0; MAX_CHUNK + 1], ..base() },
        Write { offset: u64::MAX, ..base() },
        Write { offset: i64::MAX.unsigned_abs(), ..base() },
        Write { size: Some(1 << 63), ..base() },
        Write { mode: 0o10000, ..base() },
    ] {
        assert!(matches!(write(&bed.root, &bad), Err(AgentError::InvalidArgument(_))));
    }
    let too_many = u32::try_from(MAX_ENTRIES + 1).unwrap();
    assert!(matches!(list(&bed.root, b"/", b"", too_many), Err(AgentError::InvalidArgument(_))));
}

#[test]
fn holes_are_skipped_and_made() {
    let bed = Bed::new();
    let (data, size) = (8 << 20, 64 << 20);
    write(&bed.root, &new_file("/sparse", b"first")).unwrap();
    let tail =
        Write { offset: data, size: Some(size), create: Create::Never, ..new_file("/sparse", b"last") };
    write(&bed.root, &tail).unwrap();
    let metadata = fs::metadata(bed.at("sparse")).unwrap();
    assert!(metadata.len() == size && metadata.blocks() * 512 < 1 << 20, "{metadata:?}");
    let (attributes, _) = stat(&bed.root, b"/sparse", false).unwrap();
    assert_eq!((attributes.size, attributes.allocated), (size, metadata.blocks() * 512));

    let (mut at, mut seen, mut pieces) = (0, Vec::new(), 0);
    loop {
        let piece = read(&bed.root, b"/sparse", at, 1 << 20, true).unwrap();
        assert!(piece.offset >= at);
        at = piece.offset + piece.data.len() as u64;
        if !piece.data.is_empty() {
            seen.push(piece.offset);
        }
        pieces += 1;
        if piece.end {
            break;
        }
    }
    assert_eq!(at, size);
    assert!(seen[0] == 0 && seen.contains(&data) && pieces < 8, "{seen:?}");
    let whole = File::open(bed.at("sparse")).unwrap();
    let mut last = [0; 4];
    whole.read_exact_at(&mut last, data).unwrap();
    assert_eq!(&last, b"last");
}

#[test]
fn a_directory_is_listed_in_order_and_in_pages() {
    let bed = Bed::new();
    for name in ["b", "a", "d", "c", ".hidden"] {
        fs::write(bed.at(name), name).unwrap();
    }
    symlink("nowhere", bed.at("e")).unwrap();
    let strings = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>();
    assert_eq!(names(&bed, "/", "", 0), (strings(&[".hidden", "a", "b", "c", "d", "e"]), false));
    assert_eq!(names(&bed, "/", "", 2), (strings(&[".hidden", "a"]), true));
    assert_eq!(names(&bed, "/", "a", 2), (strings(&["b", "c"]), true));
    assert_eq!(names(&bed, "/", "c", 2), (strings(&["d", "e"]), false));
    assert_eq!(names(&bed, "/", "zz", 2), (Vec::new(), false));
    let (entries, _) = list(&bed.root, b"/", b"d", 0).unwrap();
    assert_eq!(entries[0].attributes.kind.unwrap(), Kind::SYMLINK);
    assert!(matches!(list(&bed.root, b"/a", b"", 0), Err(AgentError::FailedPrecondition(_))));
    let odd = std::ffi::OsStr::from_bytes(b"\xff\n");
    fs::write(bed.at("").join(odd), b"").unwrap();
    assert_eq!(list(&bed.root, b"/", b"zz", 0).unwrap().0[0].name, b"\xff\n");
}

#[test]
fn attributes_are_told_and_changed() {
    let bed = Bed::new();
    write(&bed.root, &new_file("/f", b"x")).unwrap();
    link(&bed.root, b"/l", b"f").unwrap();
    let (found, target) = stat(&bed.root, b"/l", false).unwrap();
    assert_eq!((found.kind.unwrap(), target.as_slice()), (Kind::SYMLINK, &b"f"[..]));
    let (found, target) = stat(&bed.root, b"/l", true).unwrap();
    assert_eq!((found.kind.unwrap(), found.size, target.len()), (Kind::FILE, 1, 0));
    // Before the epoch too.
    let (accessed, modified) = (1_500_000_000_123_456_789, -1);
    let times = Some((accessed, modified));
    let changes = Changes { mode: Some(0o4711), times, ..Changes::default() };
    change(&bed.root, b"/l", true, changes).unwrap();
    let (found, _) = stat(&bed.root, b"/f", false).unwrap();
    assert_eq!((found.mode, found.accessed_ns, found.modified_ns), (0o4711, accessed, modified));
    // The link's own times; it has no mode.
    change(&bed.root, b"/l", false, Changes { times: Some((7, 8)), ..Changes::default() }).unwrap();
    assert_eq!(stat(&bed.root, b"/l", false).unwrap().0.modified_ns, 8);
    assert_eq!(stat(&bed.root, b"/f", false).unwrap().0.modified_ns, -1);
    assert!(change(&bed.root, b"/l", false, Changes { mode: Some(0o600), ..Changes::default() }).is_err());
    let bad = change(&bed.root, b"/f", false, Changes { mode: Some(0o17777), ..Changes::default() });
    assert!(matches!(bad, Err(AgentError::InvalidArgument(_))));
    if nix::unistd::Uid::effective().is_root() {
        change(&bed.root, b"/f", false, Changes { owner: Some((1234, 4321)), ..Changes::default() }).unwrap();
        change(&bed.root, b"/l", false, Changes { owner: Some((5, 6)), ..Changes::default() }).unwrap();
        let owner = |path: &[u8]| stat(&bed.root, path, false).map(|(found, _)| (found.uid, found.gid));
        assert_eq!((owner(b"/f").unwrap(), owner(b"/l").unwrap()), ((1234, 4321), (5, 6)));
    }
}

#[test]
fn directories_are_made_with_their_parents() {
    let bed = Bed::new();
    assert!(matches!(make_directory(&bed.root, b"/a/b/c", 0o700, false), Err(AgentError::NotFound(_))));
    assert!(make_directory(&bed.root, b"/a/b/c/", 0o1777, true).unwrap());
    assert!(!make_directory(&bed.root, b"//a/b//c", 0o700, true).unwrap());
    assert!(!make_directory(&bed.root, b"/", 0o700, true).unwrap());
    let mode = |path: &str| fs::metadata(bed.at(path)).unwrap().permissions().mode() & 0o7777;
    assert_eq!((mode("a"), mode("a/b/c")), (0o755, 0o1777));
    let again = make_directory(&bed.root, b"/a", 0o700, false);
    assert!(matches!(again, Err(AgentError::AlreadyExists(_))), "{again:?}");
    fs::write(bed.at("file"), b"").unwrap();
    let in_the_way = make_directory(&bed.root, b"/file/x", 0o700, true);
    assert!(matches!(in_the_way, Err(AgentError::FailedPrecondition(_))), "{in_the_way:?}");
    assert!(make_directory(&bed.root, b"/file", 0o700, true).is_err());
}

#[test]
fn names_are_moved_with_and_without_replacing() {
    let bed = Bed::new();
    for name in ["a", "b"] {
        fs::write(bed.at(name), name).unwrap();
    }
    let refused = rename(&bed.root, b"/a", b"/b", false).unwrap_err();
    assert!(matches!(refused, AgentError::AlreadyExists(_)), "{refused}");
    assert!(refused.to_string().contains("rename to \"/b\""), "{refused}");
    rename(&bed.root, b"/a", b"/b", true).unwrap();
    assert_eq!(fs::read(bed.at("b")).unwrap(), b"a");
    assert!(matches!(rename(&bed.root, b"/a", b"/c", true), Err(AgentError::NotFound(_))));
    // A link itself is moved.
    symlink("b", bed.at("l")).unwrap();
    rename(&bed.root, b"/l", b"/m", false).unwrap();
    assert_eq!(fs::read_link(bed.at("m")).unwrap(), Path::new("b"));
}

#[test]
fn a_tree_is_removed_and_what_its_links_point_to_is_not() {
    let bed = Bed::new();
    fs::create_dir_all(bed.at("tree/deep/deeper")).unwrap();
    fs::create_dir(bed.at("kept")).unwrap();
    fs::write(bed.at("kept/file"), b"").unwrap();
    symlink("/kept", bed.at("tree/to-kept")).unwrap();
    symlink(bed.outside(), bed.at("tree/deep/out")).unwrap();
    for name in ["tree/file", "tree/deep/deeper/file"] {
        fs::write(bed.at(name), b"").unwrap();
    }
    let refused = remove(&bed.root, b"/tree", false).unwrap_err();
    assert!(matches!(refused, AgentError::FailedPrecondition(_)), "{refused}");
    assert_eq!(remove(&bed.root, b"/tree/", true).unwrap(), Removed { count: 7, done: true });
    assert!(!bed.at("tree").exists() && bed.at("kept/file").exists());
    assert_eq!(fs::read_dir(bed.outside()).unwrap().count(), 1);
    symlink("/kept", bed.at("link")).unwrap();
    assert_eq!(remove(&bed.root, b"/link", true).unwrap(), Removed { count: 1, done: true });
    assert!(bed.at("kept").exists());
    assert!(matches!(remove(&bed.root, b"/link", true), Err(AgentError::NotFound(_))));
    assert_eq!(remove(&bed.root, b"/kept/file", false).unwrap(), Removed { count: 1, done: true });
    assert_eq!(remove(&bed.root, b"/kept", false).unwrap(), Removed { count: 1, done: true });
}

#[test]
fn a_large_tree_takes_several_calls() {
    let bed = Bed::new();
    for directory in 0..10 {
        fs::create_dir_all(bed.at(&format!("tree/{directory}"))).unwrap();
        for file in 0..500 {
            fs::write(bed.at(&format!("tree/{directory}/{file}")), b"").unwrap();
        }
    }
    let first = remove(&bed.root, b"/tree", true).unwrap();
    assert!(!first.done && first.count == 4096, "{first:?}");
    let second = remove(&bed.root, b"/tree", true).unwrap();
    assert_eq!((first.count + second.count, second.done), (5011, true));
    assert!(!bed.at("tree").exists());
}
