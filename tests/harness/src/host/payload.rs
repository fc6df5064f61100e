//! The payload: what is under test and the programs that test it, packed into a read-only
//! disk image keyed by content.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use sha2::{Digest, Sha256};

use super::{cache, rootfs};
use crate::job::{APPLICATIONS, CHECKOUT};

/// Where cargo leaves the binaries, below the checkout.
pub const BINARIES: &str = "target/x86_64-unknown-linux-gnu/release";
/// Where the guest image's build leaves kernel and initramfs.
pub const GUEST: &str = "target/guest";

/// Programs that test: path in the checkout, path on the payload disk.
const PROGRAMS: &[(&str, &str)] = &[
    ("target/x86_64-unknown-linux-gnu/release/spore-testbed", "bin/spore-testbed"),
    ("target/x86_64-unknown-linux-gnu/release/spore-e2e", "bin/spore-e2e"),
    ("target/x86_64-unknown-linux-gnu/release/spore-conformance", "bin/spore-conformance"),
    ("target/x86_64-unknown-linux-gnu/release/spore-bench", "bin/spore-bench"),
];

/// What is tested, and what installs it; at the same path below [`CHECKOUT`] of the payload disk.
const PRODUCT: &[&str] = &[
    "packaging/install",
    "packaging/config.toml",
    "target/x86_64-unknown-linux-gnu/release/containerd-shim-spore-v2",
    "target/x86_64-unknown-linux-gnu/release/spore",
    "target/x86_64-unknown-linux-gnu/release/spore-vmm",
    "target/x86_64-unknown-linux-gnu/release/spore-fs",
    "target/guest/vmlinuz",
    "target/guest/vmlinux",
    "target/guest/initramfs",
    "target/guest/manifest.json",
    // packaging/guest-image/build --kernel target/kernel/bzImage --out target/guest-slim
    "target/guest-slim/vmlinuz",
    "target/guest-slim/vmlinux",
    "target/guest-slim/initramfs",
];

/// The disk image, with the image of applications when it is given one. What is not built is left out; the ground says so when
/// it is asked for.
pub fn prepare(repository: &Path, applications: Option<&Path>) -> Result<PathBuf> {
    let mut present = Vec::new();
    let mut key = cache::Key::default().with("1");
    let mut size = 0;
    let programs = PROGRAMS.iter().map(|(from, to)| (*from, PathBuf::from(to)));
    let product = PRODUCT.iter().map(|from| (*from, Path::new(CHECKOUT).join(from)));
    let images = applications.map(|from| (from, PathBuf::from(APPLICATIONS)));
    let relative = programs.chain(product).map(|(from, to)| (Path::new(from), to));
    for (from, to) in relative.chain(images) {
        // A path that is absolute stays what it is.
        let path = repository.join(from);
        match fs::read(&path) {
            Ok(content) => {
                size += content.len() as u64;
                key = key.with(to.as_os_str().as_encoded_bytes()).with(Sha256::digest(&content));
                present.push((path, to));
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => return Err(error).with_context(|| format!("reading {}", path.display())),
        }
    }
    let entry = cache::entry("payload", key, |draft| {
        let tree = draft.join("tree");
        for (from, to) in &present {
            let to = tree.join(to);
            fs::create_dir_all(to.parent().unwrap_or(&tree))?;
            fs::copy(from, &to)?;
        }
        rootfs::make_disk(&tree, &draft.join("disk.img"), size + size / 8 + (16 << 20))?;
        fs::remove_dir_all(&tree)?;
        Ok(())
    })?;
    Ok(entry.join("disk.img"))
}
