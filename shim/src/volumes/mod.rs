//! Host directories and files in the guest (`-v`, `--mount type=bind`, what clients put into
//! `/etc`): each becomes a mount of its own, which nobody else sees and which goes with its
//! descriptor, and a process of its own, `spore-fs`, serves them to the VMM's virtio-fs device.
//!
//! The server gets descriptors only. What a volume does not allow, its mount does not: the
//! kernel refuses writes to a read-only one, and device nodes in all of them.
//!
//! A checkpoint has the server's tables and where each volume was mounted ([`saved`]), never what is in the files.

mod mount;
pub mod protocol;
mod saved;
mod server;

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::sys::stat::{SFlag, fstat};
use spore_agent_api::VOLUMES_DIR;

pub(crate) use self::saved::{SavedVolumes, matched};
pub(crate) use self::server::FileServer;
use crate::checkpoint::blocking;
use crate::config::Config;
use crate::error::Error;
use crate::snapshot::manifest::ExportKind;
use crate::vm::{FILE_SERVER_LOG, Vm};

#[derive(Debug, thiserror::Error)]
pub(crate) enum VolumeError {
    /// Worded as runc's.
    #[error(
        "OCI runtime create failed: error mounting \"{source_path}\" to rootfs at \"{destination}\": {cause}"
    )]
    Source { source_path: PathBuf, destination: PathBuf, cause: String },
    #[error(
        "volume {source_path} on {destination}: {kind} of the host cannot be used in a virtual machine; mount a directory or a regular file"
    )]
    Kind { source_path: PathBuf, destination: PathBuf, kind: &'static str },
    #[error(
        "bind mount on {destination}: the checkpoint was taken with one, and the container has none; create it with the mounts of the container that was checkpointed"
    )]
    Missing { destination: String },
    #[error(
        "bind mount on {destination}: the checkpoint was taken without it, and a restored container cannot get another; create it without"
    )]
    Surplus { destination: String },
    #[error(
        "bind mount {source_path} on {destination}: it is a {found}, and was a {saved} when the checkpoint was taken; mount a {saved}"
    )]
    Other { source_path: PathBuf, destination: PathBuf, found: ExportKind, saved: ExportKind },
    #[error("file server {path}: {operation}: {source}")]
    Server { path: PathBuf, operation: &'static str, source: std::io::Error },
    #[error("file server: {0}")]
    Refused(String),
}

/// A bind mount of the spec.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Volume {
    pub(crate) source: PathBuf,
    pub(crate) destination: PathBuf,
    pub(crate) read_only: bool,
    /// With what is mounted below it.
    pub(crate) recursive: bool,
}

/// Whether a mount of the spec binds a path, as runc takes it.
pub(crate) fn is_bind(kind: &str, options: &[impl AsRef<str>]) -> bool {
    let binds = |option: &str| matches!(option, "bind" | "rbind");
    binds(kind) || options.iter().any(|option| binds(option.as_ref()))
}

/// Whether it does, and what is written there is written on the host.
pub fn is_writable_bind(kind: &str, options: &[String]) -> bool {
    is_bind(kind, options) && !Volume::new(PathBuf::new(), Path::new(""), options).read_only
}

/// How the guest's spec names the volume with this number.
pub(crate) fn guest_path(number: usize) -> String {
    format!("{VOLUMES_DIR}/{number}")
}

/// Starts the server of a machine's volumes, if it has some; it goes on with the `saved` ones, in whose order they are.
pub(crate) async fn serve(
    config: &Config,
    vm: &Vm,
    volumes: &[Volume],
    saved: Option<SavedVolumes>,
) -> Result<Option<(FileServer, Vec<UnixStream>)>, Error> {
    if volumes.is_empty() {
        return Ok(None);
    }
    let dir_error = |source| Error::RunDir { path: vm.dir().path().into(), source };
    let log = vm.dir().create_file(&vm.file_name(FILE_SERVER_LOG)).map_err(dir_error)?;
    let (program, volumes) = (config.file_server.clone(), volumes.to_vec());
    blocking(move || FileServer::start(&program, log, &volumes, saved.as_ref())).await.map(Some)
}

impl Volume {
    pub(crate) fn new(source: PathBuf, destination: &Path, options: &[String]) -> Self {
        // The last word counts, as with mount(8).
        let read_only = options.iter().rev().find_map(|option| match option.as_str() {
            "ro" | "rro" => Some(true),
            "rw" => Some(false),
            _ => None,
        });
        Self {
            source,
            destination: destination.into(),
            read_only: read_only.unwrap_or(false),
            recursive: options.iter().any(|option| option == "rbind"),
        }
    }

    /// As a spec has it, which is text.
    fn destination(&self) -> String {
        self.destination.to_string_lossy().into_owned()
    }

