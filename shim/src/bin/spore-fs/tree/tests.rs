#![allow(clippy::unwrap_used)]
use std::ffi::CString;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::Path;

use super::*;

const EVERYBODY: Context = Context { uid: 0, gid: 0, pid: 1 };

fn context(uid: u32, gid: u32) -> Context {
    Context { uid, gid, pid: 1 }
}

fn path_descriptor(path: &Path) -> OwnedFd {
    let flags = rustix::fs::OFlags::PATH | rustix::fs::OFlags::CLOEXEC;
    rustix::fs::open(path, flags, rustix::fs::Mode::empty()).unwrap()
}

/// A tree with one export, 0.
fn serving(path: &Path) -> (Tree, u64) {
    let tree = Tree::new("/proc/self/fd");
    tree.export(0, path_descriptor(path)).unwrap();
    let root = tree.lookup(&EVERYBODY, inodes::ROOT, c"0").unwrap().inode;
    (tree, root)
}

fn name(text: &str) -> CString {
    CString::new(text).unwrap()
}

fn error<T>(result: io::Result<T>) -> i32 {
    result.err().expect("refused").raw_os_error().expect("an errno")
}

fn create(tree: &Tree, who: &Context, parent: u64, file: &str, flags: i32) -> io::Result<(u64, u64)> {
    let args = CreateIn { flags: flags.cast_unsigned(), mode: 0o100640, umask: 0, fuse_flags: 0 };
    let (entry, handle, _, _) = tree.create(who, parent, &name(file), args)?;
    Ok((entry.inode, handle.unwrap()))
}

#[test]
fn the_root_lists_exports_by_number_and_nothing_can_be_made_there() {
    let dir = tempfile::tempdir().unwrap();
    let (tree, root) = serving(dir.path());
    tree.export(7, path_descriptor(dir.path())).unwrap();
    assert_eq!(error(tree.export(7, path_descriptor(dir.path()))), libc::EEXIST);
    let (handle, _) = tree.opendir(&EVERYBODY, inodes::ROOT, 0).unwrap();
    let mut names = Vec::new();
    let mut add = |entry: DirEntry<'_>| {
        names.push(String::from_utf8(entry.name.to_vec()).unwrap());
        Ok(1)
    };
    tree.readdir(&EVERYBODY, inodes::ROOT, handle.unwrap(), 4096, 0, &mut add).unwrap();
    assert_eq!(names, ["0", "7"]);
    assert_eq!(tree.getattr(&EVERYBODY, inodes::ROOT, None).unwrap().0.st_mode & 0o777, 0o555);
    for missing in ["1", "x", "-1", "99999999999"] {
        assert_eq!(error(tree.lookup(&EVERYBODY, inodes::ROOT, &name(missing))), libc::ENOENT, "{missing}");
    }
    assert_eq!(error(tree.mkdir(&EVERYBODY, inodes::ROOT, c"x", 0o755, 0)), libc::EROFS);
    assert_eq!(error(create(&tree, &EVERYBODY, inodes::ROOT, "x", libc::O_RDWR)), libc::EROFS);
    tree.mkdir(&EVERYBODY, root, c"x", 0o755, 0).unwrap();
    assert!(dir.path().join("x").is_dir());
}

#[test]
fn a_file_can_be_an_export() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("hosts"), b"127.0.0.1 localhost\n").unwrap();
    let (tree, file) = serving(&dir.path().join("hosts"));
    assert_eq!(tree.getattr(&EVERYBODY, file, None).unwrap().0.st_size, 20);
    tree.open(&EVERYBODY, file, libc::O_RDONLY.cast_unsigned(), 0).unwrap();
    assert_eq!(error(tree.lookup(&EVERYBODY, file, c"x")), libc::ENOTDIR);
}

