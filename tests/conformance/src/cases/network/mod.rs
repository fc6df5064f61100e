//! Networks. Each case has namespaces of its own that play the host, and containers' namespaces made before
//! them (`crate::lan`); what is left in these afterwards is compared with what was there before.

pub(crate) mod addresses;
pub(crate) mod moments;
pub(crate) mod policy;
pub(crate) mod refused;
pub(crate) mod traffic;
pub(crate) mod trouble;
