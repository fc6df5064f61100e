//! Boot templates: guests saved the moment their agent was ready, before anything was theirs.
//!
//! `<state_dir>/templates/<key>/` holds `state`, `memory` and `layer`, made under another name and renamed when
//! all of it is on disk. The key stands for everything that a template depends on
//! ([`HostFiles::identity`]), so that one is used as long as its key is asked for, and one whose key nothing asks
//! for any more is stale. Files of a template in use may be removed: whoever restored from them has them open.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use slog::{Logger, info, warn};

use crate::config::{Config, Machine};
use crate::rootfs::{KeyLock, Temporary, hex, sweep_temporary};
use crate::snapshot::SnapshotId;
use crate::vm::{Destination, HostFiles, Saved, Then, Vm};

/// Below the state directory.
pub(crate) const DIR: &str = "templates";
const STATE: &str = "state";
const MEMORY: &str = "memory";
/// The memory layer's id: snapshots of VMs that began here name it.
const LAYER: &str = "layer";
/// Most bytes of that.
const MOST_LAYER: u64 = 64;
/// A template that nothing was restored from for so long is removed when another is made.
const STALE: Duration = Duration::from_secs(24 * 3600);
/// Room on the host's disk that making one leaves, beside what it may take itself.
const RESERVE_MIB: u64 = 512;

/// A template to restore from.
pub(crate) struct Template {
    path: PathBuf,
    pub(crate) state: File,
    pub(crate) memory: File,
    /// The memory's id.
    pub(crate) layer: String,
}

/// A template that may be made: nobody else makes it meanwhile.
pub(crate) struct Seed {
    path: PathBuf,
    _lock: KeyLock,
}

/// What there is for a machine.
pub(crate) enum Found {
    Template(Template),
    Seed(Seed),
    /// Templates are switched off, somebody else is making this one, or there is no room.
    Nothing,
}

/// Looks for the machine's template.
pub(crate) fn find(config: &Config, files: &HostFiles, machine: &Machine, log: &Logger) -> Found {
    // Who debugs a boot wants to see it.
    if !config.boot_templates || machine.debug {
        return Found::Nothing;
    }
    let found = files
        .identity(config, machine)
        .and_then(|identity| look(&config.state_dir.join(DIR), &hex(&identity)));
    match found {
        Ok(Found::Seed(_)) if !has_room(&config.state_dir, machine.memory_mib) => {
            info!(log, "no template is made: the host's disk is too full"; "directory" => config.state_dir.display());
            Found::Nothing
        }
        Ok(found) => found,
        Err(error) => {
            warn!(log, "templates cannot be used"; "directory" => config.state_dir.join(DIR).display(), "error" => %error);
            Found::Nothing
        }
    }
}

fn look(dir: &Path, key: &str) -> io::Result<Found> {
    let path = dir.join(key);
    match open(&path) {
        Ok(template) => return Ok(Found::Template(template)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error),
    }
    DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
    let Some(lock) = KeyLock::try_acquire(&path)? else { return Ok(Found::Nothing) };
    // Made while the lock was being taken.
    match open(&path) {
        Ok(template) => Ok(Found::Template(template)),
        Err(_) => {
            // One of another build of the shim, which lacks a file.
            let _ = fs::remove_dir_all(&path);
            Ok(Found::Seed(Seed { path, _lock: lock }))
        }
    }
}

/// Both files of one template, whatever takes its name meanwhile.
fn open(path: &Path) -> io::Result<Template> {
    use nix::fcntl::{OFlag, openat};
    use nix::sys::stat::Mode;
    let dir = OpenOptions::new().read(true).custom_flags(libc::O_DIRECTORY | libc::O_NOFOLLOW).open(path)?;
    let file = |name: &str| -> io::Result<File> {
        Ok(openat(&dir, name, OFlag::O_RDONLY | OFlag::O_CLOEXEC | OFlag::O_NOFOLLOW, Mode::empty())?.into())
    };
    let mut layer = String::new();
    file(LAYER)?.take(MOST_LAYER).read_to_string(&mut layer)?;
    let template = Template { path: path.into(), state: file(STATE)?, memory: file(MEMORY)?, layer };
    // When it was last used: `STALE` counts from here.
    let _ = dir.set_modified(SystemTime::now());
    Ok(template)
}

fn has_room(dir: &Path, memory_mib: u64) -> bool {
    nix::sys::statvfs::statvfs(dir).is_ok_and(|host| {
        let free_mib = (host.blocks_available() * host.fragment_size()) >> 20;
        free_mib >= memory_mib + RESERVE_MIB
    })
}

impl Template {
    /// Removes it: it cannot be used.
    pub(crate) fn discard(&self) {
        let _ = fs::remove_dir_all(&self.path);
    }
}

