//! Snapshots that older builds wrote restore on this one: all of `tests/compat`.

#![allow(clippy::unwrap_used, clippy::expect_used)] // Helpers of tests fail as tests do.

use std::fs::{self, File};
use std::io::{Read, Seek, Write};
use std::path::{Path, PathBuf};

use flate2::Compression;
use flate2::read::GzDecoder;
use flate2::write::GzEncoder;
use spore_native::{Restore, Setup, Vm, disk_file, empty_file};
use spore_vmm::api::{Call, Reply};

/// The name of the memory's layer, and of the file that it is in.
const LAYER: &str = "memory";
const STATE: &str = "state";
const DISK: &str = "disk";
const DISK_MIB: u64 = 1;
/// Of the disk, written before.
const SECTORS: u64 = 64;
const BALLOON_MIB: u64 = 16;

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../compat")
}

fn unpacked(folder: &Path, name: &str) -> File {
    let mut file = empty_file();
    let packed = File::open(folder.join(format!("{name}.gz"))).unwrap();
    std::io::copy(&mut GzDecoder::new(packed), &mut file).unwrap();
    file.rewind().unwrap();
    file
}

fn pack(folder: &Path, name: &str, mut file: &File) {
    let mut bytes = Vec::new();
    file.rewind().unwrap();
    file.read_to_end(&mut bytes).unwrap();
    let packed = File::create(folder.join(format!("{name}.gz"))).unwrap();
    let mut packer = GzEncoder::new(packed, Compression::best());
    packer.write_all(&bytes).unwrap();
    packer.finish().unwrap();
}

/// Whether it is this host that is not like the one that the snapshot was taken on.
fn is_the_hosts(message: &str) -> bool {
    ["restore it on a host like the one", "this host cannot scale it", "of which"]
        .iter()
        .any(|words| message.contains(words) && message.starts_with("restore vCPU"))
}

#[test]
fn what_an_older_build_has_saved_goes_on() {
    let mut folders: Vec<_> = fs::read_dir(folder())
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.is_dir())
        .collect();
    folders.sort();
    assert!(!folders.is_empty(), "there are no old snapshots");
    for folder in folders {
        let disk = unpacked(&folder, DISK);
        let what = Restore {
            state: Some(unpacked(&folder, STATE)),
            layers: vec![(LAYER.to_owned(), unpacked(&folder, LAYER))],
            disks: Vec::new(),
            vsock: true,
            huge_pages: false,
        };
        let mut vm = Vm::spawn();
        match vm.restore(what.stack("rw0", &[&disk, &empty_file()])) {
            Ok(_) => {}
            // All that says what the machine is has been read by then.
            Err(failure) if is_the_hosts(&failure.message) => {
                println!("{}: not on this host: {}", folder.display(), failure.message);
                continue;
            }
            Err(failure) => panic!("{}: {failure:?}", folder.display()),
        }
        assert_eq!(vm.call(Call::Resume), Ok(Reply::Done));
        assert!(vm.run("load,0,1").contains("seed=7\n"), "{}: memory", folder.display());
        assert!(vm.run(&format!("disk-check,rw0,0,{SECTORS},9")).contains("ok disk-check"));
        assert!(vm.run(&format!("disk-fill,rw0,0,{},10", DISK_MIB * 2048)).contains("ok disk-fill"));
        assert!(vm.run("rng").contains("ok rng"));
        assert_eq!(vm.metrics().balloon.actual_bytes, BALLOON_MIB << 20);
        assert!(vm.run(&format!("deflate,{BALLOON_MIB}")).contains("ok deflate"));
        assert_eq!(vm.metrics().balloon.actual_bytes, 0);
    }
}

/// Not a test: makes what the test above restores, in the directory that `SPORE_COMPAT` names (`tests/compat/README.md`).
#[test]
#[ignore = "makes an old snapshot of this build's, when it is going to be one"]
fn make() {
    let folder =
        PathBuf::from(std::env::var_os("SPORE_COMPAT").expect("SPORE_COMPAT names a directory to make"));
    let disk = disk_file(DISK_MIB);
    let mut vm =
        Setup::new("shell").memory_mib(128).vcpus(2).vsock(&[]).disk(disk.try_clone().unwrap(), false).boot();
    assert!(vm.run("smp,2").contains("online=2\n"));
    assert_eq!(vm.call(Call::SetBalloon { target_mib: BALLOON_MIB }), Ok(Reply::Done));
    assert!(vm.run("inflate,0").contains("ok inflate"));
    assert!(vm.run("store,0,1,7").contains("ok store"));
    assert!(vm.run(&format!("disk-fill,rw0,0,{SECTORS},9")).contains("ok disk-fill"));
    let saved = vm.capture(LAYER, &[("rw0", &empty_file())]);
    fs::create_dir(&folder).unwrap();
    pack(&folder, STATE, &saved.state);
    let [(_, memory)] = &saved.layers[..] else { panic!("{} layers", saved.layers.len()) };
    pack(&folder, LAYER, memory);
    pack(&folder, DISK, &disk);
}
