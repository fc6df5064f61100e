//! What tells this guest from every other, and this life of it from those before.
//!
//! * A guest that is restored from a template shares its kernel's boot id with all others of that template, so containers
//!   see another file in its place.
//! * The generation changes whenever the guest has been restored ([`generation`]). The file stays the same one: who watches it
//!   (inotify(7)) is told.
//! * A clone's container gets more of its own while it is paused: [`name`], [`machine_id`], [`sockets`].

pub(crate) mod generation;
mod machine_id;
mod name;
mod sockets;

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use oci_spec::runtime::{Mount, MountBuilder};

use crate::container::life::Container;
use crate::error::{AgentError, Result};

/// Mounted over [`KERNELS`] in every container that has a `/proc`.
pub(crate) const BOOT_ID: &str = "/run/spore/boot-id";
/// random(4).
pub(crate) const KERNELS: &str = "/proc/sys/kernel/random/boot_id";
const SHOWN: &str = "/dev/spore/generation";
const SHOWN_SOCKET: &str = "/dev/spore/generation.sock";

/// Makes a new boot id or generation, a line, from the kernel's random numbers: called when these have been reseeded.
/// The file stays the same one, so that it changes in containers that run; it is written at once, so that nobody
/// finds half of it.
pub(crate) fn renew(at: &Path) -> io::Result<String> {
    if let Some(dir) = at.parent() {
        std::fs::create_dir_all(dir)?;
    }
    let file = File::options().write(true).create(true).truncate(false).open(at)?;
    let line = uuid(random()?) + "\n";
    file.write_all_at(line.as_bytes(), 0)?;
    Ok(line)
}

fn random() -> io::Result<[u8; 16]> {
    let mut random = [0; 16];
    io::Read::read_exact(&mut File::open("/dev/urandom")?, &mut random)?;
    Ok(random)
}

/// What of this containers see: mounts behind those of a spec that has these.
pub(crate) fn shown(mounts: &[Mount]) -> Result<Vec<Mount>> {
    let has = |at: &str, kind: &str| {
        mounts
            .iter()
            .any(|mount| mount.destination() == Path::new(at) && mount.typ().as_deref() == Some(kind))
    };
    let mut shown = Vec::new();
    if has("/proc", "proc") {
        shown.push(read_only(BOOT_ID, KERNELS)?);
    }
    // Elsewhere its mount point would be a change of the container's root.
    if has("/dev", "tmpfs") {
        shown.push(read_only(generation::FILE, SHOWN)?);
        // Where it could not be made there is the file alone.
        if Path::new(generation::SOCKET).exists() {
            shown.push(read_only(generation::SOCKET, SHOWN_SOCKET)?);
        }
    }
    Ok(shown)
}

fn read_only(source: &str, at: &str) -> Result<Mount> {
    MountBuilder::default()
        .destination(at)
        .typ("bind")
        .source(source)
        .options(["bind", "ro", "nosuid", "nodev", "noexec"].map(String::from).to_vec())
        .build()
        .map_err(|error| AgentError::internal(format!("config.json: mount of {at}"), error))
}

/// Gives a paused container of a clone what is its own; returns how many sockets were reset.
pub(crate) async fn identify(container: Arc<Container>, hostname: String) -> Result<usize> {
    name::check(&hostname)?;
    let (named, pid) = (container.name_of(""), container.init.pid());
    container
        .with_root(move |root| {
            let failed = |what: &str, error| AgentError::internal(format!("{named}: {what}"), error);
            name::set(pid, &hostname).map_err(|error| failed("host name", error))?;
            machine_id::renew(root).map_err(|error| failed("machine id", error))?;
            sockets::reset(pid).map_err(|error| failed("reset TCP sockets of another address", error))
        })
        .await
}

/// RFC 9562, section 5.4: a version 4 UUID.
fn uuid(mut bytes: [u8; 16]) -> String {
    bytes[6] = bytes[6] & 0x0f | 0x40;
    bytes[8] = bytes[8] & 0x3f | 0x80;
    let mut text = String::with_capacity(36);
    for (index, byte) in bytes.iter().enumerate() {
        if matches!(index, 4 | 6 | 8 | 10) {
            text.push('-');
        }
        text.push_str(&format!("{byte:02x}"));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_boot_id_is_a_random_uuid_with_a_newline_as_the_kernels() {
        assert_eq!(uuid([0xff; 16]), "ffffffff-ffff-4fff-bfff-ffffffffffff");
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("made/boot-id");
        renew(&path).unwrap();
        let first = std::fs::read_to_string(&path).unwrap();
        let renewed = renew(&path).unwrap();
        let second = std::fs::read_to_string(&path).unwrap();
        assert_eq!((first.len(), first.ends_with('\n')), (37, true));
        assert_ne!(first, second);
        assert_eq!(renewed, second);
    }

    #[test]
    fn a_generation_that_is_watched_changes_at_once_and_in_place() {
        use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("generation");
        renew(&path).unwrap();
        let watch = Inotify::init(InitFlags::IN_NONBLOCK).unwrap();
        watch.add_watch(&path, AddWatchFlags::IN_MODIFY).unwrap();
        renew(&path).unwrap();
        let events = watch.read_events().unwrap();
        assert_eq!(events.len(), 1, "{events:?}");
    }

    #[test]
    fn containers_see_it_where_a_mount_point_changes_nothing_of_theirs() {
        let mount = |at: &str, kind: &str| {
            MountBuilder::default().destination(at).typ(kind).source(kind).build().unwrap()
        };
        let at = |mounts: &[Mount]| -> Vec<String> {
            let shown = shown(mounts).unwrap();
            shown.iter().map(|mount| mount.destination().display().to_string()).collect()
        };
        assert_eq!(at(&[mount("/proc", "proc"), mount("/dev", "tmpfs")]), [KERNELS, SHOWN]);
        assert_eq!(at(&[mount("/proc", "tmpfs"), mount("/dev", "bind")]), [""; 0]);
    }
}
