//! What can go wrong with a sandbox's network.

use std::io;

use super::netlink::Refusal;

#[derive(Debug, thiserror::Error)]
pub(crate) enum NetworkError {
    #[error("network namespace of the sandbox: {operation}: {source}")]
    Namespace { operation: &'static str, source: io::Error },
    #[error("network namespace of the sandbox: {operation}: {refusal}")]
    Netlink { operation: &'static str, refusal: Refusal },
    #[error(
        "network namespace of the sandbox: {operation}: not done within {seconds} s; another process holds the kernel's network lock"
    )]
    Deadline { operation: &'static str, seconds: u64 },
    #[error("network namespace of the sandbox: {operation}: the thread that works in it has ended")]
    Ended { operation: &'static str },
    #[error("network namespace of the sandbox: {found} {what}, at most {max} are mirrored into the guest")]
    TooMany { what: &'static str, found: usize, max: usize },
    #[error(
        "interface {name}: {kind} cannot be joined to a virtual machine; use one that carries Ethernet: veth, macvlan, ipvlan in mode l2, a bridge, a tap"
    )]
    Kind { name: String, kind: String },
    #[error("interface {name}: its name is one that the guest's kernel does not take")]
    Name { name: String },
    #[error("interface {name}: its description cannot be read; has it a name that is no text?")]
    Unreadable { name: String },
    #[error(
        "interface {name}: there are {max} in the virtual machine already, which has no slot for another"
    )]
    NoSlot { name: String, max: usize },
    #[error(
        "interface {name}: another virtual machine is joined to it; two containers in microVMs cannot share a network namespace (--network container:…), give each its own"
    )]
    Taken { name: String },
    #[error(
        "interface {name}: it has an ingress queueing discipline already; remove it (tc qdisc del dev {name} ingress), or do without it in this namespace"
    )]
    Filtered { name: String },
    #[error(
        "interface {name}: a container with a user namespace of its own has no network in a virtual machine but loopback; do without the user namespace, or use --network none"
    )]
    UserNamespace { name: String },
    #[error("interface {name}: address {address} is used by another host (dadfailed); give it another")]
    Duplicate { name: String, address: String },
    #[error("policy rule {priority}: {what} cannot be mirrored into the guest")]
    Rule { priority: u32, what: String },
    #[error("route {route}: {what} cannot be mirrored into the guest")]
    Route { route: String, what: &'static str },
    #[error("interface {name}: make a tap for it: {operation}: {source}{mend}")]
    Tap { name: String, operation: &'static str, source: io::Error, mend: &'static str },
    #[error("interface {name}: join it to the virtual machine: {operation}: {refusal}{mend}")]
    Redirect { name: String, operation: &'static str, refusal: Refusal, mend: String },
    #[error("network of the guest: {0}")]
    Guest(String),
}

impl NetworkError {
    /// Whether the configuration is at fault, not the machinery.
    pub(crate) fn is_refusal(&self) -> bool {
        matches!(
            self,
            Self::TooMany { .. }
                | Self::Kind { .. }
                | Self::Name { .. }
                | Self::Unreadable { .. }
                | Self::NoSlot { .. }
                | Self::Taken { .. }
                | Self::Filtered { .. }
                | Self::UserNamespace { .. }
                | Self::Duplicate { .. }
                | Self::Rule { .. }
                | Self::Route { .. }
        )
    }
}
