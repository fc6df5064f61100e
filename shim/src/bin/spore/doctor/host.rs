//! The host itself: processor, kernel, files, tools, space.

use std::fs::File;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use containerd_shim_spore::probe::Lack;
use nix::sys::statvfs::statvfs;

use super::{Bad, INSTALL, bad};

/// The oldest kernel that Spore runs on, and tools that write what it needs.
const KERNEL: (u32, u32) = (5, 15);
const E2FSPROGS: (u32, u32) = (1, 47);
/// Images, writable layers: with less the first container may not start.
const SPACE_MIB: u64 = 1024;

pub(super) fn processor() -> Result<String, Bad> {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let flags = text.lines().find(|line| line.starts_with("flags")).unwrap_or_default();
    let has = |flag: &str| flags.split_whitespace().any(|word| word == flag);
    if has("vmx") {
        return Ok("VT-x".into());
    }
    if has("svm") {
        return Ok("AMD-V".into());
    }
    bad(
        "neither VT-x (vmx) nor AMD-V (svm)",
        "enable virtualisation in the firmware; in a virtual machine, let its host nest",
    )
}

pub(super) fn kernel() -> Result<String, Bad> {
    let release = match nix::sys::utsname::uname() {
        Ok(uname) => uname.release().to_string_lossy().into_owned(),
        Err(error) => return bad(format!("uname: {}", error.desc()), "run Linux"),
    };
    at_least(&release, &release, KERNEL, "a newer kernel")
}

/// Checks the first two numbers of a version; gives what is to be shown of it.
fn at_least(shown: &str, version: &str, (major, minor): (u32, u32), mend: &str) -> Result<String, Bad> {
    let mut numbers =
        version.split(|c: char| !c.is_ascii_digit()).map(|text| text.parse::<u32>().unwrap_or(0));
    let found = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    if found >= (major, minor) {
        return Ok(shown.into());
    }
    bad(format!("{shown}, {major}.{minor} is needed"), mend)
}

pub(super) fn overlayfs() -> Result<String, Bad> {
    let known = std::fs::read_to_string("/proc/filesystems").unwrap_or_default();
    // The kernel loads the module when something is mounted, if there is one.
    let known = known.lines().any(|line| line.split_whitespace().last() == Some("overlay"));
    if known { Ok("known to the kernel".into()) } else { bad("unknown to the kernel", "modprobe overlay") }
}

pub(super) fn cgroups() -> Result<String, Bad> {
    let path = "/sys/fs/cgroup/cgroup.controllers";
    match std::fs::read_to_string(path) {
        Ok(controllers) => Ok(format!("controllers: {}", controllers.trim())),
        Err(_) => bad(
            "not mounted at /sys/fs/cgroup",
            "boot with systemd.unified_cgroup_hierarchy=1, or mount -t cgroup2 cgroup2 /sys/fs/cgroup",
        ),
    }
}

/// What trying to join an interface has come to.
pub(super) fn network(tried: Result<String, Lack>) -> Result<String, Bad> {
    tried.or_else(|Lack { found, mend }| bad(found, mend))
}

/// A file that is configured.
pub(super) fn file(path: &Path) -> Result<String, Bad> {
    let shown = path.display();
    match File::open(path).and_then(|file| file.metadata()) {
        Ok(found) if found.is_file() && found.len() > 0 => Ok(format!("{shown} ({} MiB)", found.len() >> 20)),
        Ok(_) => bad(format!("{shown} is empty or no file"), INSTALL),
        Err(error) => bad(format!("{shown}: {error}"), INSTALL),
    }
}

pub(super) fn program(path: &Path) -> Result<String, Bad> {
    let found = file(path)?;
    match std::fs::metadata(path).is_ok_and(|found| found.permissions().mode() & 0o111 != 0) {
        true => Ok(found),
        false => bad(format!("{} is not executable", path.display()), INSTALL),
    }
}