#[test]
fn names_cannot_leave_their_directory() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir(dir.path().join("export")).unwrap();
    std::fs::write(dir.path().join("secret"), b"").unwrap();
    symlink("../secret", dir.path().join("export/link")).unwrap();
    symlink("..", dir.path().join("export/up")).unwrap();
    let (tree, root) = serving(&dir.path().join("export"));
    for bad in ["", ".", "..", "../secret", "a/b", "/etc/passwd"] {
        let bad = name(bad);
        assert_eq!(error(tree.lookup(&EVERYBODY, root, &bad)), libc::EINVAL, "{bad:?}");
        assert_eq!(error(tree.unlink(&EVERYBODY, root, &bad)), libc::EINVAL, "{bad:?}");
        assert_eq!(error(tree.mkdir(&EVERYBODY, root, &bad, 0o700, 0)), libc::EINVAL, "{bad:?}");
        assert_eq!(error(tree.rename(&EVERYBODY, root, c"link", root, &bad, 0)), libc::EINVAL, "{bad:?}");
        assert_eq!(error(tree.symlink(&EVERYBODY, c"x", root, &bad)), libc::EINVAL, "{bad:?}");
    }
    let link = tree.lookup(&EVERYBODY, root, c"link").unwrap();
    assert_eq!(link.attr.st_mode & libc::S_IFMT, libc::S_IFLNK);
    assert_eq!(tree.readlink(&EVERYBODY, link.inode).unwrap(), b"../secret");
    assert_eq!(error(tree.open(&EVERYBODY, link.inode, 0, 0)), libc::ENXIO, "a link is not followed");
    let up = tree.lookup(&EVERYBODY, root, c"up").unwrap().inode;
    assert_eq!(error(tree.lookup(&EVERYBODY, up, c"secret")), libc::ENOTDIR);
    assert!(tree.opendir(&EVERYBODY, up, 0).is_err());
    // What the guest makes of a link on the way to a new file is no file outside.
    symlink(dir.path().join("made"), dir.path().join("export/dangling")).unwrap();
    assert!(create(&tree, &EVERYBODY, root, "dangling", libc::O_RDWR).is_err());
    assert!(!dir.path().join("made").exists());
}

#[test]
fn what_is_made_belongs_to_the_guests_user() {
    let dir = tempfile::tempdir().unwrap();
    let (tree, root) = serving(dir.path());
    // As every thread of the server has it.
    crate::sys::no_setuid_fixup().unwrap();
    let user = context(1234, 2345);
    create(&tree, &user, root, "file", libc::O_RDWR).unwrap();
    tree.mkdir(&user, root, c"dir", 0o750, 0).unwrap();
    tree.symlink(&user, c"target", root, c"link").unwrap();
    tree.mknod(&user, root, c"fifo", libc::S_IFIFO | 0o600, 0, 0).unwrap();
    for made in ["file", "dir", "link", "fifo"] {
        let found = std::fs::symlink_metadata(dir.path().join(made)).unwrap();
        assert_eq!((found.uid(), found.gid()), (1234, 2345), "{made}");
    }
    assert_eq!(std::fs::metadata(dir.path().join("file")).unwrap().mode() & 0o7777, 0o640);
    create(&tree, &EVERYBODY, root, "again", libc::O_RDWR).unwrap();
    assert_eq!(std::fs::metadata(dir.path().join("again")).unwrap().uid(), 0, "the thread is root again");
}

#[test]
fn devices_are_neither_made_nor_opened() {
    let dir = tempfile::tempdir().unwrap();
    let (mode, null) = (nix::sys::stat::Mode::S_IRWXU, nix::sys::stat::makedev(1, 3));
    nix::sys::stat::mknod(&dir.path().join("null"), nix::sys::stat::SFlag::S_IFCHR, mode, null).unwrap();
    nix::unistd::mkfifo(&dir.path().join("fifo"), mode).unwrap();
    let (tree, root) = serving(dir.path());
    for (kind, number) in [(libc::S_IFCHR, 0x103), (libc::S_IFBLK, 0x800), (libc::S_IFBLK, 0)] {
        assert_eq!(error(tree.mknod(&EVERYBODY, root, c"new", kind | 0o600, number, 0)), libc::EPERM);
    }
    tree.mknod(&EVERYBODY, root, c"whiteout", libc::S_IFCHR, 0, 0).unwrap();
    for known in [c"null", c"fifo"] {
        let inode = tree.lookup(&EVERYBODY, root, known).unwrap().inode;
        assert_eq!(error(tree.open(&EVERYBODY, inode, libc::O_RDONLY.cast_unsigned(), 0)), libc::ENXIO);
        assert_eq!(
            error(create(&tree, &EVERYBODY, root, known.to_str().unwrap(), libc::O_RDONLY)),
            libc::ENXIO
        );
    }
}

