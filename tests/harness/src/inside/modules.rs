#![allow(unsafe_code)] // finit_module(2) with its flags has no safe wrapper among our dependencies.
//! Loading kernel modules before there is a modprobe.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;

use anyhow::{Context, Result};

/// MODULE_INIT_COMPRESSED_FILE of linux/module.h: the kernel unpacks the file itself.
const COMPRESSED: libc::c_int = 4;

/// Loads every module of a folder in the order of their names.
pub(super) fn load_all(folder: &Path) -> Result<()> {
    let mut paths: Vec<_> =
        std::fs::read_dir(folder)?.map(|entry| Ok(entry?.path())).collect::<io::Result<_>>()?;
    paths.sort();
    for path in paths {
        load(&path).with_context(|| format!("loading the kernel module {}", path.display()))?;
    }
    Ok(())
}

fn load(path: &Path) -> io::Result<()> {
    let flags = if path.extension().is_some_and(|extension| extension == "ko") { 0 } else { COMPRESSED };
    let file = File::open(path)?;
    // SAFETY: the descriptor is open for the call, the parameters are a C string, and the
    // kernel keeps neither.
    let status = unsafe { libc::syscall(libc::SYS_finit_module, file.as_raw_fd(), c"".as_ptr(), flags) };
    if status == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
