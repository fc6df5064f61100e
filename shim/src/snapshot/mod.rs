//! The snapshot store: `<state_dir>/snapshots/<id>/`, one directory for each snapshot of a microVM.
//!
//! ```text
//! 4f0c…/  manifest.json              what the snapshot is, with the length and digest of every file
//!         state.bin                  the VMM's saved state, opaque here
//!         volumes.json               the file server's tables, opaque here, if there are volumes
//!         <layer>.memory, <layer>.disk   sparse files, shared with other snapshots by hard link
//! ```
//!
//! * The directories are the index: nothing else says which snapshots there are.
//! * A snapshot appears whole or not at all: it is made in a temporary directory, written back, renamed. What a
//!   killed process left half-made is removed by the next that makes, prunes or deletes.
//! * A snapshot has all of its files itself. Layers that several have are one file with several names, so
//!   removing one snapshot takes nothing from another.
//! * What is opened is untrusted: [`Store::open`] checks the manifest, the state and the tables by digest and every file's
//!   kind and length, [`Opened::verify`] every byte. The content of `state.bin` and of a layer's own header is the
//!   VMM's to check.
//! * All of it is the guest's memory, so secrets: directories are 0700, files 0600.
//!
//! Rooms: [`manifest`] the format, `store` what there is, `draft` making one, `opened` one that is read,
//! `room` quota, pruning and admission, `template` names, `sparse` digests and extents of sparse files, `pack` + `export` +
//! `import` snapshots in tar streams and in directories that become some, `plain` in directories that stay.

mod draft;
mod error;
mod export;
mod import;
pub mod manifest;
mod opened;
mod pack;
mod plain;
mod room;
mod sparse;
mod store;
mod template;
#[cfg(test)]
mod tests;

pub use self::draft::Draft;
pub(crate) use self::draft::share;
pub use self::error::{FileError, StoreError};
pub use self::export::{export_directory, export_tar};
pub use self::import::{ImportError, import_directory, import_tar};
pub use self::manifest::{Manifest, ManifestError, SnapshotId};
pub use self::opened::Opened;
pub use self::plain::{Placed, export_plain};
pub use self::room::{Policy, Pruned, Size};
pub(crate) use self::sparse::digest;
pub use self::store::{Entry, Listing, Store};

/// Below the state directory.
pub const DIRECTORY: &str = "snapshots";
