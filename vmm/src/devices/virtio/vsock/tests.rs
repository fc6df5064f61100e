#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]
//! The socket device against a guest made of its three queues.

mod flow;
mod guest;
mod handshake;
mod hostile;
