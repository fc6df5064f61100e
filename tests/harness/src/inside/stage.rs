//! Turns the bare root file system into a machine: kernel views, modules, and Spore
//! installed at the paths that its users have.

use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};
use nix::mount::{MsFlags, mount};

use crate::job::{CHECKOUT, NOT_INSTALLED, PAYLOAD};

/// Modules that a ground uses.
pub(crate) const MODULES: &[&str] = &[
    "overlay",
    "kvm_amd",
    "kvm_intel",
    "tun",
    "veth",
    "loop",
    "erofs",
    // What joins an interface to a machine. Further kinds of links and netfilter's parts come when they are
    // asked for.
    "sch_ingress",
    "cls_u32",
    "act_mirred",
    "bridge",
];

const SETTINGS: &str = "/etc/spore/config.toml";
/// Boots take seconds where the outer machine's CPU is emulated: twice the default.
const CONFIG: &str = "\n# Added by the test bed.\nboot_deadline_s = 120\n";

/// Mounts `/proc`, `/sys` and `/dev` below `root`.
pub(super) fn mount_kernel_views(root: &Path) -> Result<()> {
    for (kind, at) in [("devtmpfs", "dev"), ("proc", "proc"), ("sysfs", "sys")] {
        let at = root.join(at);
        // The kernel may have mounted /dev already.
        if at == Path::new("/dev") && at.join("null").exists() {
            continue;
        }
        mount(Some(kind), &at, Some(kind), MsFlags::empty(), None::<&str>)
            .with_context(|| format!("mounting {kind} at {}", at.display()))?;
    }
    Ok(())
}

/// Makes `root` the root directory of this process and of what it starts.
pub(super) fn enter(root: &Path) -> Result<()> {
    std::env::set_current_dir(root)?;
    mount(Some("."), "/", None::<&str>, MsFlags::MS_MOVE, None::<&str>)
        .with_context(|| format!("making {} the root", root.display()))?;
    nix::unistd::chroot(".")?;
    std::env::set_current_dir("/")?;
    Ok(())
}

/// Everything between a mounted root and a machine that runs containers.
pub(super) fn furnish() -> Result<()> {
    for directory in ["/dev/pts", "/dev/shm", "/dev/mqueue"] {
        fs::create_dir_all(directory)?;
    }
    for (kind, at, options) in [
        ("tmpfs", "/run", "mode=755"),
        ("tmpfs", "/tmp", "mode=1777"),
        ("devpts", "/dev/pts", "newinstance,ptmxmode=666,mode=620,gid=5"),
        ("tmpfs", "/dev/shm", "mode=1777"),
        ("mqueue", "/dev/mqueue", ""),
        ("cgroup2", "/sys/fs/cgroup", ""),
    ] {
        mount(Some(kind), at, Some(kind), MsFlags::empty(), Some(options))
            .with_context(|| format!("mounting {kind} at {at}"))?;
    }
    for module in MODULES {
        // The one of the other vendor's CPU fails, and on the host's kernel all may.
        Command::new("modprobe").args(["-q", module]).status().context("starting modprobe")?;
    }
    let lo = Command::new("ip").args(["link", "set", "lo", "up"]).status().context("starting ip")?;
    if !lo.success() {
        eprintln!("spore-testbed: loopback cannot be set up: {lo}");
    }
    nix::unistd::sethostname("ground")?;
    install()
}

/// Installs Spore as its users do.
fn install() -> Result<()> {
    let install = Path::new(PAYLOAD).join(CHECKOUT).join("packaging/install");
    let output =
        Command::new(&install).output().with_context(|| format!("starting {}", install.display()))?;
    if !output.status.success() {
        // Not every program needs it; those that do show this.
        fs::write(NOT_INSTALLED, &output.stderr)?;
        fs::create_dir_all("/etc/spore")?;
    }
    let mut config = fs::File::options().append(true).create(true).open(SETTINGS)?;
    config.write_all(CONFIG.as_bytes()).with_context(|| format!("adding to {SETTINGS}"))
}
