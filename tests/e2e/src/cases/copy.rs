//! `spore cp`: trees with everything in them, both ways.

use std::fs::{self, File, Permissions};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, chown, symlink};
use std::path::Path;

use anyhow::{Result, ensure};
use nix::sys::stat::{UtimensatFlags, utimensat};
use nix::sys::time::TimeSpec;

use super::{Case, expect_contains, expect_equal};
use crate::waiting::Waiting;
use spore_harness::bed::Subject;

pub(crate) const CASES: &[Case] = &[
    Case::new("copy::a_tree_there_and_back", there_and_back).spore_only(),
    Case::new("copy::where_dockers_copy_goes", where_it_goes).spore_only(),
];

const SPARSE_SIZE: u64 = 1 << 30;
const SPOT: u64 = 700 << 20;
/// 2001-09-09 01:46:40.5.
const MODIFIED: (i64, i64) = (1_000_000_000, 500_000_000);

/// Plain, empty, sparse and large files, links that lead nowhere, set-id bits, owners, a name
/// that is no text.
fn make_tree(tree: &Path) -> Result<()> {
    use std::os::unix::ffi::OsStrExt;
    fs::create_dir_all(tree.join("sub/empty"))?;
    fs::write(tree.join("plain"), "plain\n")?;
    fs::write(tree.join("none"), "")?;
    let block: Vec<u8> = (0..2_500_000_u32).map(|index| (index / 3).to_le_bytes()[0]).collect();
    fs::write(tree.join("sub/large"), block)?;
    fs::write(tree.join(std::ffi::OsStr::from_bytes(b"odd \xff\n")), "odd")?;
    let sparse = File::create(tree.join("sub/sparse"))?;
    sparse.write_all_at(b"in the middle", SPOT)?;
    sparse.set_len(SPARSE_SIZE)?;
    symlink("plain", tree.join("link"))?;
    symlink("/nowhere/at all", tree.join("sub/dangling"))?;
    chown(tree.join("plain"), Some(1234), Some(4321))?;
    for (name, mode) in [("plain", 0o4751), ("none", 0o600), ("sub", 0o1777), ("sub/empty", 0o700)] {
        fs::set_permissions(tree.join(name), Permissions::from_mode(mode))?;
    }
    for name in ["plain", "link", "sub/empty", "sub"] {
        let time = TimeSpec::new(MODIFIED.0, MODIFIED.1);
        let at = tree.join(name);
        utimensat(nix::fcntl::AT_FDCWD, &at, &time, &time, UtimensatFlags::NoFollowSymlink)?;
    }
    Ok(())
}

/// What a tree is: each entry's kind, mode, owner, time, target or content.
fn look(tree: &Path, below: &Path, told: &mut Vec<String>) -> Result<()> {
    let mut names: Vec<_> =
        fs::read_dir(tree.join(below))?.map(|entry| Ok(entry?.file_name())).collect::<Result<_>>()?;
    names.sort();
    for name in names {
        let below = below.join(name);
        let path = tree.join(&below);
        let found = fs::symlink_metadata(&path)?;
        // A link has no mode of its own.
        let mode = if found.is_symlink() { 0 } else { found.mode() };
        let owner = format!("{}:{}", found.uid(), found.gid());
        let mut line = format!("{below:?} {mode:o} {owner} {}.{:09}", found.mtime(), found.mtime_nsec());
        if found.is_symlink() {
            line = format!("{line} -> {:?}", fs::read_link(&path)?);
        } else if found.is_file() && found.len() < SPARSE_SIZE {
            let content = fs::read(&path)?;
            let sum =
                content.iter().fold(7_u64, |sum, byte| sum.wrapping_mul(31).wrapping_add(u64::from(*byte)));
            line = format!("{line} {} bytes, sum {sum}", content.len());
        }
        told.push(line);
        if found.is_dir() {
            look(tree, &below, told)?;
        }
    }
    Ok(())
}

fn copied(subject: &Subject, options: &[&str], from: &str, to: &str) -> Result<()> {
    let mut args = vec!["cp"];
    args.extend(options);
    args.extend([from, to]);
    let output = subject.spore(&args)?.run()?;
    ensure!(output.success(), "spore cp {from} {to}: {output}");
    Ok(())
}

