//! Debian's own programs that do the unpacking: gzip, xz, zstd, lz4, dpkg-deb, depmod.
//!
//! Programs rather than crates: every Debian machine has or gets them, they follow the
//! formats that Debian packs with, hostile input meets a separate process, and a
//! one-minute build step pulls no decoders into the workspace.

use std::fs::File;
use std::io::{Read as _, Seek as _, Write as _};
use std::path::Path;
use std::process::{Command, Stdio};

use crate::error::{Error, IoContext, Result};

/// A compression format.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Filter {
    Gzip,
    Xz,
    Zstd,
    Lz4,
}

impl Filter {
    /// Program and Debian package.
    fn tool(self) -> (&'static str, &'static str) {
        match self {
            Self::Gzip => ("gzip", "gzip"),
            Self::Xz => ("xz", "xz-utils"),
            Self::Zstd => ("zstd", "zstd"),
            Self::Lz4 => ("lz4", "lz4"),
        }
    }
}

/// Unpacks `data`, which `object` names in errors, to at most `max` bytes.
pub(crate) fn unpack(filter: Filter, data: &[u8], max: u64, object: &str) -> Result<Vec<u8>> {
    let (tool, package) = filter.tool();
    let scratch = || -> std::io::Result<(File, File)> {
        let mut input = tempfile::tempfile()?;
        input.write_all(data)?;
        input.rewind()?;
        Ok((input, tempfile::tempfile()?))
    };
    let (input, mut messages) = scratch().context("write a temporary file in", &std::env::temp_dir())?;
    let stderr = messages.try_clone().context("open", &std::env::temp_dir())?;
    let mut child = Command::new(tool)
        .args(["-d", "-c", "-q"])
        .env("LC_ALL", "C")
        .stdin(input)
        .stdout(Stdio::piped())
        .stderr(stderr)
        .spawn()
        .map_err(|source| Error::ToolMissing { tool, package, source })?;
    let mut out = Vec::new();
    let read = match child.stdout.take() {
        Some(stdout) => stdout.take(max + 1).read_to_end(&mut out),
        None => Ok(0),
    };
    let too_large = out.len() as u64 > max;
    if too_large || read.is_err() {
        // It may be blocked on a pipe that nobody reads any more; it is gone either way.
        let _ = child.kill();
    }
    let status = child.wait().context("wait for", Path::new(tool))?;
    read.context("read the output of", Path::new(tool))?;
    if too_large {
        return Err(Error::TooLarge {
            path: object.into(),
            what: "what it unpacks to",
            found: out.len() as u64,
            max,
        });
    }
    if !status.success() {
        return Err(Error::ToolFailed { tool, object: object.to_owned(), message: tail(&mut messages) });
    }
    Ok(out)
}

/// Runs `tool` on `object` to completion.
pub(crate) fn run(tool: &'static str, package: &'static str, args: &[&Path], object: &Path) -> Result<()> {
    let output = Command::new(tool)
        .args(args)
        .env("LC_ALL", "C")
        .stdin(Stdio::null())
        .output()
        .map_err(|source| Error::ToolMissing { tool, package, source })?;
    if output.status.success() {
        return Ok(());
    }
    let message = String::from_utf8_lossy(&output.stderr).trim().replace('\n', "; ");
    Err(Error::ToolFailed { tool, object: object.display().to_string(), message })
}

/// The first KiB of what a program complained about, on one line.
fn tail(messages: &mut File) -> String {
    let mut text = Vec::new();
    let read = messages.rewind().and_then(|()| messages.take(1024).read_to_end(&mut text));
    match read {
        Ok(_) => String::from_utf8_lossy(&text).trim().replace('\n', "; "),
        Err(error) => format!("its messages cannot be read: {error}"),
    }
}
