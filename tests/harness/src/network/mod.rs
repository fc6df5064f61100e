//! Networks for tests: namespaces that play hosts and containers ([`space`]), what there is in them
//! ([`stock`]), what puts interfaces there ([`cni`]), names ([`names`]), and what goes
//! through all that ([`traffic`]).
//!
//! All traffic stays in namespaces that a test makes, and that end with it.

pub mod cni;
pub mod names;
pub mod space;
pub mod stock;
pub mod traffic;