#[test]
fn attributes_are_set_as_asked() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("file");
    std::fs::write(&file, b"0123456789").unwrap();
    let (tree, root) = serving(dir.path());
    let entry = tree.lookup(&EVERYBODY, root, c"file").unwrap();
    let mut wanted = entry.attr;
    (wanted.st_mode, wanted.st_uid, wanted.st_gid) = (0o4751, 7, 8);
    (wanted.st_size, wanted.st_mtime, wanted.st_mtime_nsec) = (4, 1_000_000, 5);
    let valid = SetattrValid::MODE | SetattrValid::UID | SetattrValid::GID | SetattrValid::SIZE;
    tree.setattr(&EVERYBODY, entry.inode, wanted, None, valid).unwrap();
    let (shown, _) = tree.setattr(&EVERYBODY, entry.inode, wanted, None, SetattrValid::MTIME).unwrap();
    let found = std::fs::metadata(&file).unwrap();
    assert_eq!((found.uid(), found.gid(), found.len()), (7, 8, 4));
    assert_eq!((found.mtime(), found.mtime_nsec()), (1_000_000, 5));
    assert_eq!(shown.st_mtime, 1_000_000);
    wanted.st_size = -1;
    assert_eq!(error(tree.setattr(&EVERYBODY, entry.inode, wanted, None, SetattrValid::SIZE)), libc::EINVAL);
    // A directory has no size to set, a symbolic link no mode.
    assert_eq!(error(tree.setattr(&EVERYBODY, root, wanted, None, SetattrValid::SIZE)), libc::EINVAL);
    wanted.st_size = 0;
    assert_eq!(error(tree.setattr(&EVERYBODY, root, wanted, None, SetattrValid::SIZE)), libc::EISDIR);
    symlink("file", dir.path().join("link")).unwrap();
    let link = tree.lookup(&EVERYBODY, root, c"link").unwrap().inode;
    tree.setattr(&EVERYBODY, link, wanted, None, SetattrValid::UID).unwrap();
    assert_eq!(std::fs::symlink_metadata(dir.path().join("link")).unwrap().uid(), 7, "of the link itself");
    assert!(tree.setattr(&EVERYBODY, link, wanted, None, SetattrValid::MODE).is_err());
    assert_eq!(
        std::fs::metadata(&file).unwrap().permissions().mode() & 0o777,
        0o751,
        "and not of its target"
    );
}

#[test]
fn extended_attributes_are_kept() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("file"), b"").unwrap();
    let (tree, root) = serving(dir.path());
    let inode = tree.lookup(&EVERYBODY, root, c"file").unwrap().inode;
    match tree.setxattr(&EVERYBODY, inode, c"user.colour", b"green", 0) {
        // Not every file system of a test machine has them.
        Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => return,
        done => done.unwrap(),
    }
    let value = |size| match tree.getxattr(&EVERYBODY, inode, c"user.colour", size).unwrap() {
        GetxattrReply::Value(value) => value,
        GetxattrReply::Count(count) => format!("{count} bytes").into_bytes(),
    };
    assert_eq!((value(0), value(u32::MAX)), (b"5 bytes".to_vec(), b"green".to_vec()));
    assert_eq!(error(tree.getxattr(&EVERYBODY, inode, c"user.colour", 2)), libc::ERANGE);
    let ListxattrReply::Names(names) = tree.listxattr(&EVERYBODY, inode, 1000).unwrap() else {
        panic!("a count of what has a size")
    };
    assert!(names.windows(12).any(|part| part == b"user.colour\0"));
    tree.removexattr(&EVERYBODY, inode, c"user.colour").unwrap();
    assert_eq!(error(tree.getxattr(&EVERYBODY, inode, c"user.colour", 9)), libc::ENODATA);
}

