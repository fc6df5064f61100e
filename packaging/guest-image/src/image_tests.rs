use std::fs;

use super::*;
use crate::elf::tests::{elf, static_agent};
use crate::error::KernelError;
use crate::modules::parse_list;
use crate::payload::tests::bzimage;
use crate::source;

const RELEASE: &str = "6.12.1-test";

struct Case {
    dir: tempfile::TempDir,
}

impl Case {
    /// Kernel, modules and agent in a directory, files made in the given order.
    fn new(order: &[usize]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let modules = dir.path().join(RELEASE);
        fs::create_dir_all(modules.join("kernel/sub")).unwrap();
        for step in order {
            let module = |fill: u8| {
                let mut data = elf(1, &[], 8);
                data.fill_with_tail(fill);
                data
            };
            match step {
                0 => fs::write(modules.join("kernel/a.ko"), module(1)).unwrap(),
                1 => fs::write(modules.join("kernel/sub/b-c.ko"), module(2)).unwrap(),
                2 => fs::write(dir.path().join("agent"), static_agent()).unwrap(),
                _ => fs::write(dir.path().join("bzImage"), bzimage(RELEASE, &static_agent())).unwrap(),
            }
        }
        fs::write(modules.join("modules.dep"), "kernel/a.ko: kernel/sub/b-c.ko\nkernel/sub/b-c.ko:\n")
            .unwrap();
        Self { dir }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn build(&self) -> Result<(Kernel, Initramfs)> {
        let kernel = source::from_files(&self.path("bzImage"), Some(self.dir.path()))?;
        let wanted = parse_list("a # test\n", Path::new("modules"))?;
        let initramfs = build(&kernel, &wanted, &self.path("agent"), false)?;
        Ok((kernel, initramfs))
    }
}

trait FillTail {
    fn fill_with_tail(&mut self, fill: u8);
}

impl FillTail for Vec<u8> {
    fn fill_with_tail(&mut self, fill: u8) {
        let end = self.len();
        self[end - 8..].fill(fill);
    }
}

#[test]
fn the_same_input_gives_the_same_digest() {
    let (kernel, first) = Case::new(&[0, 1, 2, 3]).build().unwrap();
    let (other_kernel, second) = Case::new(&[3, 1, 2, 0]).build().unwrap();
    assert_eq!(sha256(&first.data), sha256(&second.data));
    let manifest_of = |kernel: &Kernel, initramfs: &Initramfs| {
        manifest(kernel, initramfs, &[Output { name: "initramfs", data: &initramfs.data }])
    };
    assert_eq!(manifest_of(&kernel, &first), manifest_of(&other_kernel, &second));
}

#[test]
fn modules_are_listed_in_load_order() {
    let (_, initramfs) = Case::new(&[0, 1, 2, 3]).build().unwrap();
    let text = String::from_utf8_lossy(&initramfs.data);
    let listing = format!("/lib/modules/{RELEASE}/kernel/sub/b-c.ko\n/lib/modules/{RELEASE}/kernel/a.ko\n");
    assert!(text.contains(&listing));
    for name in ["init", "proc", "sys", "run", "tmp", "dev/console", "dev/null", "etc/spore/modules"] {
        assert!(text.contains(&format!("{name}\0")), "{name} is missing");
    }
}

#[test]
fn a_kernel_without_modules_gets_an_empty_list() {
    let case = Case::new(&[2, 3]);
    let kernel = source::from_files(&case.path("bzImage"), None).unwrap();
    let wanted = parse_list("anything # test\n", Path::new("modules")).unwrap();
    let initramfs = build(&kernel, &wanted, &case.path("agent"), false).unwrap();
    assert!(initramfs.modules.is_empty());
}

#[test]
fn wrong_input_is_named() {
    let case = Case::new(&[0, 1, 2, 3]);
    fs::write(case.path("agent"), "#!/bin/sh\n").unwrap();
    let error = case.build().unwrap_err().to_string();
    assert!(error.contains("agent is not a static x86_64 executable"), "{error}");

    let case = Case::new(&[0, 1, 2, 3]);
    fs::write(case.path(RELEASE).join("kernel/a.ko"), "garbage").unwrap();
    assert!(matches!(case.build(), Err(Error::ModuleElf { .. })));

    let case = Case::new(&[0, 2, 3]);
    let error = case.build().unwrap_err().to_string();
    assert!(error.contains("b-c.ko"), "{error}");

    let case = Case::new(&[0, 1, 2]);
    fs::write(case.path("bzImage"), vec![0; 4096]).unwrap();
    assert!(matches!(case.build(), Err(Error::Kernel { source: KernelError::Magic { .. }, .. })));

    let case = Case::new(&[0, 1, 2, 3]);
    fs::remove_file(case.path(RELEASE).join("modules.dep")).unwrap();
    let error = case.build().unwrap_err().to_string();
    assert!(error.contains("depmod"), "{error}");

    let case = Case::new(&[0, 1, 2]);
    fs::write(case.path("bzImage"), bzimage("5.10.0-other", &static_agent())).unwrap();
    let error = case.build().unwrap_err().to_string();
    assert!(error.contains("has no modules of kernel 5.10.0-other"), "{error}");
}

#[test]
fn a_corrupt_package_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("linux-image.deb");
    fs::write(&path, "not a package").unwrap();
    match source::from_package(&path, None).unwrap_err() {
        Error::ToolMissing { tool: "dpkg-deb", .. } => {
            eprintln!("skipped: no dpkg-deb program on this machine")
        }
        Error::ToolFailed { tool: "dpkg-deb", object, .. } => assert!(object.ends_with("linux-image.deb")),
        other => panic!("{other}"),
    }
    let error = source::from_package(&dir.path().join("none.deb"), None).unwrap_err().to_string();
    assert!(error.contains("none.deb"), "{error}");
}

