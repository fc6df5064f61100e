//! Finds the executable of a process as runc does (Go's `exec.LookPath`), with its wording,
//! which containerd's users and their scripts know.
//!
//! Runs inside the container: after pivot_root, as the process's user, in its directory.

use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::AtFlags;
use nix::unistd::{AccessFlags, faccessat};

/// Finds `name`, through `path` (the value of PATH) unless it contains a slash. The error is
/// runc's message.
pub fn executable(name: &str, path: &str) -> Result<PathBuf, String> {
    let failed = |cause: &str| format!("exec: {name:?}: {cause}");
    if name.contains('/') {
        return check(Path::new(name)).map(|()| name.into()).map_err(|cause| failed(&cause));
    }
    for directory in path.split(':').filter(|_| !path.is_empty()) {
        let candidate = Path::new(if directory.is_empty() { "." } else { directory }).join(name);
        if !name.is_empty() && check(&candidate).is_ok() {
            if candidate.is_relative() {
                return Err(failed("cannot run executable found relative to current directory"));
            }
            return Ok(candidate);
        }
    }
    Err(failed("executable file not found in $PATH"))
}

fn check(file: &Path) -> Result<(), String> {
    let metadata =
        fs::metadata(file).map_err(|error| format!("stat {}: {}", file.display(), reason(&error)))?;
    if metadata.is_dir() {
        return Err("is a directory".into());
    }
    match faccessat(nix::fcntl::AT_FDCWD, file, AccessFlags::X_OK, AtFlags::AT_EACCESS) {
        Ok(()) => Ok(()),
        // A seccomp filter may forbid the call itself.
        Err(Errno::ENOSYS | Errno::EPERM) if metadata.permissions().mode() & 0o111 != 0 => Ok(()),
        Err(Errno::ENOSYS | Errno::EPERM) => Err("permission denied".into()),
        Err(error) => Err(go_wording(error)),
    }
}

fn reason(error: &io::Error) -> String {
    error.raw_os_error().map_or_else(|| error.to_string(), |code| go_wording(Errno::from_raw(code)))
}

/// The C library's text as Go writes it: "no such file or directory".
pub fn go_wording(error: Errno) -> String {
    let text = error.desc();
    let mut letters = text.chars();
    match letters.next() {
        // An abbreviation keeps its case.
        Some(first) if !letters.as_str().starts_with(|c: char| c.is_ascii_uppercase() || c == '/') => {
            first.to_lowercase().chain(letters).collect()
        }
        _ => text.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bare_name_is_sought_in_path() {
        assert_eq!(executable("sh", "/nowhere:/bin:/usr/bin").unwrap(), Path::new("/bin/sh"));
        for path in ["/nowhere", ""] {
            assert_eq!(
                executable("no-such-command", path).unwrap_err(),
                "exec: \"no-such-command\": executable file not found in $PATH"
            );
        }
        assert_eq!(executable("", "/bin").unwrap_err(), "exec: \"\": executable file not found in $PATH");
    }

    #[test]
    fn a_path_is_checked_and_the_reason_is_runcs() {
        assert_eq!(executable("/bin/sh", "").unwrap(), Path::new("/bin/sh"));
        assert_eq!(executable("/x", "").unwrap_err(), "exec: \"/x\": stat /x: no such file or directory");
        assert_eq!(executable("/etc", "").unwrap_err(), "exec: \"/etc\": is a directory");
        let file = tempfile::NamedTempFile::new().unwrap();
        let name = file.path().to_str().unwrap();
        assert_eq!(executable(name, "").unwrap_err(), format!("exec: {name:?}: permission denied"));
        let inside = format!("{name}/x");
        assert_eq!(
            executable(&inside, "").unwrap_err(),
            format!("exec: {inside:?}: stat {inside}: not a directory")
        );
    }
}
