//! Zygotes, from the shim that has one to the shims of its clones: over a Unix socket in the run-time directory of the
//! source's sandbox, `zygote-<name>.sock`. Who connects is sent what the machine is made of, with its files, and may send the
//! socket and the log of a VMM then, which is forked off the zygote.
//!
//! One packet each way, JSON with descriptors. The directory is root's alone.

mod serve;
mod take;

use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::str::FromStr;
use std::time::Duration;

use nix::sys::socket::{MsgFlags, setsockopt, sockopt};
use nix::sys::time::TimeVal;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

pub(crate) use self::serve::{Parts, Served, serve};
pub(crate) use self::take::{Source, connect};
use crate::packets;
use crate::snapshot::SnapshotId;
use crate::snapshot::manifest::Export;
use crate::vm::{MAX_FDS, MAX_MESSAGE};

/// Of the annotation's value.
const SCHEME: &str = "zygote:";
/// How long one side waits for the other.
const PATIENCE: Duration = Duration::from_secs(60);

/// As `io.spore.clone-from` names a zygote of its own namespace: `zygote:<sandbox>/<name>`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Address {
    sandbox: String,
    name: SnapshotId,
}

impl Address {
    pub(crate) fn new(sandbox: &str, name: SnapshotId) -> Self {
        Self { sandbox: sandbox.into(), name }
    }

    /// Whether that is what the value is meant as.
    pub(crate) fn is_one(value: &str) -> bool {
        value.starts_with(SCHEME)
    }

    fn socket(&self) -> String {
        format!("zygote-{}.sock", self.name)
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{SCHEME}{}/{}", self.sandbox, self.name)
    }
}

impl FromStr for Address {
    type Err = ();

    fn from_str(value: &str) -> Result<Self, ()> {
        let (sandbox, name) = value.strip_prefix(SCHEME).and_then(|rest| rest.split_once('/')).ok_or(())?;
        let name = name.parse().map_err(|_| ())?;
        if sandbox.is_empty() || sandbox.starts_with('.') { Err(()) } else { Ok(Self::new(sandbox, name)) }
    }
}

/// What a machine is made of beside what the VMM has. Its files follow as descriptors: of memory layers, of read-only disks, of the
/// writable one's layers, of the file server's tables.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Described {
    version: u32,
    vcpus: u8,
    /// As a snapshot's.
    labels: BTreeMap<String, String>,
    /// Layers that snapshots of it refer to, by id.
    memory: Vec<String>,
    lower: Vec<Lower>,
    /// Serial and number of layers.
    writable: (String, usize),
    volumes: Option<Vec<Export>>,
}

const VERSION: u32 = 1;

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Lower {
    serial: String,
    /// Where it is known.
    sha256: Option<String>,
}

/// What is asked for then: a VMM, with two descriptors, the socket that it shall obey and its log.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
enum Ask {
    Fork,
}

/// With a pidfd, or why there is none.
type Answer = Result<(), String>;

/// Neither side waits for ever.
fn limit(socket: &OwnedFd) -> io::Result<()> {
    let patience = TimeVal::from(nix::libc::timeval {
        tv_sec: i64::try_from(PATIENCE.as_secs()).unwrap_or(i64::MAX),
        tv_usec: 0,
    });
    setsockopt(socket, sockopt::ReceiveTimeout, &patience)?;
    setsockopt(socket, sockopt::SendTimeout, &patience)?;
    Ok(())
}

fn send(socket: &OwnedFd, what: &impl Serialize, fds: &[&dyn AsRawFd]) -> io::Result<()> {
    let fds: Vec<_> = fds.iter().map(|fd| fd.as_raw_fd()).collect();
    let packet = serde_json::to_vec(what)?;
    if packet.len() > MAX_MESSAGE || fds.len() > MAX_FDS {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "the machine has too many parts"));
    }
    packets::send(socket.as_raw_fd(), &packet, &fds)
}

fn receive<T: DeserializeOwned>(socket: &OwnedFd) -> io::Result<(T, Vec<OwnedFd>)> {
    let mut buffer = vec![0; MAX_MESSAGE];
    match packets::receive(socket.as_raw_fd(), &mut buffer, MsgFlags::empty()) {
        Ok((0, _)) => Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the other side has hung up")),
        Ok((length, fds)) => Ok((serde_json::from_slice(&buffer[..length])?, fds)),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
            let seconds = PATIENCE.as_secs();
            Err(io::Error::new(io::ErrorKind::TimedOut, format!("nothing heard for {seconds} s")))
        }
        Err(error) => Err(error),
    }
}

/// Files in the order of [`Described`].
fn in_order<'a>(
    memory: impl Iterator<Item = &'a File>,
    lower: impl Iterator<Item = &'a File>,
    writable: impl Iterator<Item = &'a File>,
    tables: Option<&'a File>,
) -> Vec<&'a dyn AsRawFd> {
    memory.chain(lower).chain(writable).chain(tables).map(|file| file as &dyn AsRawFd).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_of_its_own_form_only() {
        let name = SnapshotId::random().unwrap();
        let address = Address::new("web", name);
        assert_eq!(address.to_string().parse(), Ok(address));
        let bad = [
            format!("zygote:../{name}"),
            format!("zygote:web/../{name}"),
            format!("zygote:/{name}"),
            "zygote:web/x".into(),
            "zygote:web".into(),
            "web".into(),
        ];
        for bad in bad {
            assert_eq!(bad.parse::<Address>(), Err(()), "{bad}");
        }
    }
}