    /// Makes a mount of its own of the source, restricted to what the volume allows.
    fn open(&self) -> Result<(OwnedFd, ExportKind), VolumeError> {
        let failed = |error: std::io::Error| VolumeError::Source {
            source_path: self.source.clone(),
            destination: self.destination.clone(),
            cause: match error.raw_os_error() {
                Some(number) => Errno::from_raw(number).desc().to_lowercase(),
                None => error.to_string(),
            },
        };
        let mount = mount::clone(&self.source, self.recursive).map_err(failed)?;
        let status = fstat(mount.as_fd()).map_err(|error| failed(error.into()))?;
        let kind = match SFlag::from_bits_truncate(status.st_mode) & SFlag::S_IFMT {
            SFlag::S_IFDIR => Ok(ExportKind::Directory),
            SFlag::S_IFREG => Ok(ExportKind::File),
            SFlag::S_IFSOCK => Err("a socket"),
            SFlag::S_IFIFO => Err("a fifo"),
            SFlag::S_IFBLK | SFlag::S_IFCHR => Err("a device"),
            _ => Err("a file of an unknown kind"),
        };
        let kind = kind.map_err(|kind| VolumeError::Kind {
            source_path: self.source.clone(),
            destination: self.destination.clone(),
            kind,
        })?;
        mount::restrict(&mount, self.read_only).map_err(failed)?;
        Ok((mount, kind))
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn volume(source: &Path, options: &[&str]) -> Volume {
        let options: Vec<_> = options.iter().map(|option| (*option).to_owned()).collect();
        Volume::new(source.into(), Path::new("/data"), &options)
    }

    #[test]
    fn options_say_how_a_volume_is_mounted() {
        let path = Path::new("/x");
        assert!(!volume(path, &["rbind"]).read_only && volume(path, &["rbind"]).recursive);
        assert!(volume(path, &["bind", "rw", "ro"]).read_only && !volume(path, &["bind"]).recursive);
        assert!(!volume(path, &["ro", "rw"]).read_only);
        let options =
            |options: &[&str]| options.iter().map(|option| (*option).to_owned()).collect::<Vec<_>>();
        assert!(is_writable_bind("bind", &[]) && is_writable_bind("none", &options(&["bind", "ro", "rw"])));
        assert!(
            !is_writable_bind("bind", &options(&["ro"])) && !is_writable_bind("tmpfs", &options(&["rw"]))
        );
        assert!(is_bind("bind", &[""]) && is_bind("", &["ro", "rbind"]) && !is_bind("tmpfs", &["ro"]));
    }

    #[test]
    fn sockets_fifos_devices_and_nothing_are_refused_by_kind() {
        let dir = tempfile::tempdir().unwrap();
        let _socket = std::os::unix::net::UnixListener::bind(dir.path().join("socket")).unwrap();
        nix::unistd::mkfifo(&dir.path().join("fifo"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        let refused = |path: &Path| volume(path, &["rbind"]).open().unwrap_err().to_string();
        assert!(refused(&dir.path().join("socket")).contains("a socket of the host"));
        assert!(refused(&dir.path().join("fifo")).contains("a fifo of the host"));
        assert!(refused(Path::new("/dev/null")).contains("a device of the host"));
        let missing = refused(Path::new("/nowhere/at/all"));
        assert!(
            missing.contains("error mounting \"/nowhere/at/all\" to rootfs at \"/data\": no such file"),
            "{missing}"
        );
    }

    #[test]
    fn a_read_only_volume_cannot_be_written_and_none_has_devices() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        std::fs::write(&file, b"before").unwrap();
        let device = dir.path().join("null");
        let (mode, number) = (nix::sys::stat::Mode::S_IRWXU, nix::sys::stat::makedev(1, 3));
        nix::sys::stat::mknod(&device, SFlag::S_IFCHR, mode, number).unwrap();
        let inside = |mount: &OwnedFd, name: &str, write: bool| {
            use std::os::fd::AsRawFd;
            let path = format!("/proc/self/fd/{}/{name}", mount.as_raw_fd());
            std::fs::File::options().read(true).write(write).open(path)
        };
        let (read_only, _) = volume(dir.path(), &["rbind", "ro"]).open().unwrap();
        let refused = inside(&read_only, "file", true).unwrap_err();
        assert_eq!(refused.raw_os_error(), Some(libc::EROFS));
        inside(&read_only, "file", false).unwrap();
        let (writable, _) = volume(dir.path(), &["rbind"]).open().unwrap();
        inside(&writable, "file", true).unwrap().write_all(b"after!").unwrap();
        assert_eq!(std::fs::read(&file).unwrap(), b"after!");
        assert_eq!(inside(&writable, "null", false).unwrap_err().raw_os_error(), Some(libc::EACCES));
        assert!(
            !std::fs::read_to_string("/proc/self/mountinfo").unwrap().contains(dir.path().to_str().unwrap())
        );
    }
}
