use std::os::unix::fs::{FileExt, MetadataExt};
use std::sync::Barrier;

use super::*;
use crate::rootfs::source::Upper;
use crate::rootfs::{collect_garbage, discard, sweep};

struct Host {
    dir: tempfile::TempDir,
}

impl Host {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        for name in ["snapshots/3/fs", "snapshots/3/work", "native/7", "run"] {
            std::fs::create_dir_all(dir.path().join(name)).unwrap();
        }
        Self { dir }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn place(&self, source: &Source) -> Place {
        let (state_dir, run_dir) = (self.path("state"), self.path("run"));
        let request = Request {
            id: "web",
            namespace: "default",
            containerd: "",
            mounts: &[],
            root: Path::new("/"),
            state_dir: &state_dir,
            run_dir: &run_dir,
            writable_size_mib: 64,
        };
        Place::find(source, &request).unwrap()
    }

    fn overlay(&self) -> Place {
        self.place(&Source::Overlay {
            lowers: vec![self.path("snapshots/1/fs")],
            upper: Some(Upper { upper: self.path("snapshots/3/fs"), work: self.path("snapshots/3/work") }),
        })
    }

    fn view(&self) -> Place {
        self.place(&Source::Overlay { lowers: vec!["/l".into()], upper: None })
    }

    fn native(&self) -> Place {
        self.place(&Source::Directory { path: self.path("native/7"), frozen: true })
    }

    fn open(&self, place: &Place) -> Result<WritableDisk, RootfsError> {
        open(place, &self.path("state"), 64)
    }
}

#[test]
fn the_layer_lives_in_the_snapshot_and_a_second_task_sees_the_first_ones_writes() {
    let host = Host::new();
    let place = host.overlay();
    let first = host.open(&place).unwrap();
    assert!(host.path("snapshots/3/spore/writable.ext4").exists());
    first.top.write_all_at(b"written by the first task", 60 << 20).unwrap();
    drop(first);
    let second = host.open(&place).unwrap();
    let mut bytes = [0; 25];
    second.top.read_exact_at(&mut bytes, 60 << 20).unwrap();
    assert_eq!(&bytes, b"written by the first task");
    let names: Vec<_> = std::fs::read_dir(host.path("snapshots/3/spore")).unwrap().flatten().collect();
    assert_eq!(names.len(), 1, "{names:?}");
}

#[test]
fn the_golden_file_system_is_sparse_and_sound() {
    let host = Host::new();
    let disk = host.path(&format!("state/golden/1024-{GOLDEN_FORMAT}.ext4"));
    open(&host.overlay(), &host.path("state"), 1024).unwrap();
    let metadata = std::fs::metadata(&disk).unwrap();
    assert_eq!(metadata.len(), 1 << 30);
    assert!(metadata.blocks() * 512 < 4 << 20, "{} bytes on disk", metadata.blocks() * 512);
    let output = Command::new("/usr/sbin/e2fsck")
        .args(["-f", "-n"])
        .arg(host.path("snapshots/3/spore/writable.ext4"))
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
}

#[test]
fn a_layer_serves_one_sandbox_at_a_time_as_long_as_any_descriptor_is_open() {
    let host = Host::new();
    let place = host.native();
    let shim = host.open(&place).unwrap();
    let vmm = shim.top.try_clone().unwrap();
    drop(shim);
    let message = host.open(&place).unwrap_err().to_string();
    assert!(message.contains("in use by another sandbox"), "{message}");
    drop(vmm);
    host.open(&place).unwrap();
}