#[test]
fn unchanged_outputs_keep_their_time_stamp() {
    let dir = tempfile::tempdir().unwrap();
    assert!(write(dir.path(), "x", b"1").unwrap());
    let before = fs::metadata(dir.path().join("x")).unwrap().modified().unwrap();
    assert!(!write(dir.path(), "x", b"1").unwrap());
    assert_eq!(fs::metadata(dir.path().join("x")).unwrap().modified().unwrap(), before);
    assert!(write(dir.path(), "x", b"2").unwrap());
    assert_eq!(fs::read(dir.path().join("x")).unwrap(), b"2");
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "a temporary file was left");
}

/// A Debian package of a kernel whose modules are below `modules_root`; nothing when
/// dpkg-deb is not installed.
fn kernel_package(dir: &Path, modules_root: &str) -> Option<PathBuf> {
    let root = dir.join("root");
    let modules = root.join(modules_root).join("modules").join(RELEASE);
    fs::create_dir_all(modules.join("kernel")).unwrap();
    fs::create_dir_all(root.join("boot")).unwrap();
    fs::create_dir_all(root.join("DEBIAN")).unwrap();
    fs::write(modules.join("kernel/a.ko"), elf(1, &[], 8)).unwrap();
    fs::write(modules.join("modules.dep"), "kernel/a.ko:\n").unwrap();
    fs::write(root.join(format!("boot/vmlinuz-{RELEASE}")), bzimage(RELEASE, &static_agent())).unwrap();
    let control =
        "Package: linux-image-test\nVersion: 1\nArchitecture: amd64\nMaintainer: nobody\nDescription: test\n";
    fs::write(root.join("DEBIAN/control"), control).unwrap();
    let deb = dir.join("linux-image-test.deb");
    match tools::run("dpkg-deb", "dpkg", &[Path::new("-b"), &root, &deb], &deb) {
        Ok(()) => Some(deb),
        Err(Error::ToolMissing { .. }) => {
            eprintln!("skipped: no dpkg-deb program on this machine");
            None
        }
        Err(other) => panic!("{other}"),
    }
}

#[test]
fn packages_of_old_and_new_layout_unpack_once() {
    for layout in ["lib", "usr/lib"] {
        let dir = tempfile::tempdir().unwrap();
        let Some(deb) = kernel_package(dir.path(), layout) else { return };
        fs::write(dir.path().join("agent"), static_agent()).unwrap();
        let wanted = parse_list("a # test\n", Path::new("modules")).unwrap();
        let cache = dir.path().join("cache");
        let mut digests = Vec::new();
        for cache in [None, Some(cache.as_path()), Some(cache.as_path())] {
            let kernel = source::from_package(&deb, cache).unwrap();
            assert_eq!(kernel.release, RELEASE);
            let initramfs = build(&kernel, &wanted, &dir.path().join("agent"), false).unwrap();
            assert_eq!(initramfs.modules.len(), 1, "{layout}");
            digests.push(sha256(&initramfs.data));
        }
        assert!(digests.iter().all(|digest| *digest == digests[0]), "{layout}");
        assert_eq!(fs::read_dir(&cache).unwrap().count(), 1, "one unpacked package, no leftovers");
    }
}
