//! The helper processes of the shim's binary, as processes: image building (layers, whiteouts,
//! concurrency, kill -9, a full disk) and the holder. Needs root, overlayfs, EROFS and
//! `mkfs.erofs`, as the shim does.

#![allow(clippy::unwrap_used)]

use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use serde_json::{Value, json};

const SHIM: &str = env!("CARGO_BIN_EXE_containerd-shim-spore-v2");

/// Three layers: a file replaced, one removed by a whiteout, a directory made opaque.
struct Layers {
    dir: tempfile::TempDir,
}

/// Every mount of a test stays its own, and goes with it however it ends: the developer's
/// mounts are none of its business. Of this thread and what it starts.
fn leave_the_hosts_mounts() {
    let none: Option<&str> = None;
    unshare(CloneFlags::CLONE_NEWNS).unwrap();
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).unwrap();
}

impl Layers {
    fn new() -> Self {
        leave_the_hosts_mounts();
        let dir = tempfile::tempdir().unwrap();
        let layers = Self { dir };
        for name in ["1/fs/etc", "1/fs/opaque", "2/fs", "2/work", "3/fs", "3/work", "images", "merged"] {
            std::fs::create_dir_all(layers.path(name)).unwrap();
        }
        let write = |name: &str, text: &str| std::fs::write(layers.path(name), text).unwrap();
        write("1/fs/etc/replaced", "old");
        write("1/fs/etc/removed", "x");
        write("1/fs/etc/kept", "kept");
        write("1/fs/opaque/hidden", "x");
        symlink("kept", layers.path("1/fs/etc/link")).unwrap();
        run(
            "touch",
            &["-d", "2001-02-03 04:05:06.123456789 UTC", &layers.path("1/fs/etc/kept").display().to_string()],
        );
        // overlayfs itself makes the whiteout and the opaque mark.
        layers.change(2, "1/fs", || {
            write("merged/etc/replaced", "new");
            std::fs::remove_file(layers.path("merged/etc/removed")).unwrap();
        });
        layers.change(3, "2/fs:1/fs", || {
            std::fs::remove_dir_all(layers.path("merged/opaque")).unwrap();
            std::fs::create_dir(layers.path("merged/opaque")).unwrap();
            write("merged/opaque/seen", "seen");
        });
        layers
    }

    fn change(&self, layer: u8, lowers: &str, edit: impl FnOnce()) {
        let lowers: Vec<String> =
            lowers.split(':').map(|name| self.path(name).display().to_string()).collect();
        let (upper, work) = (self.path(&format!("{layer}/fs")), self.path(&format!("{layer}/work")));
        let options =
            format!("lowerdir={},upperdir={},workdir={}", lowers.join(":"), upper.display(), work.display());
        let merged = self.path("merged");
        mount(Some("overlay"), &merged, Some("overlay"), MsFlags::empty(), Some(options.as_str())).unwrap();
        edit();
        umount2(&merged, MntFlags::empty()).unwrap();
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn job(&self, name: &str) -> Value {
        json!({
            "input": { "merged": [self.path("3/fs"), self.path("2/fs"), self.path("1/fs")] },
            "target": self.path("images").join(name),
            "replace": false,
            "mount_point": self.path("images/.mnt"),
        })
    }

    fn leftovers(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.path("images")).unwrap();
        entries.map(|e| e.unwrap().file_name().into_string().unwrap()).filter(|n| n != ".mnt").collect()
    }
}

fn run(program: &str, args: &[&str]) {
    let status = Command::new(program).args(args).status().unwrap();
    assert!(status.success(), "{program} {args:?}");
}

fn begin(job: &Value) -> Child {
    let mut child = Command::new(SHIM)
        .arg("image-build")
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(job.to_string().as_bytes()).unwrap();
    child
}

fn build(job: &Value) -> Output {
    begin(job).wait_with_output().unwrap()
}

/// Mounts an image for the length of `look`.
fn mounted<T>(image: &Path, look: impl FnOnce(&Path) -> T) -> T {
    let dir = tempfile::tempdir().unwrap();
    run(
        "mount",
        &["-t", "erofs", "-o", "loop,ro", &image.display().to_string(), &dir.path().display().to_string()],
    );
    let result = look(dir.path());
    umount2(dir.path(), MntFlags::empty()).unwrap();
    result
}

fn mounts_below(dir: &Path) -> Vec<String> {
    let text = std::fs::read_to_string("/proc/thread-self/mountinfo").unwrap();
    text.lines().filter(|line| line.contains(&dir.display().to_string())).map(String::from).collect()
}

