//! The side of a clone.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;

use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect as connect_to, socket};

use super::{Address, Answer, Ask, Described, VERSION, limit, receive, send};
use crate::checkpoint::{Remembered, Restored};
use crate::clone::{CloneError, Identity};
use crate::rootfs::Image;
use crate::rundir::RunDir;
use crate::volumes::SavedVolumes;

/// Where a machine for this clone waits. Who drops it does without.
#[derive(Debug)]
pub(crate) struct Source {
    socket: OwnedFd,
}

impl Source {
    /// Has a VMM forked that obeys this socket and logs into this file; a descriptor of its process. Blocks until it is there.
    pub(crate) fn fork(self, control: &OwnedFd, log: &File) -> io::Result<OwnedFd> {
        send(&self.socket, &Ask::Fork, &[control, log])?;
        let (answer, mut fds): (Answer, _) = receive(&self.socket)?;
        answer.map_err(io::Error::other)?;
        fds.pop().ok_or_else(|| nonsense("no process came with the answer"))
    }
}

/// The same file with a place of its own to read at: other clones have this descriptor's.
fn own(fd: &OwnedFd) -> io::Result<File> {
    File::open(format!("/proc/self/fd/{}", fd.as_raw_fd()))
}

fn nonsense(detail: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, detail)
}

/// The machine that waits there for a container of this namespace. Blocks until the other shim has answered.
pub(crate) fn connect(
    run_dir: &Path,
    namespace: &str,
    address: &Address,
    identity: Identity,
) -> Result<Restored, CloneError> {
    let failed = |source: io::Error| CloneError::Zygote { address: address.to_string(), source };
    let dir = RunDir::path_of(run_dir, namespace, &address.sandbox);
    let open = || {
        let dir = RunDir::open(&dir)?;
        let socket = socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None)?;
        limit(&socket)?;
        connect_to(socket.as_raw_fd(), &UnixAddr::new(&dir.socket(&address.socket()))?)?;
        Ok(socket)
    };
    let socket = open().map_err(|error: io::Error| match error.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => {
            CloneError::NoZygote { address: address.to_string() }
        }
        _ => failed(error),
    })?;
    let (described, fds) = receive(&socket).map_err(failed)?;
    let restored = restored(described, fds).map_err(failed)?;
    Ok(Restored { identity: Some(identity), zygote: Some(Source { socket }), ..restored })
}

