//! The cache of EROFS images: `<state_dir>/images/<key>.erofs`, made once, never changed,
//! shared by every sandbox.

use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use sha2::{Digest, Sha256};
use tokio::io::AsyncWriteExt;

use super::build::{DISK_FULL, Input, Job, SUBCOMMAND};
use super::{Image, RootfsError, superblock, temporary};
use crate::process::ProcessId;

const KILL_DEADLINE: Duration = Duration::from_secs(5);

/// Whether the file is a sound EROFS image.
pub(super) fn is_erofs(path: &Path) -> bool {
    superblock::open(path).is_ok()
}

/// Opens an image after the same check.
pub(super) fn open(path: &Path) -> Result<File, RootfsError> {
    superblock::open(path)
        .map_err(|source| RootfsError::BadImage { path: path.into(), detail: source.to_string() })
}

/// A key from what the layers are, for when nobody can tell their chain id: device, inode
/// and change time of each, in order. A layer that is touched, replaced or reordered has
/// another key; so an image that is found by its key fits.
pub(super) fn directories_key(lowers: &[PathBuf]) -> Result<String, RootfsError> {
    let mut hash = Sha256::new();
    for lower in lowers {
        let metadata = std::fs::metadata(lower).map_err(|source| RootfsError::Host {
            operation: "look at the layer",
            path: lower.clone(),
            source,
        })?;
        for number in [metadata.dev(), metadata.ino()] {
            hash.update(number.to_le_bytes());
        }
        for number in [metadata.ctime(), metadata.ctime_nsec()] {
            hash.update(number.to_le_bytes());
        }
    }
    Ok(format!("dirs-{}", hex(&hash.finalize())))
}

/// A key from a chain id: the layers' content, whatever directory they are in.
pub(super) fn chain_key(chain_id: &str) -> Option<String> {
    let digest = chain_id.strip_prefix("sha256:")?;
    (digest.len() == 64 && digest.bytes().all(|byte| byte.is_ascii_hexdigit()))
        .then(|| format!("chain-{}", digest.to_ascii_lowercase()))
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The image of merged layers, from the cache or made now.
pub(super) async fn merged(state_dir: &Path, key: &str, lowers: &[PathBuf]) -> Result<Image, RootfsError> {
    let target = state_dir.join("images").join(format!("{key}.erofs"));
    if let Ok(file) = superblock::open(&target) {
        return Ok(Image::cached(file, &target));
    }
    // A file that fails the check is replaced: the lock's holder checks again.
    match make(state_dir, Input::Merged(lowers.to_vec()), &target, false).await {
        Err(error) => Err(with_bad_image(&target, error)),
        Ok(()) => Ok(Image::cached(open(&target)?, &target)),
    }
}

/// Where a damaged image is in the way, the user is told of it first: removing it may help.
fn with_bad_image(target: &Path, error: RootfsError) -> RootfsError {
    match (superblock::open(target), error) {
        (Err(bad), RootfsError::Build { path, detail }) if bad.kind() != io::ErrorKind::NotFound => {
            RootfsError::BadImage { path, detail: format!("{bad}, and cannot be replaced: {detail}") }
        }
        (_, error) => error,
    }
}

/// The image of one directory as it is, beside the writable layer.
pub(super) async fn tree(
    state_dir: &Path,
    directory: &Path,
    target: &Path,
    replace: bool,
) -> Result<File, RootfsError> {
    if replace || !is_erofs(target) {
        make(state_dir, Input::Tree(directory.into()), target, replace).await?;
    }
    open(target)
}

async fn make(state_dir: &Path, input: Input, target: &Path, replace: bool) -> Result<(), RootfsError> {
    let dir = target.parent().unwrap_or(state_dir);
    super::private_dir(dir)?;
    temporary::sweep(dir);
    let job = Job { input, target: target.into(), replace, mount_point: state_dir.join("images/.mnt") };
    let fail = |detail: String| RootfsError::Build { path: target.into(), detail };
    let text = serde_json::to_vec(&job).map_err(|error| fail(error.to_string()))?;
    let child = tokio::process::Command::new("/proc/self/exe")
        .arg(SUBCOMMAND)
        .current_dir("/")
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .map_err(|error| fail(format!("start {SUBCOMMAND}: {error}")))?;
    let result =
        Builder { id: child.id().and_then(|pid| ProcessId::of(pid).ok()), dir }.run(child, &text).await;
    let result = result.map_err(|error| fail(format!("{SUBCOMMAND}: {error}")))?;
    if result.status.success() {
        return Ok(());
    }
    let text = String::from_utf8_lossy(&result.stderr);
    let text = text.trim().trim_start_matches(crate::RUNTIME).trim_start_matches(": ").to_string();
    if text.to_lowercase().contains(DISK_FULL) {
        return Err(RootfsError::DiskFull { path: dir.into(), detail: text });
    }
    Err(fail(if text.is_empty() { format!("{SUBCOMMAND} ended with {}", result.status) } else { text }))
}

/// A builder at work. Given up (the task is abandoned), it is ended and its file removed.
struct Builder<'a> {
    id: Option<ProcessId>,
    dir: &'a Path,
}

