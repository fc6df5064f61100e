//! `spore fs`: one file of a container at a time. See `agent/api/proto/spore/agent/v1/files.proto`.

mod cat;
mod ls;
mod mkdir;
mod mv;
mod put;
mod rm;
mod stat;
mod watch;

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;

use clap::Subcommand;
use serde_json::{Value, json};
use spore_agent_api::files::MODE_BITS;
use spore_agent_api::v1::files::Attributes;
use spore_agent_api::v1::files::attributes::Kind;

use crate::Global;
use crate::failure::Failure;
use crate::remote::Remote;
use crate::show;

#[derive(Debug, Subcommand)]
pub(crate) enum Verb {
    /// List a directory
    Ls(ls::Args),
    /// Show what a path names
    Stat(stat::Args),
    /// Write a file to standard output
    Cat(cat::Args),
    /// Write standard input to a file
    Put(put::Args),
    /// Remove a file or directory
    Rm(rm::Args),
    /// Rename
    Mv(mv::Args),
    /// Make a directory
    Mkdir(mkdir::Args),
    /// Tell changes as they happen
    Watch(watch::Args),
}

/// The container, and a path in it.
#[derive(Debug, clap::Args)]
struct Place {
    /// The container's id
    container: String,
    /// A path in the container
    path: OsString,
}

impl Place {
    async fn connect(&self, global: &Global) -> Result<(Remote, Vec<u8>), Failure> {
        Ok((Remote::connect(global, &self.container).await?, absolute(&self.path)))
    }
}

pub(crate) async fn run(global: &Global, verb: Verb) -> Result<u8, Failure> {
    match verb {
        Verb::Ls(args) => ls::run(global, args).await,
        Verb::Stat(args) => stat::run(global, args).await,
        Verb::Cat(args) => cat::run(global, args).await,
        Verb::Put(args) => put::run(global, args).await,
        Verb::Rm(args) => rm::run(global, args).await,
        Verb::Mv(args) => mv::run(global, args).await,
        Verb::Mkdir(args) => mkdir::run(global, args).await,
        Verb::Watch(args) => watch::run(global, args).await,
    }
    .map(|()| 0)
}

/// Paths of a container begin at its root.
pub(crate) fn absolute(path: &OsStr) -> Vec<u8> {
    let path = path.as_bytes();
    if path.starts_with(b"/") { path.to_vec() } else { [b"/", path].concat() }
}

/// `0644`, as chmod(1) takes it.
fn octal(text: &str) -> Result<u32, String> {
    let mode = u32::from_str_radix(text, 8).ok().filter(|mode| mode & !MODE_BITS == 0);
    mode.ok_or_else(|| format!("0 to {MODE_BITS:o} in octal is needed"))
}

fn kind_name(kind: Kind) -> &'static str {
    match kind {
        Kind::FILE => "file",
        Kind::DIRECTORY => "directory",
        Kind::SYMLINK => "symlink",
        Kind::FIFO => "fifo",
        Kind::SOCKET => "socket",
        Kind::CHARACTER_DEVICE => "character device",
        Kind::BLOCK_DEVICE => "block device",
        Kind::OTHER => "other",
    }
}

fn kind_letter(kind: Kind) -> char {
    match kind {
        Kind::FILE => '-',
        Kind::DIRECTORY => 'd',
        Kind::SYMLINK => 'l',
        Kind::FIFO => 'p',
        Kind::SOCKET => 's',
        Kind::CHARACTER_DEVICE => 'c',
        Kind::BLOCK_DEVICE => 'b',
        Kind::OTHER => '?',
    }
}

fn mode_text(found: &Attributes) -> String {
    show::mode(kind_letter(found.kind.enum_value_or_default()), found.mode)
}

fn as_json(found: &Attributes) -> Value {
    json!({
        "kind": kind_name(found.kind.enum_value_or_default()),
        "mode": format!("{:04o}", found.mode),
        "uid": found.uid,
        "gid": found.gid,
        "size": found.size,
        "allocated": found.allocated,
        "accessed_ns": found.accessed_ns,
        "modified_ns": found.modified_ns,
        "changed_ns": found.changed_ns,
        "links": found.links,
        "device": found.device,
        "inode": found.inode,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_begin_at_the_containers_root() {
        assert_eq!(absolute(OsStr::new("etc/passwd")), b"/etc/passwd");
        assert_eq!(absolute(OsStr::new("/etc/")), b"/etc/");
        assert_eq!(absolute(OsStr::from_bytes(b"\xff")), b"/\xff");
    }

    #[test]
    fn a_mode_is_octal_and_has_twelve_bits() {
        assert_eq!((octal("0644"), octal("7777"), octal("0")), (Ok(0o644), Ok(0o7777), Ok(0)));
        for bad in ["", "8", "10000", "rwx", "-1", "0o644"] {
            assert!(octal(bad).is_err(), "{bad}");
        }
    }
}
