//! Where kernel and modules come from: a Debian kernel package, or files of the user's own.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::error::{Error, IoContext, KernelError, Result};
use crate::modules::Tree;
use crate::{payload, sha256, tools};

/// No kernel, agent or module is larger.
pub(crate) const MAX_FILE: u64 = 256 << 20;

/// A kernel image and the modules that belong to it.
#[derive(Debug)]
pub(crate) struct Kernel {
    pub(crate) path: PathBuf,
    pub(crate) image: Vec<u8>,
    pub(crate) release: String,
    /// `None`: everything is built in.
    pub(crate) modules: Option<Tree>,
    /// What it was made from, for the manifest.
    pub(crate) origin: Value,
    /// Holds the unpacked package while its modules are read.
    _scratch: Option<TempDir>,
}

/// Takes kernel and modules out of the Debian package `deb`. With `cache`, the unpacked
/// package is kept there under its digest, as unpacking takes most of the time.
pub(crate) fn from_package(deb: &Path, cache: Option<&Path>) -> Result<Kernel> {
    let digest = sha256(&read(deb, "a package")?);
    let (root, scratch) = match cache {
        Some(cache) => (unpacked_in(cache, deb, &digest)?, None),
        None => {
            let scratch = scratch_in(&std::env::temp_dir())?;
            unpack(deb, scratch.path())?;
            (scratch.path().to_owned(), Some(scratch))
        }
    };
    let path = packaged_kernel(deb, &root)?;
    let (image, release) = kernel_image(&path)?;
    let dir = root.join("usr/lib/modules").join(&release);
    if !dir.join("kernel").is_dir() {
        let pattern = "lib/modules/RELEASE/kernel";
        return Err(Error::NotAKernelPackage { path: deb.to_owned(), pattern, found: 0 });
    }
    let modules = Some(Tree::load(&dir, &release)?);
    let name = deb.file_name().map(|name| name.to_string_lossy().into_owned());
    let origin = json!({ "package": name, "sha256": digest });
    Ok(Kernel { path, image, release, modules, origin, _scratch: scratch })
}

/// The directory in `cache` that holds the unpacked `deb`; made whole or not at all.
fn unpacked_in(cache: &Path, deb: &Path, digest: &str) -> Result<PathBuf> {
    let root = cache.join(format!("unpacked-{digest}"));
    if root.is_dir() {
        return Ok(root);
    }
    std::fs::create_dir_all(cache).context("make the directory", cache)?;
    let scratch = scratch_in(cache)?;
    unpack(deb, scratch.path())?;
    match std::fs::rename(scratch.path(), &root) {
        Ok(()) => {
            let _moved = scratch.keep();
        }
        // Another build was faster; its result is as good.
        Err(_) if root.is_dir() => {}
        Err(error) => return Err(error).context("rename a temporary directory to", &root),
    }
    Ok(root)
}

fn scratch_in(dir: &Path) -> Result<TempDir> {
    tempfile::Builder::new()
        .prefix(".spore-guest-image-")
        .tempdir_in(dir)
        .context("make a temporary directory in", dir)
}

/// Unpacks `deb` into `root` and adds what its installation script would: modules.dep.
fn unpack(deb: &Path, root: &Path) -> Result<()> {
    tools::run("dpkg-deb", "dpkg", &[Path::new("-x"), deb, root], deb)?;
    let path = packaged_kernel(deb, root)?;
    let (_, release) = kernel_image(&path)?;
    // bookworm packages lib/modules, trixie usr/lib/modules; depmod looks where its own
    // machine keeps modules. A relative link makes each find the other.
    for (have, lack) in [("lib", "usr/lib"), ("usr/lib", "lib")] {
        if root.join(have).join("modules").is_dir() && !root.join(lack).join("modules").exists() {
            let parent = root.join(lack);
            std::fs::create_dir_all(&parent).context("make the directory", &parent)?;
            let up = if lack == "lib" { ".." } else { "../.." };
            let link = parent.join("modules");
            let target = Path::new(up).join(have).join("modules");
            std::os::unix::fs::symlink(target, &link).context("make the link", &link)?;
        }
    }
    if !root.join("usr/lib/modules").join(&release).join("modules.dep").exists() {
        tools::run("depmod", "kmod", &[Path::new("-b"), root, Path::new(&release)], deb)?;
    }
    Ok(())
}

/// The one kernel of an unpacked package.
fn packaged_kernel(deb: &Path, root: &Path) -> Result<PathBuf> {
    let mut images = entries(&root.join("boot"))?;
    images.retain(|file| file.file_name().is_some_and(|name| name.to_string_lossy().starts_with("vmlinuz-")));
    match images.as_slice() {
        [path] => Ok(path.clone()),
        _ => {
            let pattern = "boot/vmlinuz-*";
            Err(Error::NotAKernelPackage { path: deb.to_owned(), pattern, found: images.len() })
        }
    }
}

/// Takes a bzImage and, unless everything is built in, its directory of modules.
pub(crate) fn from_files(kernel: &Path, modules: Option<&Path>) -> Result<Kernel> {
    let (image, release) = kernel_image(kernel)?;
    let modules = match modules {
        None => None,
        Some(dir) => {
            let found = [dir.to_owned(), dir.join(&release)].into_iter().find(|dir| {
                // A directory of another kernel, named directly, must not pass.
                dir.join("kernel").is_dir()
                    && std::fs::canonicalize(dir)
                        .is_ok_and(|dir| dir.file_name().is_some_and(|name| *name == *release))
            });
            let found =
                found.ok_or_else(|| Error::NoModules { path: dir.to_owned(), release: release.clone() })?;
            Some(Tree::load(&found, &release)?)
        }
    };
    let origin = json!({ "kernel": sha256(&image) });
    Ok(Kernel { path: kernel.to_owned(), image, release, modules, origin, _scratch: None })
}

/// Reads a file of bounded size.
pub(crate) fn read(path: &Path, what: &'static str) -> Result<Vec<u8>> {
    let size = std::fs::metadata(path).context("read", path)?.len();
    if size > MAX_FILE {
        return Err(Error::TooLarge { path: path.to_owned(), what, found: size, max: MAX_FILE });
    }
    std::fs::read(path).context("read", path)
}

fn kernel_image(path: &Path) -> Result<(Vec<u8>, String)> {
    let image = read(path, "a kernel")?;
    let release = payload::parse(&image)
        .map_err(|source: KernelError| Error::Kernel { path: path.to_owned(), source })?
        .release;
    Ok((image, release))
}

fn entries(dir: &Path) -> Result<Vec<PathBuf>> {
    if !dir.is_dir() {
        return Ok(Vec::new());
    }
    let mut paths = Vec::new();
    for entry in std::fs::read_dir(dir).context("list", dir)? {
        paths.push(entry.context("list", dir)?.path());
    }
    paths.sort();
    Ok(paths)
}
