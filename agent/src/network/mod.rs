//! The network that containers see: NICs of the machine made like the host's interfaces.
//!
//! All containers of a guest share one network namespace, which is not the agent's own: the NICs
//! that are not in use stay in the agent's, where no container sees them, and libcontainer sets a
//! spec's `net.*` settings only in a namespace that is not its caller's.
//!
//! * [`namespace`]: the containers' namespace, made as the guest boots.
//! * [`netlink`]: rtnetlink's requests with errors that say why.
//! * [`config`]: what is wanted, checked; [`decode`]: from the API's messages.
//! * [`link`], [`address`], [`route`], [`rule`]: one kind of object each.
//! * [`apply`]: the order in which they change, and what an update takes away.
//! * [`names`], [`steer`]: a name server for containers, which passes on what they ask.
//! * [`service`]: the request.

pub mod address;
pub mod apply;
pub mod config;
pub mod decode;
pub mod link;
pub mod names;
pub mod namespace;
pub mod netlink;
pub mod route;
pub mod rule;
pub mod service;
pub mod steer;

#[cfg(test)]
mod tests;