#[test]
fn the_image_is_the_merged_view_and_equal_layers_make_equal_images() {
    let layers = Layers::new();
    for name in ["a.erofs", "b.erofs"] {
        let output = build(&layers.job(name));
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }
    let image = layers.path("images/a.erofs");
    let bytes = std::fs::read(&image).unwrap();
    assert!(bytes == std::fs::read(layers.path("images/b.erofs")).unwrap(), "made twice, equal");
    assert_eq!(std::fs::metadata(&image).unwrap().mode() & 0o777, 0o600);
    mounted(&image, |root| {
        let read = |name: &str| std::fs::read_to_string(root.join(name)).ok();
        assert_eq!(read("etc/replaced").as_deref(), Some("new"));
        assert_eq!(read("etc/removed"), None);
        assert!(
            std::fs::symlink_metadata(root.join("etc/removed")).is_err(),
            "no whiteout in the merged view"
        );
        assert_eq!(read("etc/link").as_deref(), Some("kept"));
        assert_eq!(read("opaque/hidden"), None);
        assert_eq!(read("opaque/seen").as_deref(), Some("seen"));
        let kept = std::fs::metadata(root.join("etc/kept")).unwrap();
        assert_eq!((kept.mtime(), kept.mtime_nsec()), (981_173_106, 123_456_789), "times are kept");
    });
    assert_eq!(mounts_below(layers.dir.path()), Vec::<String>::new());
}

#[test]
fn an_upper_directory_keeps_its_whiteouts_and_covers_the_layers_below() {
    let layers = Layers::new();
    // Layers 2 and 3 as they are, joined by overlayfs with layer 1 as the guest would.
    let mut lowers = Vec::new();
    for layer in ["3", "2"] {
        let mut job = layers.job(&format!("{layer}.erofs"));
        job["input"] = json!({ "tree": layers.path(&format!("{layer}/fs")) });
        assert!(build(&job).status.success());
        let point = layers.path(&format!("mnt{layer}"));
        std::fs::create_dir(&point).unwrap();
        let image = layers.path(&format!("images/{layer}.erofs"));
        run(
            "mount",
            &["-t", "erofs", "-o", "loop,ro", &image.display().to_string(), &point.display().to_string()],
        );
        lowers.push(point);
    }
    let merged = layers.path("merged");
    let options =
        format!("lowerdir={}:{}:{}", lowers[0].display(), lowers[1].display(), layers.path("1/fs").display());
    mount(Some("overlay"), &merged, Some("overlay"), MsFlags::MS_RDONLY, Some(options.as_str())).unwrap();
    let seen = |name: &str| merged.join(name).exists();
    let (removed, hidden, shown) = (seen("etc/removed"), seen("opaque/hidden"), seen("opaque/seen"));
    for point in [&merged, &lowers[0], &lowers[1]] {
        umount2(point, MntFlags::empty()).unwrap();
    }
    assert_eq!((removed, hidden, shown), (false, false, true));
}

#[test]
fn many_builders_make_one_image() {
    let layers = Layers::new();
    let job = layers.job("one.erofs");
    let builders: Vec<Child> = (0..8).map(|_| begin(&job)).collect();
    for builder in builders {
        let output = builder.wait_with_output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }
    assert_eq!(layers.leftovers(), ["one.erofs"]);
    let first = std::fs::metadata(layers.path("images/one.erofs")).unwrap().ino();
    assert!(build(&job).status.success());
    assert_eq!(std::fs::metadata(layers.path("images/one.erofs")).unwrap().ino(), first, "made once");
    // A damaged image is replaced, not served.
    std::fs::write(layers.path("images/one.erofs"), b"torn").unwrap();
    assert!(build(&job).status.success());
    assert!(std::fs::metadata(layers.path("images/one.erofs")).unwrap().len() >= 4096);
}

#[test]
fn a_killed_builder_leaves_no_mount_and_no_image_and_the_next_one_works() {
    let layers = Layers::new();
    // Enough that the kill finds it at work.
    for n in 0..40 {
        std::fs::write(layers.path(&format!("1/fs/big{n}")), vec![n; 1 << 20]).unwrap();
    }
    let job = layers.job("big.erofs");
    let mut builder = begin(&job);
    let has_begun = || layers.leftovers().iter().any(|name| name.starts_with(".tmp-"));
    while !has_begun() && builder.try_wait().unwrap().is_none() {
        std::thread::yield_now();
    }
    builder.kill().unwrap();
    builder.wait().unwrap();
    assert_eq!(mounts_below(layers.dir.path()), Vec::<String>::new());
    assert!(build(&job).status.success());
    let size = std::fs::metadata(layers.path("images/big.erofs")).unwrap().len();
    assert!(size > 40 << 20, "{size}");
}