impl Seed {
    /// Saves the guest, which goes on meanwhile, and publishes the template when it is on disk.
    pub(crate) async fn plant(self, vm: &Vm, log: Logger) {
        let planted = async {
            let dir = self.path.parent().unwrap_or(Path::new("/"));
            let temporary = Temporary::new(dir, "template");
            DirBuilder::new().mode(0o700).create(temporary.path())?;
            let file = |name| {
                OpenOptions::new().write(true).create_new(true).mode(0o600).open(temporary.path().join(name))
            };
            let layer = SnapshotId::random()?.to_string();
            let mut named = file(LAYER)?;
            named.write_all(layer.as_bytes())?;
            named.sync_all()?;
            let (state, memory) = (file(STATE)?, file(MEMORY)?);
            let to = Destination { state: &state, memory: &memory, layer: &layer, disks: &[] };
            let saved = vm.save(&to, Then::GoOn).await.map_err(io::Error::other)?;
            Ok::<_, io::Error>((temporary, saved))
        };
        match planted.await {
            Ok((temporary, saved)) => drop(tokio::spawn(self.follow(temporary, saved, log))),
            Err(error) => {
                warn!(log, "no template is made"; "template" => self.path.display(), "error" => %error)
            }
        }
    }

    async fn follow(self, temporary: Temporary, saved: Saved, log: Logger) {
        let published = match saved.written().await {
            Ok(_) => tokio::task::spawn_blocking(move || self.publish(temporary))
                .await
                .unwrap_or_else(|error| Err(io::Error::other(error))),
            Err(error) => Err(io::Error::other(error)),
        };
        match published {
            Ok(path) => info!(log, "a template is ready"; "template" => path.display()),
            Err(error) => warn!(log, "no template is made"; "error" => %error),
        }
    }

    fn publish(self, temporary: Temporary) -> io::Result<PathBuf> {
        // The writer has made the files durable, not their names.
        File::open(temporary.path())?.sync_all()?;
        temporary.publish(&self.path)?;
        let dir = self.path.parent().unwrap_or(Path::new("/"));
        sweep_temporary(dir);
        prune(dir);
        Ok(self.path)
    }
}

/// Removes templates that have not been used for long.
fn prune(dir: &Path) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let stale = entry
            .metadata()
            .and_then(|metadata| metadata.modified())
            .is_ok_and(|used| SystemTime::now().duration_since(used).is_ok_and(|age| age > STALE));
        if stale && !entry.file_name().as_encoded_bytes().starts_with(b".") {
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: &str = "abc";

    fn seed(dir: &Path) -> Seed {
        match look(dir, KEY).unwrap() {
            Found::Seed(seed) => seed,
            Found::Template(_) => panic!("there is a template"),
            Found::Nothing => panic!("somebody else makes one"),
        }
    }

    fn published(dir: &Path) -> PathBuf {
        let temporary = Temporary::new(dir, "template");
        fs::create_dir(temporary.path()).unwrap();
        for name in [STATE, MEMORY, LAYER] {
            fs::write(temporary.path().join(name), name).unwrap();
        }
        seed(dir).publish(temporary).unwrap()
    }

    #[test]
    fn one_makes_a_template_and_others_find_it() {
        let dir = tempfile::tempdir().unwrap();
        let first = seed(dir.path());
        assert!(matches!(look(dir.path(), KEY).unwrap(), Found::Nothing), "two make the same");
        drop(first);
        let path = published(dir.path());
        let Found::Template(template) = look(dir.path(), KEY).unwrap() else { panic!("not found") };
        assert_eq!(io::read_to_string(&template.memory).unwrap(), MEMORY);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "{}", path.display());
    }

    #[test]
    fn a_template_that_is_no_use_is_removed_and_made_again() {
        let dir = tempfile::tempdir().unwrap();
        published(dir.path());
        let Found::Template(template) = look(dir.path(), KEY).unwrap() else { panic!("not found") };
        template.discard();
        drop(seed(dir.path()));
        assert_eq!(io::read_to_string(&template.state).unwrap(), STATE, "who has it open keeps it");
    }

    #[test]
    fn half_a_template_is_none_and_what_a_dead_maker_left_goes() {
        let dir = tempfile::tempdir().unwrap();
        let dead = dir.path().join(".tmp-4194303-1-4194303-1-0-template");
        fs::create_dir(&dead).unwrap();
        fs::write(dead.join(STATE), "half").unwrap();
        published(dir.path());
        assert!(!dead.exists());
    }

    #[test]
    fn templates_that_nothing_asks_for_go_when_another_is_made() {
        let dir = tempfile::tempdir().unwrap();
        let old = dir.path().join("old");
        fs::create_dir(&old).unwrap();
        File::open(&old).unwrap().set_modified(SystemTime::now() - 2 * STALE).unwrap();
        let path = published(dir.path());
        assert!(!old.exists() && path.exists());
    }
}
