//! The guest's own mount tree.
//!
//! The initramfs is the kernel's rootfs, which has no parent mount, and pivot_root(2), which
//! every container needs, refuses to work there. The tree is therefore first bound onto
//! itself and moved over `/`, so that the root is an ordinary mount.

use std::fs;
use std::io;
use std::path::Path;

use nix::mount::{MsFlags, mount};

use crate::say;

const CGROUP: &str = "/sys/fs/cgroup";
const SELF_BIND: &str = "/.root";

/// Makes the root pivotable and mounts the kernel's file systems.
pub fn set_up() -> io::Result<()> {
    make_root_pivotable()?;
    let plain = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    // devtmpfs may be there already when the kernel mounts it by itself.
    mount_at("devtmpfs", "/dev", MsFlags::MS_NOSUID, "mode=0755")?;
    mount_at("proc", "/proc", plain, "")?;
    mount_at("sysfs", "/sys", plain, "")?;
    mount_at("cgroup2", CGROUP, plain, "nsdelegate,memory_recursiveprot")?;
    mount_at("tmpfs", "/run", MsFlags::MS_NOSUID | MsFlags::MS_NODEV, "mode=0755")?;
    mount_at("tmpfs", "/tmp", MsFlags::MS_NOSUID | MsFlags::MS_NODEV, "mode=1777")?;
    mount_at("devpts", "/dev/pts", MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC, "ptmxmode=0666,mode=0620,gid=5")?;
    mount_at("tmpfs", "/dev/shm", MsFlags::MS_NOSUID | MsFlags::MS_NODEV, "mode=1777")?;
    // Not every kernel has POSIX queues; a container that mounts them says so itself.
    if let Err(error) = mount_at("mqueue", "/dev/mqueue", plain, "") {
        say!("{error}");
    }
    enable_controllers();
    Ok(())
}

fn make_root_pivotable() -> io::Result<()> {
    fs::create_dir_all(SELF_BIND)?;
    let none = None::<&str>;
    mount(Some("/"), SELF_BIND, none, MsFlags::MS_BIND, none)?;
    std::env::set_current_dir(SELF_BIND)?;
    mount(Some("."), "/", none, MsFlags::MS_MOVE, none)?;
    std::os::unix::fs::chroot(".")?;
    std::env::set_current_dir("/")
}

fn mount_at(kind: &str, target: &str, flags: MsFlags, options: &str) -> io::Result<()> {
    let attempt = || -> io::Result<()> {
        fs::create_dir_all(target)?;
        mount(Some(kind), target, Some(kind), flags, Some(options))?;
        Ok(())
    };
    attempt().map_err(|error| io::Error::new(error.kind(), format!("mount {kind} at {target}: {error}")))
}

/// Lets children of the root cgroup use every controller that the kernel has, one by one:
/// a single one that cannot be enabled would make the whole write fail.
fn enable_controllers() {
    let root = Path::new(CGROUP);
    let available = match fs::read_to_string(root.join("cgroup.controllers")) {
        Ok(available) => available,
        Err(error) => return say!("{CGROUP}/cgroup.controllers: {error}"),
    };
    for controller in available.split_whitespace() {
        if let Err(error) = fs::write(root.join("cgroup.subtree_control"), format!("+{controller}")) {
            say!("cgroup controller {controller}: {error}");
        }
    }
}
