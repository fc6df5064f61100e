//! `start`: binds the shim's socket, starts the daemon, and answers its address; and
//! `-info`. containerd takes everything that `start` prints for the answer.
//!
//! What containerd understands: 1.6 (MAX_SHIM_VERSION unset) a bare address; 1.7 and 2.0 to
//! 2.2 (MAX_SHIM_VERSION=2 in all of them) JSON, of which 1.7 refuses version 3 and 2.x takes
//! version 2; 2.3 and later send BootstrapParams and read a BootstrapResult. Version 3 of
//! the answer promises the Sandbox API to 2.x, so it is given only where it was asked for;
//! the Task service is served under both names anyway.

use std::fs::{File, Permissions};
use std::io::{self, IsTerminal, Read, Write};
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use containerd_shim::Flags;
use containerd_shim_protos::bootstrap_api::{BootstrapParams, BootstrapResult};
use containerd_shim_protos::types::introspection::{RuntimeInfo, RuntimeVersion};
use protobuf::Message;

use crate::config::{Config, ConfigError};
use crate::timeline::START_VARIABLE;

/// Where events go; containerd sets it.
pub(crate) const TTRPC_ADDRESS: &str = "TTRPC_ADDRESS";
const MAX_SHIM_VERSION: &str = "MAX_SHIM_VERSION";
/// containerd's own bound on what it writes to a shim's standard input.
const INPUT_CAP: u64 = 10 << 20;

#[derive(Debug, thiserror::Error)]
pub(crate) enum StartError {
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error("{operation} {path}: {source}")]
    Path { operation: &'static str, path: PathBuf, source: io::Error },
    #[error("start: the environment variable {TTRPC_ADDRESS} is not set; containerd sets it")]
    NoAddress,
    #[error("start: the daemon cannot be started: {0}")]
    Spawn(io::Error),
    #[error("answer: {0}")]
    Answer(String),
}

/// How containerd wants to be answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Answer {
    Address,
    Json { version: u32 },
    Result,
}

impl Answer {
    fn choose(params: bool, max_version: Option<&str>) -> Self {
        match max_version.map(|text| text.trim().parse::<u32>().unwrap_or(2)) {
            _ if params => Self::Result,
            None => Self::Address,
            Some(max) => Self::Json { version: max.clamp(2, 3) },
        }
    }

    fn encode(self, address: &str) -> Result<Vec<u8>, StartError> {
        match self {
            Self::Address => Ok(address.into()),
            Self::Json { version } => {
                let answer =
                    serde_json::json!({ "version": version, "address": address, "protocol": "ttrpc" });
                serde_json::to_vec(&answer).map_err(|error| StartError::Answer(error.to_string()))
            }
            Self::Result => {
                let answer = BootstrapResult {
                    version: 3,
                    address: address.into(),
                    protocol: "ttrpc".into(),
                    ..Default::default()
                };
                answer.write_to_bytes().map_err(|error| StartError::Answer(error.to_string()))
            }
        }
    }
}

/// The socket's address, as containerd computes it too.
pub(crate) fn address(flags: &Flags) -> String {
    containerd_shim::socket_address(&flags.address, &flags.namespace, &flags.id)
}

fn path_of(address: &str) -> &Path {
    Path::new(address.strip_prefix("unix://").unwrap_or(address))
}

/// Removes a socket, and nothing that is not one.
pub(crate) fn remove_socket(address: &str) {
    let path = path_of(address);
    if std::fs::symlink_metadata(path).is_ok_and(|metadata| metadata.file_type().is_socket()) {
        let _ = std::fs::remove_file(path);
    }
}

pub(crate) fn start(flags: &Flags, started_ns: u64) -> Result<(), StartError> {
    // Read before anything is made, so that a mistake leaves nothing behind.
    Config::load()?;
    let params = params(flags, &read_input()?);
    let ttrpc = match &params {
        Some(params) => params.containerd_ttrpc_address.clone(),
        None => std::env::var(TTRPC_ADDRESS).unwrap_or_default(),
    };
    if ttrpc.is_empty() {
        return Err(StartError::NoAddress);
    }
    let answer = Answer::choose(params.is_some(), std::env::var(MAX_SHIM_VERSION).ok().as_deref());
    let address = address(flags);
    if let Some(listener) = bind(path_of(&address))? {
        let spawned = write_address(&address).and_then(|()| spawn(flags, listener, &ttrpc, started_ns));
        if spawned.is_err() {
            remove_socket(&address);
        }
        spawned?;
    }
    let answer = answer.encode(&address)?;
    let mut stdout = io::stdout();
    stdout
        .write_all(&answer)
        .and_then(|()| stdout.flush())
        .map_err(|error| StartError::Answer(error.to_string()))
}

/// `-info`: who we are.
pub(crate) fn info() -> Result<(), StartError> {
    let info = RuntimeInfo {
        name: crate::RUNTIME.into(),
        version: Some(RuntimeVersion { version: env!("CARGO_PKG_VERSION").into(), ..Default::default() })
            .into(),
        ..Default::default()
    };
    let bytes = info.write_to_bytes().map_err(|error| StartError::Answer(error.to_string()))?;
    io::stdout().write_all(&bytes).map_err(|error| StartError::Answer(error.to_string()))
}