#[test]
fn a_full_disk_and_a_missing_layer_are_told_and_leave_nothing() {
    let layers = Layers::new();
    std::fs::write(layers.path("1/fs/big"), vec![7; 4 << 20]).unwrap();
    let images = layers.path("images");
    mount(Some("tmpfs"), &images, Some("tmpfs"), MsFlags::empty(), Some("size=1m")).unwrap();
    let output = build(&layers.job("x.erofs"));
    let leftovers = layers.leftovers();
    umount2(&images, MntFlags::empty()).unwrap();
    let text = String::from_utf8_lossy(&output.stderr).to_lowercase();
    assert!(!output.status.success() && text.contains("no space left on device"), "{text}");
    assert_eq!(leftovers, Vec::<String>::new());

    std::fs::remove_dir_all(layers.path("2/fs")).unwrap();
    let output = build(&layers.job("x.erofs"));
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && text.contains("mount the overlay of 3 layers"), "{text}");
    assert_eq!(layers.leftovers(), Vec::<String>::new());
}

#[test]
fn the_tests_mounts_are_not_the_hosts() {
    let layers = Layers::new();
    let point = layers.path("merged");
    mount(Some("tmpfs"), &point, Some("tmpfs"), MsFlags::empty(), None::<&str>).unwrap();
    assert_eq!(mounts_below(layers.dir.path()).len(), 1);
    // The process has left its first thread where it was.
    let text = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert!(!text.contains(&point.display().to_string()));
    umount2(&point, MntFlags::empty()).unwrap();
}

/// An image whose superblock says that it was changed is made again.
#[test]
fn a_damaged_image_is_replaced() {
    let layers = Layers::new();
    let job = layers.job("one.erofs");
    assert!(build(&job).status.success());
    let image = layers.path("images/one.erofs");
    let sound = std::fs::read(&image).unwrap();
    let mut damaged = sound.clone();
    damaged[1024 + 64] ^= 1;
    std::fs::write(&image, damaged).unwrap();
    assert!(build(&job).status.success());
    assert!(std::fs::read(&image).unwrap() == sound);
}

#[test]
fn delete_takes_away_what_a_shim_killed_while_preparing_left() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let dead = ".tmp-4194303-1-4194303-1-0-x.erofs";
    let dirs =
        ["state/images", "state/golden", "state/writable/key", "snapshot/spore", "bundle", "run/test/web"];
    for name in dirs.into_iter().chain(["state/ephemeral/test/web"]) {
        std::fs::create_dir_all(at(name)).unwrap();
        for file in [dead, ".lock-x.erofs"] {
            std::fs::write(at(name).join(file), b"").unwrap();
        }
    }
    for name in ["snapshot/spore", "state/ephemeral/test/web"] {
        std::fs::write(at(name).join("writable.ext4"), b"").unwrap();
    }
    symlink(at("snapshot/spore"), at("run/test/web/layer-web")).unwrap();
    symlink(at("state/ephemeral/test/web"), at("run/test/web/ephemeral-web")).unwrap();
    let config = format!("state_dir = {:?}\nrun_dir = {:?}\n", at("state"), at("run"));
    std::fs::write(at("config.toml"), config).unwrap();
    let output = Command::new(SHIM)
        .args(["-namespace", "test", "-id", "web", "-address"])
        .arg(at("containerd.sock"))
        .arg("-bundle")
        .arg(at("bundle"))
        .arg("delete")
        .env("SPORE_CONFIG", at("config.toml"))
        .current_dir(at("bundle"))
        .stdin(Stdio::null())
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let names = |name: &str| {
        let entries = std::fs::read_dir(at(name)).into_iter().flatten().flatten();
        entries.map(|entry| entry.file_name().into_string().unwrap()).collect::<Vec<_>>()
    };
    assert_eq!(names("snapshot/spore"), ["writable.ext4"], "the layer itself is user data");
    for gone in ["state/writable", "state/images", "state/golden", "state/ephemeral/test"] {
        assert_eq!(names(gone), Vec::<String>::new(), "{gone}");
    }
    assert!(!at("run/test").exists());
}