#[test]
fn sandboxes_that_begin_at_once_make_one_layer() {
    let host = Host::new();
    let place = host.overlay();
    let barrier = Barrier::new(8);
    let opened: Vec<_> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..8)
            .map(|_| {
                scope.spawn(|| {
                    barrier.wait();
                    host.open(&place)
                })
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    // Each opened the same file, so all but the first found it locked.
    assert_eq!(opened.iter().filter(|result| result.is_ok()).count(), 1);
    let ino = opened.iter().flatten().next().unwrap().top.metadata().unwrap().ino();
    assert_eq!(std::fs::metadata(host.path("snapshots/3/spore/writable.ext4")).unwrap().ino(), ino);
    assert_eq!(std::fs::read_dir(host.path("state/golden")).unwrap().count(), 1, "no temporary file stays");
}

#[test]
fn layers_go_with_their_directory_but_not_under_a_running_vm() {
    let host = Host::new();
    let state = host.path("state");
    let place = host.native();
    let running = host.open(&place).unwrap();
    collect_garbage(&state);
    assert!(place.dir().exists());
    std::fs::remove_dir(host.path("native/7")).unwrap();
    collect_garbage(&state);
    assert!(place.dir().exists(), "the VM still runs on it");
    drop(running);
    collect_garbage(&state);
    assert!(!place.dir().exists());
    // A new directory of the same name is another owner.
    std::fs::create_dir(host.path("native/7")).unwrap();
    assert_ne!(host.native().dir(), place.dir());
}

#[test]
fn a_layer_outlives_a_reboot_that_has_not_mounted_its_disk_yet() {
    let host = Host::new();
    let place = host.native();
    drop(host.open(&place).unwrap());
    let (disk, aside) = (host.path("native"), host.path("unmounted"));
    std::fs::rename(&disk, &aside).unwrap();
    collect_garbage(&host.path("state"));
    std::fs::create_dir(&disk).unwrap();
    collect_garbage(&host.path("state"));
    std::fs::remove_dir(&disk).unwrap();
    std::fs::rename(&aside, &disk).unwrap();
    assert!(place.dir().join(DISK).exists());
    assert_eq!(host.native().dir(), place.dir());
}

#[test]
fn a_directory_that_never_got_its_owner_is_collected_unless_somebody_is_at_it() {
    let host = Host::new();
    let dirs = ["torn", "busy", "unreadable", "disk"].map(|name| host.path("state/writable").join(name));
    for dir in &dirs {
        std::fs::create_dir_all(dir).unwrap();
        std::fs::write(dir.join("base.erofs"), b"").unwrap();
    }
    let _preparing = lock::try_directory(&dirs[1]).unwrap();
    std::fs::write(dirs[2].join(OWNER), b"{").unwrap();
    std::fs::write(dirs[3].join(DISK), b"data").unwrap();
    collect_garbage(&host.path("state"));
    assert_eq!(dirs.map(|dir| dir.exists()), [false, true, true, true]);
}

#[test]
fn the_owner_is_there_before_the_disk_and_is_kept_current() {
    let host = Host::new();
    let place = host.native();
    // The golden file system cannot be made: the owner stands already.
    std::fs::create_dir(host.path("state")).unwrap();
    std::fs::write(host.path("state/golden"), b"in the way").unwrap();
    host.open(&place).unwrap_err();
    assert!(place.dir().join(OWNER).exists() && !place.dir().join(DISK).exists());
    std::fs::remove_file(host.path("state/golden")).unwrap();
    std::fs::write(place.dir().join(OWNER), b"of another version").unwrap();
    host.open(&place).unwrap();
    assert!(serde_json::from_slice::<Owner>(&std::fs::read(place.dir().join(OWNER)).unwrap()).is_ok());
}

#[test]
fn collecting_never_takes_a_layer_from_under_its_maker() {
    let host = Host::new();
    let (place, state) = (host.view(), host.path("state"));
    let done = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(std::sync::atomic::Ordering::Relaxed) {
                collect_garbage(&state);
            }
        });
        for _ in 0..20 {
            let disk = host.open(&place).unwrap();
            let named = std::fs::metadata(place.dir().join(DISK)).unwrap();
            assert_eq!(named.ino(), disk.top.metadata().unwrap().ino());
        }
        done.store(true, std::sync::atomic::Ordering::Relaxed);
    });
}

#[test]
fn half_made_files_are_swept_wherever_a_layer_is() {
    let host = Host::new();
    let (native, overlay) = (host.native(), host.overlay());
    for place in [&native, &overlay] {
        std::fs::create_dir_all(place.dir()).unwrap();
        for name in [".tmp-4194303-1-4194303-1-0-upper.erofs", ".lock-upper.erofs"] {
            std::fs::write(place.dir().join(name), b"").unwrap();
        }
    }
    let names = |place: &Place| std::fs::read_dir(place.dir()).unwrap().count();
    sweep(&host.path("state"));
    assert_eq!((names(&native), names(&overlay)), (0, 2));
    host.open(&overlay).unwrap();
    assert_eq!(names(&overlay), 1, "the next task sweeps a snapshot's");
}