fn read_input() -> Result<Vec<u8>, StartError> {
    let stdin = io::stdin();
    let mut input = Vec::new();
    if !stdin.is_terminal() {
        let read = stdin.lock().take(INPUT_CAP).read_to_end(&mut input);
        read.map_err(|source| StartError::Path {
            operation: "read runtime options from",
            path: "standard input".into(),
            source,
        })?;
    }
    Ok(input)
}

/// BootstrapParams of containerd 2.3; older ones send runtime options, which parse as such
/// too but do not name us.
fn params(flags: &Flags, input: &[u8]) -> Option<BootstrapParams> {
    BootstrapParams::parse_from_bytes(input)
        .ok()
        .filter(|params| params.instance_id == flags.id && params.namespace == flags.namespace)
}

/// Binds the socket. `None` when a living shim of the same sandbox listens on it already:
/// its address is the answer, as runc's shim does it.
fn bind(path: &Path) -> Result<Option<UnixListener>, StartError> {
    let failed = |operation| move |source| StartError::Path { operation, path: path.into(), source };
    if let Some(parent) = path.parent() {
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o711)
            .create(parent)
            .map_err(failed("create the directory of"))?;
    }
    let listener = match UnixListener::bind(path) {
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
            if UnixStream::connect(path).is_ok() {
                return Ok(None);
            }
            std::fs::remove_file(path).map_err(failed("remove the stale socket"))?;
            UnixListener::bind(path).map_err(failed("listen on"))?
        }
        other => other.map_err(failed("listen on"))?,
    };
    std::fs::set_permissions(path, Permissions::from_mode(0o600)).map_err(failed("set the mode of"))?;
    Ok(Some(listener))
}

/// containerd up to 1.7 finds the shim again after a restart by this file in the bundle,
/// our working directory.
fn write_address(address: &str) -> Result<(), StartError> {
    let failed = |source| StartError::Path { operation: "write", path: "address".into(), source };
    let write = || -> io::Result<()> {
        let mut file = File::create(".address")?;
        file.write_all(address.as_bytes())?;
        std::fs::rename(".address", "address")
    };
    write().map_err(failed)
}

fn spawn(flags: &Flags, listener: UnixListener, ttrpc: &str, started_ns: u64) -> Result<(), StartError> {
    let mut command = Command::new(std::env::current_exe().map_err(StartError::Spawn)?);
    command.args(["-namespace", &flags.namespace, "-id", &flags.id, "-address", &flags.address]);
    if flags.debug {
        command.arg("-debug");
    }
    command
        .env(TTRPC_ADDRESS, ttrpc)
        .env(START_VARIABLE, started_ns.to_string())
        .stdin(Stdio::from(std::os::fd::OwnedFd::from(listener)))
        // containerd reads these until their end.
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        // Signals to containerd's group are not the daemon's.
        .process_group(0);
    command.spawn().map(drop).map_err(StartError::Spawn)
}

#[cfg(test)]
mod tests {
    use containerd_shim_protos::protobuf::well_known_types::any::Any;

    use super::*;

    #[test]
    fn each_containerd_gets_the_answer_that_it_understands() {
        assert_eq!(Answer::choose(false, None).encode("unix:///a").unwrap(), b"unix:///a");
        let json = Answer::choose(false, Some("2")).encode("unix:///a").unwrap();
        let json: serde_json::Value = serde_json::from_slice(&json).unwrap();
        assert_eq!(json, serde_json::json!({ "version": 2, "address": "unix:///a", "protocol": "ttrpc" }));
        assert_eq!(Answer::choose(false, Some("7")), Answer::Json { version: 3 });
        let result = Answer::choose(true, Some("2")).encode("unix:///a").unwrap();
        let result = BootstrapResult::parse_from_bytes(&result).unwrap();
        assert_eq!((result.version, result.address.as_str()), (3, "unix:///a"));
    }

    #[test]
    fn runtime_options_are_not_mistaken_for_bootstrap_params() {
        let flags = Flags { id: "web".into(), namespace: "default".into(), ..Default::default() };
        let options =
            Any { type_url: "containerd.runc.v1.Options".into(), value: vec![1, 2], ..Default::default() };
        assert!(params(&flags, &options.write_to_bytes().unwrap()).is_none());
        assert!(params(&flags, b"").is_none());
        assert!(params(&flags, b"\xff\xff garbage").is_none());
        let ours =
            BootstrapParams { instance_id: "web".into(), namespace: "default".into(), ..Default::default() };
        assert!(params(&flags, &ours.write_to_bytes().unwrap()).is_some());
    }

    #[test]
    fn a_stale_socket_is_replaced_and_a_living_one_kept() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s/socket");
        let listener = bind(&path).unwrap().unwrap();
        assert!(bind(&path).unwrap().is_none());
        drop(listener);
        assert!(bind(&path).unwrap().is_some());
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        std::fs::write(dir.path().join("file"), b"x").unwrap();
        remove_socket(&dir.path().join("file").display().to_string());
        assert!(dir.path().join("file").exists(), "only sockets are removed");
    }
}