pub(super) fn space(directory: &Path) -> Result<String, Bad> {
    // It is made with the first container.
    let there = directory.ancestors().find(|path| path.exists()).unwrap_or(Path::new("/"));
    let shown = directory.display();
    match statvfs(there) {
        Ok(found) => {
            let free_mib = (found.blocks_available().saturating_mul(found.fragment_size())) >> 20;
            let shown = format!("{shown}: {free_mib} MiB free");
            if free_mib >= SPACE_MIB {
                return Ok(shown);
            }
            bad(shown, format!("free {SPACE_MIB} MiB there, or let state_dir name another disk"))
        }
        Err(error) => bad(format!("{shown}: {}", error.desc()), "make it, or let state_dir name another"),
    }
}

/// Where a program is that others look for in `path`.
pub(super) fn find(program: &str, path: &str) -> Option<PathBuf> {
    let executable = |path: &PathBuf| {
        std::fs::metadata(path).is_ok_and(|found| found.is_file() && found.permissions().mode() & 0o111 != 0)
    };
    std::env::split_paths(path).map(|directory| directory.join(program)).find(executable)
}

/// What a tool says of itself, on either output.
fn version(program: &Path, flag: &str) -> Option<String> {
    let output = Command::new(program).arg(flag).output().ok()?;
    let text = [output.stdout, output.stderr].concat();
    let text = String::from_utf8_lossy(&text);
    text.lines().map(str::trim).find(|line| line.contains(|c: char| c.is_ascii_digit())).map(str::to_owned)
}

pub(super) fn erofs(path: &str) -> Result<String, Bad> {
    const MEND: &str = "apt-get install erofs-utils, or put it on containerd's PATH";
    let Some(program) = find("mkfs.erofs", path) else { return bad("is not on containerd's PATH", MEND) };
    let shown = program.display();
    match version(&program, "-V") {
        Some(version) => Ok(format!("{shown}: {version}")),
        None => bad(format!("{shown} does not tell its version"), MEND),
    }
}

pub(super) fn ext4(path: &str) -> Result<String, Bad> {
    const MEND: &str = "apt-get install e2fsprogs, or put it on containerd's PATH";
    let Some(program) = find("mkfs.ext4", path) else { return bad("is not on containerd's PATH", MEND) };
    let shown = program.display();
    let Some(version) = version(&program, "-V") else {
        return bad(format!("{shown} does not tell its version"), MEND);
    };
    // "mke2fs 1.47.2 (1-Jan-2025)"
    let number = version.split_whitespace().nth(1).unwrap_or_default();
    at_least(&format!("{shown}: {version}"), number, E2FSPROGS, "e2fsprogs 1.47 or newer")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_compared_by_number() {
        for (version, good) in [
            ("5.15.0-91-generic", true),
            ("6.1.0", true),
            ("10.0", true),
            ("5.9.16", false),
            ("4.19", false),
            ("", false),
        ] {
            assert_eq!(at_least(version, version, KERNEL, "").is_ok(), good, "{version}");
        }
        assert!(at_least("x", "1.47.2", E2FSPROGS, "").is_ok());
        let Bad { found, mend } = at_least("mke2fs 1.46.2", "1.46.2", E2FSPROGS, "newer").unwrap_err();
        assert_eq!((found.as_str(), mend.as_str()), ("mke2fs 1.46.2, 1.47 is needed", "newer"));
    }

    #[test]
    fn what_is_missing_is_bad_and_says_what_helps() {
        let home = tempfile::tempdir().unwrap();
        let missing = home.path().join("vmlinux");
        let Bad { found, mend } = file(&missing).unwrap_err();
        assert!(found.contains("vmlinux: No such file") && mend == INSTALL, "{found}");
        std::fs::write(&missing, b"").unwrap();
        assert!(file(&missing).unwrap_err().found.contains("empty"));
        std::fs::write(&missing, b"x").unwrap();
        assert!(file(&missing).is_ok());
        assert!(program(&missing).unwrap_err().found.contains("not executable"));
        let path = home.path().display().to_string();
        assert!(find("vmlinux", &path).is_none());
        std::fs::set_permissions(&missing, std::fs::Permissions::from_mode(0o755)).unwrap();
        assert_eq!(find("vmlinux", &format!("/nowhere:{path}")), Some(missing));
        assert!(ext4("/nowhere").unwrap_err().mend.contains("e2fsprogs"));
    }
}
