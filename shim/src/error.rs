//! The shim's error and its one mapping to ttrpc status codes. Every module has its own
//! typed error; what containerd sees is decided here and nowhere else.

use ttrpc::Code;

use crate::bundle::BundleError;
use crate::clone::CloneError;
use crate::config::ConfigError;
use crate::guest::GuestError;
use crate::holder::HolderError;
use crate::hooks::HookError;
use crate::io::StdioError;
use crate::network::NetworkError;
use crate::rootfs::{ChangesError, RootfsError};
use crate::snapshot::{ImportError, StoreError};
use crate::vm::VmError;
use crate::volumes::VolumeError;

/// What a Task call can fail with.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// containerd's clients look for this wording and code, which are runc's.
    #[error("container not created: not found")]
    NoContainer,
    #[error("process does not exist {0}: not found")]
    NoProcess(String),
    #[error("process already finished: not found")]
    Finished,
    #[error("container {0} already exists: already exists")]
    Exists(String),
    #[error("id {0}: already exists")]
    ExecExists(String),
    #[error("{0}: failed precondition")]
    State(String),
    #[error("{0}: invalid argument")]
    Invalid(String),
    #[error("{0}: not implemented")]
    Unimplemented(String),
    #[error("create task {0}: abandoned because the shim is shutting down")]
    Abandoned(String),
    #[error("run-time directory {path}: {source}")]
    RunDir { path: std::path::PathBuf, source: std::io::Error },
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error(transparent)]
    Bundle(#[from] BundleError),
    #[error(transparent)]
    Rootfs(#[from] RootfsError),
    #[error(transparent)]
    Changes(#[from] ChangesError),
    #[error(transparent)]
    Stdio(#[from] StdioError),
    #[error(transparent)]
    Holder(#[from] HolderError),
    #[error(transparent)]
    Vm(#[from] VmError),
    #[error(transparent)]
    Guest(#[from] GuestError),
    #[error(transparent)]
    Hook(#[from] HookError),
    #[error(transparent)]
    Volume(#[from] VolumeError),
    #[error(transparent)]
    Network(#[from] NetworkError),
    #[error(transparent)]
    Snapshot(#[from] StoreError),
    #[error(transparent)]
    Import(#[from] ImportError),
    #[error(transparent)]
    Clone(#[from] CloneError),
}

impl Error {
    fn code(&self) -> Code {
        match self {
            Self::NoContainer | Self::NoProcess(_) | Self::Finished => Code::NOT_FOUND,
            Self::Exists(_) | Self::ExecExists(_) => Code::ALREADY_EXISTS,
            Self::Invalid(_) => Code::INVALID_ARGUMENT,
            Self::State(_) => Code::FAILED_PRECONDITION,
            Self::Unimplemented(_) => Code::UNIMPLEMENTED,
            Self::Abandoned(_) => Code::CANCELLED,
            Self::RunDir { .. } | Self::Holder(_) | Self::Changes(_) => Code::INTERNAL,
            // As with runc.
            Self::Hook(_) => Code::UNKNOWN,
            Self::Volume(error) => match error {
                VolumeError::Source { .. } => Code::UNKNOWN,
                VolumeError::Kind { .. } => Code::INVALID_ARGUMENT,
                VolumeError::Missing { .. } | VolumeError::Surplus { .. } | VolumeError::Other { .. } => {
                    Code::FAILED_PRECONDITION
                }
                VolumeError::Server { .. } | VolumeError::Refused { .. } => Code::INTERNAL,
            },
            Self::Snapshot(error) => of_store(error),
            Self::Import(error) => of_import(error),
            Self::Clone(error) => match error {
                CloneError::Store(error) => of_store(error),
                CloneError::Unfit(error) => of_import(error),
                CloneError::Both | CloneError::Malformed { .. } => Code::INVALID_ARGUMENT,
                CloneError::Foreign { .. } => Code::FAILED_PRECONDITION,
                CloneError::NoZygote { .. } => Code::NOT_FOUND,
                CloneError::Zygote { .. } => Code::UNAVAILABLE,
            },
            Self::Network(error) if error.is_refusal() => Code::FAILED_PRECONDITION,
            Self::Network(_) => Code::INTERNAL,
            Self::Config(_) => Code::INVALID_ARGUMENT,
            Self::Bundle(error) => match error {
                BundleError::Unsupported { .. } => Code::UNIMPLEMENTED,
                BundleError::Read { .. } => Code::INTERNAL,
                _ => Code::INVALID_ARGUMENT,
            },
            Self::Stdio(error) => match error {
                StdioError::Scheme { .. } => Code::INVALID_ARGUMENT,
                _ => Code::INTERNAL,
            },
            Self::Rootfs(error) => match error {
                RootfsError::Unsupported { .. } => Code::INVALID_ARGUMENT,
                RootfsError::InUse { .. } | RootfsError::Occupied { .. } | RootfsError::Changed { .. } => {
                    Code::FAILED_PRECONDITION
                }
                RootfsError::DiskFull { .. } => Code::RESOURCE_EXHAUSTED,
                _ => Code::INTERNAL,
            },
            Self::Vm(error) => match error {
                VmError::BootDeadline { .. } => Code::DEADLINE_EXCEEDED,
                VmError::Ended { .. } => Code::UNAVAILABLE,
                VmError::HostFile { .. } => Code::FAILED_PRECONDITION,
                _ => Code::INTERNAL,
            },
            Self::Guest(error) => match error {
                GuestError::Refused { code, .. } => match code {
                    Code::NOT_FOUND
                    | Code::ALREADY_EXISTS
                    | Code::INVALID_ARGUMENT
                    | Code::FAILED_PRECONDITION
                    | Code::UNIMPLEMENTED => *code,
                    _ => Code::UNKNOWN,
                },
                // runc's own errors reach the user as "…: unknown".
                GuestError::Create { .. } | GuestError::Exec { .. } => Code::UNKNOWN,
                GuestError::Lost { .. } => Code::UNAVAILABLE,
                GuestError::Connect { .. } => Code::INTERNAL,
            },
        }
    }
}

fn of_store(error: &StoreError) -> Code {
    match error {
        StoreError::NoSuch { .. } => Code::NOT_FOUND,
        StoreError::Host { source, .. } if source.kind() == std::io::ErrorKind::NotFound => Code::NOT_FOUND,
        StoreError::Exists { .. } | StoreError::NameTaken { .. } => Code::ALREADY_EXISTS,
        StoreError::BadName { .. } | StoreError::NoTemplate { .. } => Code::INVALID_ARGUMENT,
        StoreError::DiskFull { .. } | StoreError::NoRoom { .. } | StoreError::Quota { .. } => {
            Code::RESOURCE_EXHAUSTED
        }
        StoreError::Manifest { .. } | StoreError::File { .. } => Code::INVALID_ARGUMENT,
        _ => Code::INTERNAL,
    }
}

fn of_import(error: &ImportError) -> Code {
    match error {
        ImportError::Store(error) => of_store(error),
        ImportError::Read(_) => Code::INTERNAL,
        _ => Code::INVALID_ARGUMENT,
    }
}

impl From<Error> for ttrpc::Error {
    fn from(error: Error) -> Self {
        ttrpc::Error::RpcStatus(ttrpc::get_status(error.code(), chain(&error)))
    }
}

/// An error and its causes, outermost first, each part said once.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let part = cause.to_string();
        if !text.contains(&part) {
            text.push_str(": ");
            text.push_str(&part);
        }
        source = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(error: Error) -> (Code, String) {
        match ttrpc::Error::from(error) {
            ttrpc::Error::RpcStatus(status) => (status.code(), status.message().to_string()),
            other => panic!("not a status: {other:?}"),
        }
    }

    #[test]
    fn containerd_recognises_runcs_errors() {
        assert_eq!(status(Error::NoContainer), (Code::NOT_FOUND, "container not created: not found".into()));
        assert_eq!(status(Error::Finished).0, Code::NOT_FOUND);
        assert_eq!(status(Error::Exists("a".into())).0, Code::ALREADY_EXISTS);
        assert_eq!(
            status(Error::State("cannot start a stopped process".into())).0,
            Code::FAILED_PRECONDITION
        );
        let (code, message) = status(Error::Unimplemented("task method Magic".into()));
        assert_eq!(code, Code::UNIMPLEMENTED);
        assert!(message.contains("Magic"));
    }

    #[test]
    fn causes_are_chained_once() {
        let source = std::io::Error::from_raw_os_error(libc::EACCES);
        let error = Error::RunDir { path: "/run/spore/x".into(), source };
        assert_eq!(status(error).1, "run-time directory /run/spore/x: Permission denied (os error 13)");
    }

    #[test]
    fn a_guests_internal_error_is_unknown_and_its_verdicts_pass_through() {
        let refused = |code| Error::Guest(GuestError::Refused { call: "Signal", code, message: "m".into() });
        assert_eq!(status(refused(Code::NOT_FOUND)).0, Code::NOT_FOUND);
        assert_eq!(status(refused(Code::INTERNAL)).0, Code::UNKNOWN);
        assert_eq!(
            status(Error::Guest(GuestError::Create { message: "exec: \"x\"".into() })).0,
            Code::UNKNOWN
        );
    }
}