#[test]
fn a_file_lives_as_long_as_the_guest_knows_it() {
    let dir = tempfile::tempdir().unwrap();
    let (tree, root) = serving(dir.path());
    let (inode, handle) = create(&tree, &EVERYBODY, root, "file", libc::O_RDWR).unwrap();
    assert_eq!(tree.lookup(&EVERYBODY, root, c"file").unwrap().inode, inode, "one number for one file");
    tree.link(&EVERYBODY, inode, root, c"other").unwrap();
    tree.unlink(&EVERYBODY, root, c"file").unwrap();
    tree.unlink(&EVERYBODY, root, c"other").unwrap();
    assert_eq!(tree.getattr(&EVERYBODY, inode, None).unwrap().0.st_nlink, 0, "unlinked but open");
    tree.release(&EVERYBODY, inode, 0, handle, false, false, None).unwrap();
    assert_eq!(error(tree.release(&EVERYBODY, inode, 0, handle, false, false, None)), libc::EBADF);
    tree.forget(&EVERYBODY, inode, 2);
    tree.getattr(&EVERYBODY, inode, None).unwrap();
    tree.forget(&EVERYBODY, inode, u64::MAX);
    assert_eq!(error(tree.getattr(&EVERYBODY, inode, None)), libc::ESTALE);
    // Wrong numbers, and an export's, which is for good.
    for number in [inode, inodes::ROOT, root, u64::MAX, 0] {
        tree.forget(&EVERYBODY, number, 1_000_000);
    }
    tree.getattr(&EVERYBODY, root, None).unwrap();
    assert_eq!(error(tree.fsync(&EVERYBODY, inode, false, handle)), libc::EBADF);
}

#[test]
fn directories_are_read_in_pieces_and_from_where_one_left_off() {
    let dir = tempfile::tempdir().unwrap();
    for number in 0..300 {
        std::fs::write(dir.path().join(format!("file-{number:03}")), b"").unwrap();
    }
    let (tree, root) = serving(dir.path());
    let handle = tree.opendir(&EVERYBODY, root, 0).unwrap().0.unwrap();
    let (mut names, mut offset) = (std::collections::BTreeSet::new(), 0);
    loop {
        let (mut room, from) = (7, offset);
        let before = names.len();
        let mut add = |entry: DirEntry<'_>, found: Entry| {
            if room == 0 {
                return Ok(0);
            }
            room -= 1;
            offset = entry.offset;
            assert_eq!(found.inode == 0, entry.name.starts_with(b"."));
            if found.inode != 0 {
                assert_eq!(found.attr.st_ino, entry.ino, "one inode number, listed and looked up");
            }
            assert!(names.insert(entry.name.to_vec()), "each once");
            Ok(1)
        };
        tree.readdirplus(&EVERYBODY, root, handle, 4096, from, &mut add).unwrap();
        if names.len() == before {
            break;
        }
    }
    assert_eq!(names.len(), 302);
    tree.releasedir(&EVERYBODY, root, 0, handle).unwrap();
}

#[test]
fn files_of_two_exports_are_never_one_to_the_guest() {
    let dir = tempfile::tempdir().unwrap();
    let (tree, root) = serving(dir.path());
    tree.export(1, path_descriptor(dir.path())).unwrap();
    let other = tree.lookup(&EVERYBODY, inodes::ROOT, c"1").unwrap();
    let first = tree.getattr(&EVERYBODY, root, None).unwrap().0;
    assert_ne!(root, other.inode);
    assert_ne!(first.st_ino, other.attr.st_ino);
}

