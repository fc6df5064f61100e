//! Checkpoints in directories that a client names, and keeps.

use std::collections::HashMap;
use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use spore_harness::api;
use spore_harness::bed::Subject;
use spore_harness::image::BUSYBOX;
use spore_harness::wait;

use super::{COUNTER, Removed, SHOWN, Scene};
use crate::cases::{expect_contains, expect_equal};

const TEMPLATES: &str = "/var/lib/spore/templates";

/// A file, whatever its names.
type Inode = (u64, u64);

/// Bytes of storage by file.
fn storage(dir: &Path) -> Result<HashMap<Inode, u64>> {
    let mut files = HashMap::new();
    for entry in fs::read_dir(dir)? {
        let metadata = entry?.metadata()?;
        files.insert((metadata.dev(), metadata.ino()), metadata.blocks() * 512);
    }
    Ok(files)
}

/// Most of it is the other's.
fn is_delta(dir: &Path, earlier: &Path) -> Result<()> {
    let (there, files) = (storage(earlier)?, storage(dir)?);
    let new: u64 = files.iter().filter(|(inode, _)| !there.contains_key(inode)).map(|(_, bytes)| bytes).sum();
    let (before, all): (u64, u64) = (there.values().sum(), files.values().sum());
    eprintln!("{}: {new} of {all} bytes are new, beside one of {before}", dir.display());
    for entry in fs::read_dir(dir)?.flatten() {
        let metadata = entry.metadata()?;
        eprintln!("  {:?}: {} bytes, {} names", entry.file_name(), metadata.blocks() * 512, metadata.nlink());
    }
    ensure!(new < all / 2, "{}: {new} of {all} bytes are new", dir.display());
    Ok(())
}

fn checkpoint(scene: &mut Scene, id: &str, dir: &Path) -> Result<()> {
    let path = dir.to_str().context("a path")?;
    scene.subject.must(&["tasks", "checkpoint", "--image-path", path, id])?;
    // Of which containerd's client makes an image all the same. It does not print the name.
    let named = scene.subject.must(&["images", "ls", "-q"])?;
    scene.images.extend(named.lines().filter(|name| name.contains(id)).map(str::to_owned));
    Ok(())
}

/// Removes what the store has of a container.
fn forget(subject: &Subject, container: &str) -> Result<usize> {
    let output = subject.spore(&["snapshot", "ls", "--json"])?.run()?;
    let rows: Vec<Value> = serde_json::from_slice(&output.stdout).with_context(|| output.to_string())?;
    let ids: Vec<_> = rows
        .iter()
        .filter(|row| row["container"] == container)
        .filter_map(|row| row["id"].as_str())
        .collect();
    for id in &ids {
        let removed = subject.spore(&["snapshot", "rm", id])?.run()?;
        ensure!(removed.success(), "{removed}");
    }
    Ok(ids.len())
}

/// A memory layer.
fn memory(dir: &Path) -> Result<PathBuf> {
    let paths = fs::read_dir(dir)?.flatten().map(|entry| entry.path());
    let mut memory = paths.filter(|path| path.extension().is_some_and(|kind| kind == "memory"));
    memory.next().with_context(|| format!("no memory layer in {}", dir.display()))
}

/// The second of a container beside the first writes what has changed only, shares nothing with the store, and is restored when
/// store and first one are gone. One of what was restored is a delta too.
pub(super) fn delta(subject: &Subject) -> Result<()> {
    let mut scene = Scene::new(subject);
    let dir = subject.bed.rootfs().with_file_name(subject.id("by-path"));
    fs::create_dir(&dir)?;
    let _removed = Removed(dir.clone());
    let [first, second, third] = ["first", "second", "third"].map(|name| dir.join(name));
    // What the machine has of its template is the same in all checkpoints.
    scene.start("seed", COUNTER)?;
    wait::until("there is a template", SHOWN, || {
        let names = fs::read_dir(TEMPLATES).ok()?.flatten().map(|entry| entry.file_name());
        names.into_iter().any(|name| !name.as_encoded_bytes().starts_with(b".")).then_some(())
    })?;
    let source = scene.start("source", COUNTER)?;
    checkpoint(&mut scene, &source, &first)?;
    for entry in fs::read_dir(&first)?.flatten() {
        expect_equal("names of a file that the client owns", &entry.metadata()?.nlink(), &1)?;
    }
    let between = scene.counted(&source)?;
    checkpoint(&mut scene, &source, &second)?;
    is_delta(&second, &first)?;

    subject.must(&["tasks", "kill", "--signal", "KILL", &source])?;
    wait::until("the task is deleted", SHOWN, || {
        subject.ctr(&["tasks", "delete", &source]).ok()?.run().ok()?.success().then_some(())
    })?;
    expect_equal("snapshots in the store", &forget(subject, &source)?, &2)?;
    fs::remove_dir_all(&first)?;
    let id = scene.name("again");
    subject.must(&["containers", "create", "--runtime", subject.runtime.id(), BUSYBOX, &id, "sh"])?;
    // Who edits the directory in place damages the checkpoint, and nothing else.
    let layer = File::options().read(true).write(true).open(memory(&second)?)?;
    let mut byte = [0];
    layer.read_exact_at(&mut byte, 0)?;
    layer.write_all_at(&[byte[0] ^ 1], 0)?;
    match api::create_from(subject, &id, &second)? {
        Ok(pid) => anyhow::bail!("a damaged checkpoint runs as {pid}"),
        Err(status) => expect_contains("the error", status.message(), "it is damaged")?,
    }
    layer.write_all_at(&byte, 0)?;
    let pid = api::create_from(subject, &id, &second)??;
    ensure!(pid > 0, "no pid");
    api::start(subject, &id, "")??;
    let (counted, disk) = scene.counted(&id)?;
    expect_equal("the counters in memory and on disk", &counted, &disk)?;
    ensure!(counted >= between.0, "it began anew: {between:?}, {counted}");
    // All of it is below what it writes now.
    checkpoint(&mut scene, &id, &third)?;
    is_delta(&third, &second)
}
