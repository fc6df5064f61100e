use std::os::unix::fs::FileExt;
use std::sync::Barrier;

use super::*;
use crate::rootfs::source::Upper;

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

    fn native(&self) -> Place {
        self.place(&Source::Directory { path: self.path("native/7"), frozen: true })
    }

    fn open(&self, place: &Place) -> Result<File, RootfsError> {
        open(place, &self.path("state"), 64)
    }
}

#[test]
fn the_layer_lives_in_the_snapshot_and_a_second_task_sees_the_first_ones_writes() {
    let host = Host::new();
    let place = host.overlay();
    let first = host.open(&place).unwrap();
    assert!(host.path("snapshots/3/spore/writable.ext4").exists());
    first.write_all_at(b"written by the first task", 60 << 20).unwrap();
    drop(first);
    let second = host.open(&place).unwrap();
    let mut bytes = [0; 25];
    second.read_exact_at(&mut bytes, 60 << 20).unwrap();
    assert_eq!(&bytes, b"written by the first task");
    let names: Vec<_> = std::fs::read_dir(host.path("snapshots/3/spore")).unwrap().flatten().collect();
    assert_eq!(names.len(), 1, "{names:?}");
}

#[test]
fn the_golden_file_system_is_sparse_and_sound() {
    let host = Host::new();
    let disk = host.path("state/golden/1024.ext4");
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
    let vmm = shim.try_clone().unwrap();
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
    let ino = opened.iter().flatten().next().unwrap().metadata().unwrap().ino();
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
fn a_read_only_view_writes_into_the_sandbox() {
    let host = Host::new();
    let place = host.place(&Source::Overlay { lowers: vec!["/l".into()], upper: None });
    assert_eq!(place.dir(), host.path("run"));
}
