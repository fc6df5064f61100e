//! The host's directories and files in the guest: one virtio-fs file system that shows each of
//! them by number, mounted when the first container wants one. Blocking; called from worker
//! threads.

use std::fs;
use std::path::{Component, Path};
use std::sync::{Mutex, PoisonError};

use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use spore_agent_api::{VOLUMES_DIR, VOLUMES_TAG};

use crate::boot::modules;
use crate::error::{AgentError, Result};
use crate::say;

/// Whether the file system is mounted.
#[derive(Debug, Default)]
pub struct Volumes(Mutex<bool>);

/// Whether `source` is one of the host's directories or files, as the shim names them.
pub fn is_volume(source: &Path) -> bool {
    let Ok(below) = source.strip_prefix(VOLUMES_DIR) else { return false };
    let mut components = below.components();
    match (components.next(), components.next()) {
        (Some(Component::Normal(name)), None) => {
            name.to_str().is_some_and(|name| name.parse::<u32>().is_ok())
        }
        _ => false,
    }
}

impl Volumes {
    /// Mounts the file system, once.
    pub fn mount(&self) -> Result<()> {
        let mut mounted = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if *mounted {
            return Ok(());
        }
        modules::load_listed(modules::VOLUMES);
        fs::create_dir_all(VOLUMES_DIR).map_err(|error| AgentError::internal(VOLUMES_DIR, error))?;
        let flags = MsFlags::MS_NODEV;
        mount(Some(VOLUMES_TAG), VOLUMES_DIR, Some("virtiofs"), flags, None::<&str>).map_err(|error| {
            let mend = match error {
                Errno::ENODEV => "; the guest's kernel lacks virtiofs",
                Errno::EINVAL => "; the machine has no such device",
                _ => "",
            };
            AgentError::Internal(format!("volumes: mount virtiofs \"{VOLUMES_TAG}\": {}{mend}", error.desc()))
        })?;
        *mounted = true;
        Ok(())
    }

    /// Unmounts it, for shutdown.
    pub fn unmount(&self) {
        let mut mounted = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if std::mem::take(&mut *mounted)
            && let Err(error) = umount2(VOLUMES_DIR, MntFlags::MNT_DETACH)
        {
            say!("volumes: unmount {VOLUMES_DIR}: {error}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_volume_is_a_number_below_its_directory() {
        assert!(is_volume(Path::new("/run/spore/volumes/0")));
        assert!(is_volume(Path::new("/run/spore/volumes/17")));
        for other in ["/run/spore/volumes", "/run/spore/volumes/1/x", "/run/spore/volumes/../disks", "/etc"] {
            assert!(!is_volume(Path::new(other)), "{other}");
        }
        assert!(!is_volume(Path::new("/run/spore/volumes/x")));
    }
}