fn there_and_back(subject: &Subject) -> Result<()> {
    let waiting = Waiting::start(subject, "copied")?;
    let home = tempfile::tempdir_in("/srv/bed")?;
    let (tree, back) = (home.path().join("tree"), home.path().join("back"));
    make_tree(&tree)?;
    let (tree_path, back_path) = (tree.to_string_lossy(), back.to_string_lossy());
    copied(subject, &["-a"], &tree_path, &waiting.path("/copy"))?;

    let inside = waiting.shell(
        "cd /copy; stat -c '%n %a %u %g %Y' plain sub; readlink link; readlink sub/dangling; cat plain; stat -c %s sub/sparse; \
         dd if=sub/sparse bs=1M skip=700 count=1 2>/dev/null | head -c 13; echo; ! ls -a / . | grep spore-cp",
    )?;
    let expected = "plain 4751 1234 4321 1000000000\nsub 1777 0 0 1000000000\nplain\n/nowhere/at all\nplain\n\
                    1073741824\nin the middle\n";
    expect_equal("the tree inside", &inside.as_str(), &expected)?;
    let blocks = waiting.must("stat", &["--json"], &["/copy/sub/sparse"])?;
    let blocks: serde_json::Value = serde_json::from_str(&blocks)?;
    ensure!(blocks["allocated"].as_u64().is_some_and(|bytes| bytes < 1 << 20), "{blocks}");

    copied(subject, &["-a"], &waiting.path("/copy"), &back_path)?;
    let (mut sent, mut came) = (Vec::new(), Vec::new());
    look(&tree, Path::new(""), &mut sent)?;
    look(&back, Path::new(""), &mut came)?;
    expect_equal("the tree", &came, &sent)?;
    let sparse = File::open(back.join("sub/sparse"))?;
    let mut spot = [0; 13];
    sparse.read_exact_at(&mut spot, SPOT)?;
    expect_equal("the sparse file's data", &spot.as_slice(), &b"in the middle".as_slice())?;
    let found = sparse.metadata()?;
    ensure!(found.len() == SPARSE_SIZE && found.blocks() * 512 < 1 << 20, "{found:?}");

    // Without -a: root's inside, the caller's and without set-id bits outside.
    copied(subject, &[], &format!("{tree_path}/plain"), &waiting.path("/tmp/"))?;
    expect_equal("owner", &waiting.shell("stat -c '%u:%g %a' /tmp/plain")?.as_str(), &"0:0 4751\n")?;
    copied(subject, &[], &waiting.path("/copy/plain"), &format!("{back_path}/mine"))?;
    let found = fs::metadata(back.join("mine"))?;
    expect_equal("owner and mode", &(found.uid(), found.mode() & 0o7777), &(0, 0o751))
}

fn where_it_goes(subject: &Subject) -> Result<()> {
    let waiting = Waiting::start(subject, "goes")?;
    let home = tempfile::tempdir_in("/srv/bed")?;
    let at = |name: &str| home.path().join(name).to_string_lossy().into_owned();
    fs::create_dir_all(at("d/inner"))?;
    fs::write(at("d/inner/f"), "new")?;
    waiting.shell("mkdir /there; echo old > /file; ln -s /file /to-file; echo c > /conf")?;
    copied(subject, &[], &at("d"), &waiting.path("/there"))?;
    copied(subject, &[], &at("d/."), &waiting.path("/there"))?;
    copied(subject, &[], &at("d/inner/f"), &waiting.path("/to-file"))?;
    let inside = waiting.shell("cat /there/d/inner/f /there/inner/f /file; readlink /to-file")?;
    expect_equal("what came where", &inside.as_str(), &"newnewnew/file\n")?;

    let refused = |from: &str, to: &str, why: &str| -> Result<()> {
        let output = subject.spore(&["cp", from, to])?.run()?;
        expect_equal("status", &output.code(), &1)?;
        expect_contains("the message", &output.errors(), why)
    };
    refused(&at("d"), &waiting.path("/file"), "cannot be copied onto it")?;
    refused(&at("d/inner/f"), &waiting.path("/missing/"), "does not exist")?;
    refused(&waiting.path("/missing"), &at("x"), "No such file or directory")?;
    let both = subject.spore(&["cp", &at("d"), &at("e")])?.run()?;
    expect_equal("status of a copy on the host", &both.code(), &2)?;

    copied(subject, &[], &waiting.path("/conf"), &at("d"))?;
    expect_equal("a file into a directory", &fs::read_to_string(at("d/conf"))?.as_str(), &"c\n")?;
    copied(subject, &[], &waiting.path("/to-file"), &at("link"))?;
    expect_equal("a link", &fs::read_link(at("link"))?, &"/file".into())?;
    copied(subject, &["-L"], &waiting.path("/to-file"), &at("followed"))?;
    expect_equal("what it points to", &fs::read_to_string(at("followed"))?.as_str(), &"new")?;
    let output = subject.spore(&["cp", "--json", &waiting.path("/dev/."), &at("dev")])?.run()?;
    expect_equal("status where devices are left out", &output.code(), &1)?;
    expect_contains("the warning", &output.errors(), "/dev/null: neither file, directory nor link")
}
