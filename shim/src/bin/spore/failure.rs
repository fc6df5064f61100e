//! What can go wrong, and the exit status that it has.

use std::io;
use std::path::Path;

use containerd_shim_spore::snapshot::{ImportError, StoreError};
use containerd_shim_spore::{chain, clean};
use ttrpc::Code;

#[derive(Debug, thiserror::Error)]
pub(crate) enum Failure {
    /// Arguments that contradict each other or the state of things.
    #[error("{0}")]
    Usage(String),
    #[error("{0}")]
    Refused(String),
    #[error("containerd at {address}: {operation}: {detail}")]
    Containerd { address: String, operation: String, detail: String },
    /// Worded by the shim or the guest, which name object, operation and cause.
    #[error("{message}")]
    Shim { code: Code, message: String },
    #[error("container \"{id}\": {detail}")]
    Container { id: String, detail: String },
    /// The guest does not keep to the protocol.
    #[error("container \"{id}\": its guest answers nonsense: {detail}")]
    Nonsense { id: String, detail: String },
    #[error("{operation} {path}: {source}")]
    Host { operation: &'static str, path: String, source: io::Error },
    /// Worded by the snapshot store, which names object, operation and cause.
    #[error("{}", clean(&.0.to_string()))]
    Snapshot(#[from] StoreError),
    #[error("{}", clean(&.0.to_string()))]
    Import(#[from] ImportError),
    #[error("standard output: {0}")]
    Output(io::Error),
    #[error("interrupted")]
    Interrupted,
    /// An exec that was never executed, with the status that shells and Docker give.
    #[error("{message}")]
    NotExecuted { status: u8, message: String },
}

impl Failure {
    pub(crate) fn status(&self) -> u8 {
        match self {
            Self::Usage(_) => 2,
            Self::Interrupted => 130,
            Self::NotExecuted { status, .. } => *status,
            _ => 1,
        }
    }

    pub(crate) fn is_not_found(&self) -> bool {
        matches!(self, Self::Shim { code: Code::NOT_FOUND, .. })
    }

    pub(crate) fn is(&self, wanted: Code) -> bool {
        matches!(self, Self::Shim { code, .. } if *code == wanted)
    }

    /// An operation on a file of the host.
    pub(crate) fn host(operation: &'static str, path: &Path) -> impl Fn(io::Error) -> Self + use<> {
        let path = crate::show::name(path.as_os_str().as_encoded_bytes());
        move |source| Self::Host { operation, path: path.clone(), source }
    }

    /// What a call of a shim has come to.
    pub(crate) fn of_shim(id: &str, error: ttrpc::Error) -> Self {
        match error {
            ttrpc::Error::RpcStatus(status) => {
                let message = clean(status.message());
                // Which service of the guest has refused is no news here.
                let bare = message.strip_prefix("guest agent: ").and_then(|rest| rest.split_once(": "));
                let message = bare.map_or(message.clone(), |(_, rest)| rest.to_owned());
                let message = match message.starts_with("container ") {
                    true => message,
                    false => format!("container \"{id}\": {message}"),
                };
                Self::Shim { code: status.code(), message }
            }
            other => Self::Container {
                id: id.into(),
                detail: format!("its shim does not answer: {}", clean(&other.to_string())),
            },
        }
    }
}

/// A call of containerd's that failed: its status in words.
pub(crate) fn of_containerd(
    address: &str,
    operation: &str,
) -> impl FnOnce(containerd_client::tonic::Status) -> Failure + use<> {
    let (address, operation) = (address.to_owned(), operation.to_owned());
    move |status| Failure::Containerd { address, operation, detail: clean(status.message()) }
}

/// No connection to containerd.
pub(crate) fn no_containerd(address: &str, error: &dyn std::error::Error) -> Failure {
    let detail = clean(&chain(error));
    let mend = "is containerd running, and is --address its socket?";
    Failure::Containerd {
        address: address.into(),
        operation: "connect".into(),
        detail: format!("{detail}; {mend}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_an_archive_makes_the_store_say_drives_no_terminal() {
        let hostile = ImportError::Entry { name: "x\x1b]0;y\x07".into(), detail: "\x1b[2J".into() };
        let said = Failure::from(hostile).to_string();
        assert!(said.ends_with(": [2J") && !said.contains(char::is_control), "{said:?}");
    }

    #[test]
    fn a_shims_words_are_cleaned_and_name_the_container() {
        let status = |text: &str| ttrpc::Error::RpcStatus(ttrpc::get_status(Code::NOT_FOUND, text));
        let failure = Failure::of_shim(
            "web",
            status("guest agent: stat: container \"web\": stat \"/x\": No such\x1b[2J file"),
        );
        assert_eq!(failure.to_string(), "container \"web\": stat \"/x\": No such[2J file");
        assert!(failure.is_not_found() && failure.status() == 1);
        let failure = Failure::of_shim("web", status("cannot reach the files of a stopped container"));
        assert_eq!(failure.to_string(), "container \"web\": cannot reach the files of a stopped container");
    }
}