fn restored(described: Described, fds: Vec<OwnedFd>) -> io::Result<Restored> {
    let Described { version, vcpus, labels, memory, lower, writable, volumes } = described;
    if version != VERSION {
        let detail = format!("its shim is of another version (it speaks {version}, this one {VERSION})");
        return Err(nonsense(&detail));
    }
    let count = [memory.len(), lower.len(), writable.1, usize::from(volumes.is_some())];
    if count.iter().try_fold(0usize, |sum, more| sum.checked_add(*more)) != Some(fds.len()) {
        return Err(nonsense("its files are not those that it describes"));
    }
    let remembered =
        Remembered::of_machine(&labels, vcpus).ok_or_else(|| nonsense("it is no container's machine"))?;
    let mut files = fds.iter().map(own).collect::<io::Result<Vec<_>>>()?.into_iter();
    let memory = memory.into_iter().zip(files.by_ref()).collect();
    let lower = lower.into_iter().zip(files.by_ref()).map(|(lower, file)| {
        let image = match lower.sha256 {
            Some(sha256) => Image::told(file, &sha256),
            None => Image::other(file),
        };
        (lower.serial, image)
    });
    let lower = lower.collect();
    let (serial, layers) = writable;
    let writable = (serial, files.by_ref().take(layers).collect());
    let volumes = volumes.zip(files.next()).map(|(exports, tables)| SavedVolumes { exports, tables });
    let (state, identity, zygote) = (None, None, None);
    Ok(Restored { remembered, vcpus, state, zygote, memory, lower, writable, volumes, identity })
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Seek, SeekFrom, Write};
    use std::os::fd::AsFd;

    use nix::sys::socket::socketpair;

    use super::*;
    use crate::packets;
    use crate::zygote::Lower;

    /// Of one memory layer, a disk and two layers of the writable one.
    fn described() -> Described {
        Described {
            version: VERSION,
            vcpus: 1,
            labels: Remembered { guest_id: "init".into(), terminal: false, memory_mib: 256 }.labels(),
            memory: vec!["base".into()],
            lower: vec![Lower { serial: "image".into(), sha256: None }],
            writable: ("writable".into(), 2),
            volumes: None,
        }
    }

    /// So many files, each with its number in it and read to its end.
    fn files(count: usize) -> Vec<OwnedFd> {
        let file = |number: usize| {
            let mut file = tempfile::tempfile().unwrap();
            write!(file, "{number}").unwrap();
            file.into()
        };
        (0..count).map(file).collect()
    }

    fn refused(described: Described, count: usize) -> String {
        let error = restored(described, files(count)).map(drop).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
        error.to_string()
    }

    fn text(file: &File) -> String {
        let mut text = String::new();
        let mut file = file;
        file.read_to_string(&mut text).unwrap();
        text
    }

    #[test]
    fn each_file_is_of_its_part_and_has_a_place_of_its_own_to_read_at() {
        let fds = files(4);
        let kept: Vec<File> = fds.iter().map(|fd| fd.as_fd().try_clone_to_owned().unwrap().into()).collect();
        let restored = restored(described(), fds).unwrap();
        assert_eq!(text(&restored.memory[0].1), "0");
        assert_eq!(restored.lower[0].0, "image");
        assert_eq!(restored.writable.1.iter().map(text).collect::<Vec<_>>(), ["2", "3"]);
        for mut file in kept {
            assert_eq!(file.seek(SeekFrom::Current(0)).unwrap(), 1);
        }
    }

    #[test]
    fn a_machine_of_another_version_is_refused() {
        let refused = refused(Described { version: VERSION + 1, ..described() }, 4);
        assert!(refused.contains("of another version (it speaks 2, this one 1)"), "{refused}");
    }

    #[test]
    fn files_that_are_not_those_described_are_refused() {
        for count in [0, 3, 5] {
            assert_eq!(refused(described(), count), "its files are not those that it describes");
        }
        // The sum of which is that of four files, if one lets it overflow.
        let writable = ("writable".into(), usize::MAX);
        let more = Described { writable, memory: vec![String::new(); 4], ..described() };
        assert_eq!(refused(more, 4), "its files are not those that it describes");
    }

    #[test]
    fn what_is_no_machine_of_a_container_is_refused() {
        let refused = |described| refused(described, 4);
        assert_eq!(refused(Described { vcpus: 0, ..described() }), "it is no container's machine");
        assert_eq!(refused(Described { labels: [].into(), ..described() }), "it is no container's machine");
        for (memory_mib, guest_id) in [(0, "init"), (u64::MAX, "init"), (256, "")] {
            let labels = Remembered { guest_id: guest_id.into(), terminal: false, memory_mib }.labels();
            assert_eq!(refused(Described { labels, ..described() }), "it is no container's machine");
        }
    }

    #[test]
    fn a_packet_that_describes_nothing_is_an_error() {
        let whole = serde_json::to_string(&described()).unwrap();
        let unknown = whole.replacen('{', r#"{"more":1,"#, 1);
        let negative = whole.replacen(r#""vcpus":1"#, r#""vcpus":-1"#, 1);
        for packet in [&whole[..whole.len() - 1], &unknown, &negative, "\0", "null"] {
            let pair = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC);
            let (here, there) = pair.unwrap();
            packets::send(there.as_raw_fd(), packet.as_bytes(), &[]).unwrap();
            assert!(receive::<Described>(&here).is_err(), "{packet}");
        }
    }
}
