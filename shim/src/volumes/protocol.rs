//! What a shim and its file server say to each other, on a `SOCK_SEQPACKET` Unix socket that is
//! the server's standard input: one JSON document a packet, descriptors attached by
//! `SCM_RIGHTS`. Each [`Call`] is answered by one [`Answer`], in order. The server ends when the
//! shim closes the socket, and when the last of its request sockets is closed.
//!
//! What the file server shares with the shim; depends on nothing else of it.

use serde::{Deserialize, Serialize};

/// Largest packet in bytes, either direction.
pub const MAX_PACKET: usize = 16 * 1024;
/// Most descriptors of one packet.
pub const MAX_FDS: usize = 16;

/// Most bytes of saved tables: most of a million files.
pub const MAX_TABLES: u64 = 256 << 20;

/// What the shim asks for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Call {
    /// Serve the attached directory or file as `/<id>` of the file system. One descriptor, which
    /// needs be no more than a path (`O_PATH`), of a mount of its own: what may be done with the
    /// files is what that mount allows. At any time; an id is never used again.
    Export { id: u32 },
    /// Take the tables over that `Save` wrote into the attached file, once, after the exports and
    /// before `Serve`. Files that are not found again give ESTALE.
    Restore,
    /// Answer FUSE requests on the attached sockets, 1 to [`MAX_FDS`], each on a thread of its
    /// own. Once.
    Serve,
    /// Write the tables of files and handles into the attached file. No request is under way.
    Save,
}

/// The server's answer: nothing, or what is wrong.
pub type Answer = Result<(), String>;
