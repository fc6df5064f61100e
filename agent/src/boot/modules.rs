//! Kernel modules, for kernels that have what a guest needs as modules.
//!
//! A list has one decompressed `.ko` per line in load order, with optional
//! parameters behind it; `#` begins a comment. Without the file the kernel is taken to be
//! monolithic. There is no modprobe in a guest: nothing loads unless the agent does it.

use std::ffi::CString;
use std::fs::File;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::kmod::{ModuleInitFlags, finit_module};

use crate::say;

/// Lists in the initramfs: what every guest needs, what one needs that runs for more than a
/// moment, and what one with volumes or with NICs, or one that is a clone, needs besides.
pub const BOOT: &str = "/etc/spore/modules";
pub const LATER: &str = "/etc/spore/modules.later";
pub const VOLUMES: &str = "/etc/spore/modules.volumes";
pub const NETWORK: &str = "/etc/spore/modules.network";
pub const CLONE: &str = "/etc/spore/modules.clone";

/// One line of the list.
#[derive(Debug, PartialEq, Eq)]
pub struct Module {
    pub path: PathBuf,
    pub parameters: String,
}

/// Reads a list. Lines that are not an absolute path are reported with their number.
pub fn parse(list: &str) -> Result<Vec<Module>, String> {
    let mut modules = Vec::new();
    for (number, line) in list.lines().enumerate() {
        let line = line.split('#').next().unwrap_or_default().trim();
        if line.is_empty() {
            continue;
        }
        let (path, parameters) = line.split_once(char::is_whitespace).unwrap_or((line, ""));
        if !path.starts_with('/') {
            return Err(format!("line {}: \"{path}\" is not an absolute path", number + 1));
        }
        modules.push(Module { path: path.into(), parameters: parameters.trim().into() });
    }
    Ok(modules)
}

/// Loads what a list names. A module that cannot be loaded is reported and left out: what
/// needs it fails later with its own error, and a guest that lacks only overlayfs can
/// still say so to the shim.
pub fn load_listed(path: &str) {
    let list = match std::fs::read_to_string(path) {
        Ok(list) => list,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return,
        Err(error) => return say!("{path}: {error}"),
    };
    match parse(&list) {
        Ok(modules) => {
            for module in modules {
                if let Err(error) = load(&module.path, &module.parameters) {
                    say!("module {}: {error}", module.path.display());
                }
            }
        }
        Err(error) => say!("{path}: {error}; no module is loaded"),
    }
}

fn load(path: &Path, parameters: &str) -> std::io::Result<()> {
    let file = File::open(path)?;
    match finit_module(&file, &CString::new(parameters)?, ModuleInitFlags::empty()) {
        // Already there, or built in.
        Ok(()) | Err(Errno::EEXIST) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_has_paths_parameters_comments_and_blank_lines() {
        let list = "# needed first\n/lib/modules/6.12/virtio.ko\n\n  /lib/a.ko  x=1 y=2 # why\n";
        let modules = parse(list).unwrap();
        assert_eq!(modules.len(), 2);
        assert_eq!(modules[0].path, Path::new("/lib/modules/6.12/virtio.ko"));
        assert_eq!(modules[0].parameters, "");
        assert_eq!(modules[1], Module { path: "/lib/a.ko".into(), parameters: "x=1 y=2".into() });
    }

    #[test]
    fn a_relative_path_is_refused_by_line() {
        assert_eq!(parse("/a.ko\nvirtio.ko\n").unwrap_err(), "line 2: \"virtio.ko\" is not an absolute path");
    }
}