#[test]
fn a_holder_has_its_own_network_namespace_and_ends_with_its_pipe() {
    let mut holder =
        Command::new(SHIM).arg("holder").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut line = String::new();
    BufReader::new(holder.stdout.take().unwrap()).read_line(&mut line).unwrap();
    assert_eq!(line, "ready\n");
    let namespace = |pid: &str| std::fs::read_link(format!("/proc/{pid}/ns/net")).unwrap();
    assert_ne!(namespace(&holder.id().to_string()), namespace("self"));
    let addresses = std::fs::read_to_string(format!("/proc/{}/net/fib_trie", holder.id())).unwrap();
    assert!(addresses.contains("127.0.0.1"), "loopback is up");
    let mut second = Command::new(SHIM)
        .args(["holder", &format!("/proc/{}/ns/net", holder.id())])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    line.clear();
    BufReader::new(second.stdout.take().unwrap()).read_line(&mut line).unwrap();
    assert_eq!(line, "ready\n");
    assert_eq!(namespace(&second.id().to_string()), namespace(&holder.id().to_string()));
    for holder in [&mut holder, &mut second] {
        drop(holder.stdin.take());
        assert!(holder.wait().unwrap().success());
    }
    let refused =
        Command::new(SHIM).args(["holder", "/no/such/netns"]).stdin(Stdio::null()).output().unwrap();
    let text = String::from_utf8_lossy(&refused.stdout);
    assert!(!refused.status.success() && text.contains("/no/such/netns") && text.contains("open"), "{text}");
}

/// An archive of changes as the guest's agent sends it: an opaque directory, a file in it, a whiteout.
fn changes() -> Vec<u8> {
    use spore_agent_api::changes::{BLOCK, END, OPAQUE, PATH, XATTR, push_record};
    use tar::{EntryType, Header};

    let mut archive = Vec::new();
    let mut block = |kind, data: &[u8]| {
        let mut header = Header::new_ustar();
        header.set_entry_type(kind);
        header.set_mode(0o755);
        header.set_uid(7);
        header.set_gid(8);
        header.set_size(data.len() as u64);
        header.set_cksum();
        archive.extend_from_slice(header.as_bytes());
        archive.extend_from_slice(data);
        archive.resize(archive.len().next_multiple_of(BLOCK), 0);
    };
    let opaque = format!("{XATTR}{OPAQUE}");
    for (kind, path, attribute, data) in [
        (EntryType::Directory, ".", None, ""),
        (EntryType::Directory, "opaque", Some(&opaque), ""),
        (EntryType::Regular, "opaque/file", None, "data"),
        (EntryType::Char, "removed", None, ""),
    ] {
        let mut records = Vec::new();
        push_record(&mut records, PATH.as_bytes(), path.as_bytes());
        if let Some(name) = attribute {
            push_record(&mut records, name.as_bytes(), b"y");
        }
        block(EntryType::XHeader, &records);
        block(kind, data.as_bytes());
    }
    let mut end = Vec::new();
    push_record(&mut end, END.as_bytes(), b"");
    block(EntryType::XGlobalHeader, &end);
    archive
}

#[test]
fn a_guests_changes_are_applied_by_a_confined_helper() {
    let dir = tempfile::tempdir().unwrap();
    let fill = |archive: &[u8], bytes: &str| {
        let mut child = Command::new(SHIM)
            .arg("upper-fill")
            .arg(dir.path())
            .args(["100", bytes])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        // A helper that refuses does not read to the end.
        let _ = child.stdin.take().unwrap().write_all(archive);
        child.wait_with_output().unwrap()
    };
    let output = fill(&changes(), "1000");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(output.stdout, b"0\n");
    let file = std::fs::metadata(dir.path().join("opaque/file")).unwrap();
    assert_eq!((file.uid(), file.gid(), file.len()), (7, 8, 4));
    let mut value = [0; 8];
    let opaque = dir.path().join("opaque");
    assert_eq!(rustix::fs::getxattr(opaque, "trusted.overlay.opaque", &mut value[..]).unwrap(), 1);
    assert_eq!(std::fs::symlink_metadata(dir.path().join("removed")).unwrap().rdev(), 0);
    // Again over what is there, with a disk that cannot have held it.
    let output = fill(&changes(), "3");
    let message = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && message.contains("more than 3 bytes"), "{message}");
    let output = fill(&changes()[..2048], "1000");
    assert!(String::from_utf8_lossy(&output.stderr).contains("ended early"));
}
