//! A container's files, for the shim and the `spore` command: the agent API's Files service.
//!
//! * [`service`]: decodes, runs the work on worker threads, encodes.
//! * [`root`]: the container's root as its first process sees it, and every way to a file in it.
//! * [`attributes`], [`list`], [`content`], [`tree`]: what is asked and done there. Blocking.
//! * [`watch`]: changes as they happen, by inotify(7).
//!
//! The agent has all privileges in the guest, and what it walks through is the container's:
//! every path is resolved by openat2(2) below the root, work goes on from descriptors, and
//! nothing is opened that can block or that is not a file or a directory.

pub mod attributes;
pub mod content;
pub mod list;
pub mod root;
pub mod service;
pub mod tree;
pub mod watch;

#[cfg(test)]
mod tests;
