//! The cache of what is slow to make and can be made again: `$SPORE_CACHE`, else
//! `~/.cache/spore`. An entry's name ends in the digest of everything that it was made from.
//! An entry appears whole or not at all (it is made beside and renamed), one process makes it
//! while others wait, and older entries of the same kind go when a new one comes.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use nix::fcntl::{Flock, FlockArg};
use sha2::{Digest, Sha256};

/// Entries of one kind that stay: the newest, and those of a checkout or two beside.
const KEEP: usize = 3;

/// The cache's directory, made if missing.
pub fn directory() -> Result<PathBuf> {
    let directory = match std::env::var_os("SPORE_CACHE") {
        Some(directory) => PathBuf::from(directory),
        None => {
            let home = std::env::var_os("HOME")
                .context("neither SPORE_CACHE nor HOME is set: where to keep the cache?")?;
            PathBuf::from(home).join(".cache/spore")
        }
    };
    fs::create_dir_all(&directory).with_context(|| {
        format!("making the cache directory {}; set SPORE_CACHE to a writable place", directory.display())
    })?;
    Ok(directory)
}

/// Digest of the inputs, short enough for a file name.
#[derive(Default)]
pub struct Key(Sha256);

impl Key {
    #[must_use]
    pub fn with(mut self, part: impl AsRef<[u8]>) -> Self {
        let part = part.as_ref();
        self.0.update((part.len() as u64).to_le_bytes());
        self.0.update(part);
        self
    }

    fn name(self) -> String {
        self.0.finalize().iter().take(8).map(|byte| format!("{byte:02x}")).collect()
    }
}

/// The entry `kind-KEY`, made by `make` (which gets the path of a directory to fill) if the
/// cache lacks it.
pub fn entry(kind: &str, key: Key, make: impl FnOnce(&Path) -> Result<()>) -> Result<PathBuf> {
    let cache = directory()?;
    let path = cache.join(format!("{kind}-{}", key.name()));
    if !path.exists() {
        let lock = File::create(cache.join(format!("{kind}.lock")))?;
        let _lock = Flock::lock(lock, FlockArg::LockExclusive)
            .map_err(|(_, errno)| errno)
            .with_context(|| format!("locking {kind} of the cache {}", cache.display()))?;
        // Another process may have made it meanwhile.
        if !path.exists() {
            let draft = tempfile::Builder::new().prefix(&format!("{kind}.draft-")).tempdir_in(&cache)?;
            make(draft.path()).with_context(|| format!("making {kind} for the cache {}", cache.display()))?;
            fs::rename(draft.keep(), &path)?;
            prune(&cache, kind, &path)?;
        }
    }
    // The order of use decides what is pruned.
    File::open(&path)?.set_modified(std::time::SystemTime::now()).ok();
    Ok(path)
}

/// Removes drafts of processes that were killed, and all but the newest entries.
fn prune(cache: &Path, kind: &str, fresh: &Path) -> Result<()> {
    let mut entries = Vec::new();
    for entry in fs::read_dir(cache)? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if name.starts_with(&format!("{kind}.draft-")) {
            // Its maker held the lock that we hold now, so it is gone.
            fs::remove_dir_all(entry.path())?;
        } else if name.strip_prefix(kind).is_some_and(|rest| rest.starts_with('-')) && entry.path() != fresh {
            entries.push((entry.metadata()?.modified()?, entry.path()));
        }
    }
    entries.sort();
    for (_, path) in entries.iter().rev().skip(KEEP - 1) {
        fs::remove_dir_all(path)?;
    }
    Ok(())
}