#[test]
fn a_read_only_view_writes_to_a_disk_that_goes_with_its_sandbox() {
    let host = Host::new();
    let place = host.view();
    assert_eq!(place.dir(), host.path("state/ephemeral/default/web"), "on disk, not in /run");
    let running = host.open(&place).unwrap();
    running.top.write_all_at(b"gone with the sandbox", 60 << 20).unwrap();
    assert!(host.open(&place).unwrap_err().to_string().contains("in use"));
    discard(place.dir());
    collect_garbage(&host.path("state"));
    assert!(place.dir().exists(), "it runs");
    drop(running);
    // Another sandbox of that name before anybody swept: nothing of the first one's.
    let mut bytes = [1; 21];
    host.open(&place).unwrap().top.read_exact_at(&mut bytes, 60 << 20).unwrap();
    assert_eq!(bytes, [0; 21]);
    collect_garbage(&host.path("state"));
    assert!(!host.path("state/ephemeral").exists());
}

#[test]
fn an_identifier_that_is_a_path_is_refused() {
    for name in ["", "../x", ".hidden", "a/b"] {
        let message = plain_name(name).unwrap_err().to_string();
        assert!(message.contains(&format!("{name:?}")), "{message}");
    }
    assert_eq!(plain_name("web.1").unwrap(), "web.1");
}

/// What a checkpoint has of a disk.
fn captured(host: &Host) -> Vec<File> {
    ["raw", "delta"]
        .map(|name| {
            let path = host.path(name);
            std::fs::write(&path, vec![7; 4096]).unwrap();
            File::open(path).unwrap()
        })
        .into()
}

fn count(dir: &Path) -> usize {
    std::fs::read_dir(dir).into_iter().flatten().count()
}

#[test]
fn a_restored_disk_whose_task_never_ran_is_removed_by_delete_and_another_can_be_restored() {
    let host = Host::new();
    let files = captured(&host);
    for place in [host.overlay(), host.native()] {
        let (disk, _) = adopt(&place, &files).unwrap();
        let vmm = disk.top.try_clone().unwrap();
        drop(disk);
        crate::rootfs::sweep_layer(&place.dir);
        assert!(matches!(adopt(&place, &files), Err(RootfsError::InUse { .. })), "its VM lives");
        drop(vmm);
        crate::rootfs::sweep_layer(&place.dir);
        let owner = usize::from(place.dir.join(OWNER).exists());
        assert_eq!(count(&place.dir), owner, "{}", place.dir.display());
        let (disk, _) = adopt(&place, &files).unwrap();
        disk.layers.keep().unwrap();
        drop(disk);
        crate::rootfs::sweep_layer(&place.dir);
        let (disk, put_back) = adopt(&place, &files).unwrap();
        assert!(put_back.is_some(), "its task has run");
        drop((disk, put_back));
        assert_eq!(host.open(&place).unwrap().below.len(), 2);
    }
}

#[test]
fn a_restored_disk_that_no_delete_came_for_is_not_the_next_ones() {
    let host = Host::new();
    let (place, files) = (host.overlay(), captured(&host));
    drop(adopt(&place, &files).unwrap());
    assert_eq!(adopt(&place, &files).unwrap().0.below.len(), 2, "restored anew");
    let disk = host.open(&place).unwrap();
    assert_eq!((disk.below.len(), disk.size().unwrap()), (0, 64 << 20), "a new one");
    assert_eq!(count(&place.dir), 1);
    // Killed at any step before the disk was there, or while it was removed.
    drop(disk);
    layers::remove(&place.dir).unwrap();
    drop(adopt(&place, &files).unwrap());
    std::fs::remove_file(place.dir.join(DISK)).unwrap();
    crate::rootfs::sweep_layer(&place.dir);
    assert_eq!(count(&place.dir), 0);
}