#[test]
fn saved_tables_go_on_in_another_server() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir(dir.path().join("sub")).unwrap();
    let (tree, root) = serving(dir.path());
    let sub = tree.lookup(&EVERYBODY, root, c"sub").unwrap().inode;
    let (kept, handle) = create(&tree, &EVERYBODY, sub, "kept", libc::O_RDWR).unwrap();
    let (lost, lost_handle) = create(&tree, &EVERYBODY, root, "lost", libc::O_RDWR).unwrap();
    let (replaced, _) = create(&tree, &EVERYBODY, root, "replaced", libc::O_RDWR).unwrap();
    let (gone, gone_handle) = create(&tree, &EVERYBODY, root, "gone", libc::O_RDWR).unwrap();
    tree.unlink(&EVERYBODY, root, c"lost").unwrap();
    let shown = tree.getattr(&EVERYBODY, kept, None).unwrap().0.st_ino;
    let file = tempfile::NamedTempFile::new().unwrap();
    state::save(&tree, file.reopen().unwrap()).unwrap();
    drop(tree);
    std::fs::remove_file(dir.path().join("replaced")).unwrap();
    symlink("/etc/passwd", dir.path().join("replaced")).unwrap();
    std::fs::remove_file(dir.path().join("gone")).unwrap();
    // Likely with the inode number of the one before.
    std::fs::write(dir.path().join("other"), "").unwrap();

    let (tree, same) = serving(dir.path());
    assert_eq!(root, same);
    state::restore(&tree, file.reopen().unwrap()).unwrap();
    assert_eq!(tree.getattr(&EVERYBODY, kept, None).unwrap().0.st_ino, shown);
    tree.fallocate(&EVERYBODY, kept, handle, 0, 0, 100).unwrap();
    assert_eq!(std::fs::metadata(dir.path().join("sub/kept")).unwrap().len(), 100, "the handle is open");
    assert_eq!(error(tree.getattr(&EVERYBODY, lost, None)), libc::ESTALE);
    assert_eq!(error(tree.fsync(&EVERYBODY, lost, false, lost_handle)), libc::ESTALE);
    assert_eq!(error(tree.getattr(&EVERYBODY, replaced, None)), libc::ESTALE, "another kind of file");
    assert_eq!(error(tree.getattr(&EVERYBODY, gone, None)), libc::ESTALE);
    assert_eq!(error(tree.fallocate(&EVERYBODY, gone, gone_handle, 0, 0, 100)), libc::ESTALE);
    assert_eq!(std::fs::metadata(dir.path().join("other")).unwrap().len(), 0, "not another file");
    let new = create(&tree, &EVERYBODY, root, "new", libc::O_RDWR).unwrap();
    assert!(new.0 > gone && new.1 > gone_handle, "numbers are not used again");
}

#[test]
fn a_saved_state_is_not_believed() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir(dir.path().join("export")).unwrap();
    std::fs::write(dir.path().join("secret"), b"").unwrap();
    let restored = |state: &str| {
        let (tree, _) = serving(&dir.path().join("export"));
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), state).unwrap();
        state::restore(&tree, file.reopen().unwrap()).map(|()| tree)
    };
    let of = |files: &str| {
        format!(
            r#"{{"version":1,"files":[{files}],"handles":[],"devices":[],"last_file":{},"last_handle":9}}"#,
            1u64 << 33
        )
    };
    let number = (1u64 << 32) + 1;
    let file = |path: &[u8], number: u64| {
        format!(r#"{{"number":{number},"export":0,"lookups":1,"path":{path:?},"kind":32768}}"#)
    };
    for path in [&b"../secret"[..], b"/etc/passwd", b"sub/../../secret", b"a\0b"] {
        let tree = restored(&of(&file(path, number))).unwrap();
        assert_eq!(error(tree.getattr(&EVERYBODY, number, None)), libc::ESTALE, "{path:?}");
    }
    for bad in
        ["", "{}", "[1]", &of("7"), &of(&file(b"x", 1)), &of(&file(b"x", 2)), &of(&file(b"x", u64::MAX))]
    {
        assert!(restored(bad).is_err(), "{bad}");
    }
    let twice = format!("{},{}", file(b"x", number), file(b"x", number));
    assert!(restored(&of(&twice)).is_err());
    assert!(restored(&of("").replace("\"version\":1", "\"version\":2")).is_err());
}
