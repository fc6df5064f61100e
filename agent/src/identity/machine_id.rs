//! machine-id(5) of a container's root, where there is one.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, open, openat2};
use nix::sys::stat::Mode;

/// The second is D-Bus's, mostly a link to the first.
const PLACES: [&str; 2] = ["etc/machine-id", "var/lib/dbus/machine-id"];
const DIGITS: usize = 32;

/// Gives the machine in this root another id. Links stay within the root; what is a link itself, or holds no id, stays.
pub(super) fn renew(root: &Path) -> io::Result<()> {
    let root = open(root, OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty())?;
    let id = super::uuid(super::random()?).replace('-', "");
    for place in PLACES {
        // A fifo must not make it wait.
        let flags = OFlag::O_RDWR | OFlag::O_CLOEXEC | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK;
        let how = OpenHow::new().flags(flags).resolve(ResolveFlag::RESOLVE_IN_ROOT);
        let file: File = match openat2(&root, place, how) {
            Ok(file) => file.into(),
            Err(Errno::ENOENT | Errno::ENOTDIR | Errno::ELOOP | Errno::EISDIR | Errno::ENXIO) => continue,
            Err(error) => return Err(named(place, error.into())),
        };
        if file.metadata().map_err(|error| named(place, error))?.is_file() {
            replace(&file, &id).map_err(|error| named(place, error))?;
        }
    }
    Ok(())
}

fn named(place: &str, error: io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("/{place}: {error}"))
}

/// In place, so that who has the file open, and its mode and owner, stay.
fn replace(file: &File, id: &str) -> io::Result<()> {
    let mut old = Vec::new();
    file.take(DIGITS as u64).read_to_end(&mut old)?;
    if old.len() == DIGITS && old.iter().all(u8::is_ascii_hexdigit) {
        file.write_all_at(id.as_bytes(), 0)?;
        file.sync_data()?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::{MetadataExt, symlink};

    use super::*;

    const OLD: &str = "0123456789abcdef0123456789abcdef\n";

    #[test]
    fn a_machine_has_one_id_wherever_it_is_written_and_it_is_a_new_one() {
        let dir = tempfile::tempdir().unwrap();
        let (root, etc) = (dir.path(), dir.path().join("etc/machine-id"));
        renew(root).unwrap();
        fs::create_dir_all(root.join("etc")).unwrap();
        fs::create_dir_all(root.join("var/lib/dbus")).unwrap();
        let dbus = root.join(PLACES[1]);
        fs::write(&etc, OLD).unwrap();
        fs::write(&dbus, OLD.trim_end()).unwrap();
        let inode = fs::metadata(&etc).unwrap().ino();
        renew(root).unwrap();
        let new = fs::read_to_string(&etc).unwrap();
        assert_eq!((new.len(), new.ends_with('\n'), fs::metadata(&etc).unwrap().ino()), (33, true, inode));
        assert!(new != OLD && new.trim_end().bytes().all(|byte| byte.is_ascii_hexdigit()), "{new}");
        assert_eq!(fs::read_to_string(&dbus).unwrap(), new.trim_end());
    }

    #[test]
    fn what_is_no_id_stays_and_no_link_leads_out() {
        let dir = tempfile::tempdir().unwrap();
        let (root, etc) = (dir.path().join("root"), dir.path().join("root/etc/machine-id"));
        let outside = dir.path().join("outside");
        fs::write(&outside, OLD).unwrap();
        fs::create_dir_all(root.join("etc")).unwrap();
        for empty in ["", "uninitialized\n", "0123"] {
            fs::write(&etc, empty).unwrap();
            renew(&root).unwrap();
            assert_eq!(fs::read_to_string(&etc).unwrap(), empty);
        }
        fs::remove_file(&etc).unwrap();
        symlink(&outside, &etc).unwrap();
        renew(&root).unwrap();
        fs::remove_file(&etc).unwrap();
        fs::remove_dir(root.join("etc")).unwrap();
        // Its own name below another root is a file that is not there.
        fs::create_dir(dir.path().join("away")).unwrap();
        fs::write(dir.path().join("away/machine-id"), OLD).unwrap();
        symlink(dir.path().join("away"), root.join("etc")).unwrap();
        renew(&root).unwrap();
        fs::remove_file(root.join("etc")).unwrap();
        fs::create_dir(root.join("etc")).unwrap();
        nix::unistd::mkfifo(&etc, Mode::S_IRWXU).unwrap();
        renew(&root).unwrap();
        assert_eq!(fs::read_to_string(&outside).unwrap(), OLD);
        assert_eq!(fs::read_to_string(dir.path().join("away/machine-id")).unwrap(), OLD);
    }
}