impl Builder<'_> {
    async fn run(self, mut child: tokio::process::Child, job: &[u8]) -> io::Result<std::process::Output> {
        if let Some(mut stdin) = child.stdin.take() {
            // A builder that ends early says why on its standard error.
            let _ = stdin.write_all(job).await;
        }
        child.wait_with_output().await
    }
}

impl Drop for Builder<'_> {
    fn drop(&mut self) {
        if let Some(id) = self.id {
            let _ = id.kill(KILL_DEADLINE);
        }
        temporary::sweep(self.dir);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_content_addressed_parents_make_a_chain_key() {
        let digest = "ab".repeat(32);
        assert_eq!(chain_key(&format!("sha256:{digest}")), Some(format!("chain-{digest}")));
        assert_eq!(chain_key("my-snapshot"), None);
        assert_eq!(chain_key("sha256:../../etc"), None);
        assert_eq!(chain_key(""), None);
    }

    #[test]
    fn a_layers_identity_and_order_are_in_the_key() {
        let dir = tempfile::tempdir().unwrap();
        let (a, b) = (dir.path().join("a"), dir.path().join("b"));
        std::fs::create_dir(&a).unwrap();
        std::fs::create_dir(&b).unwrap();
        let key = directories_key(&[a.clone(), b.clone()]).unwrap();
        assert_eq!(key, directories_key(&[a.clone(), b.clone()]).unwrap());
        assert_ne!(key, directories_key(&[b.clone(), a.clone()]).unwrap());
        std::fs::write(a.join("new"), b"").unwrap();
        assert_ne!(key, directories_key(&[a.clone(), b]).unwrap());
        let gone = directories_key(&[dir.path().join("gone")]).unwrap_err().to_string();
        assert!(gone.contains("gone"), "{gone}");
    }

    #[test]
    fn a_bad_image_that_cannot_be_replaced_is_the_error() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.erofs");
        let failed = || RootfsError::Build { path: path.clone(), detail: "rename: busy".into() };
        assert!(matches!(with_bad_image(&path, failed()), RootfsError::Build { .. }), "there is none");
        std::fs::write(&path, vec![0; 8192]).unwrap();
        let message = with_bad_image(&path, failed()).to_string();
        for part in ["x.erofs: not an EROFS file system", "rename: busy", "it is made again"] {
            assert!(message.contains(part), "{message}");
        }
        let full = RootfsError::DiskFull { path: path.clone(), detail: "full".into() };
        assert!(matches!(with_bad_image(&path, full), RootfsError::DiskFull { .. }));
    }

    #[test]
    fn a_bad_image_is_named_with_its_mend() {
        let file = tempfile::NamedTempFile::new().unwrap();
        assert!(!is_erofs(file.path()));
        let message = open(file.path()).unwrap_err().to_string();
        let name = file.path().display().to_string();
        assert!(message.contains(&name) && message.contains("remove the file"), "{message}");
    }
}
