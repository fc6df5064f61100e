//! Confines the helper that reads a guest's archive: its root is the directory that it fills, it has no
//! network, and of all capabilities those that act on files. It can make no device node but a
//! whiteout, which takes no capability (CAP_MKNOD is not among them).

use std::path::Path;

use caps::Capability;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use nix::sys::prctl;
use nix::sys::stat::{Mode, umask};
use nix::unistd::{chdir, pivot_root};

use crate::capabilities;

/// The last is what setting `trusted.overlay.opaque` takes: capable(CAP_SYS_ADMIN) in the first user
/// namespace, for which there is nothing smaller. It is much: what keeps the archive from using it is that no
/// byte of it is ever more than a name, a number or data to safe Rust.
const NEEDED: [Capability; 6] = [
    Capability::CAP_CHOWN,
    Capability::CAP_DAC_OVERRIDE,
    Capability::CAP_FOWNER,
    Capability::CAP_FSETID,
    Capability::CAP_SETFCAP,
    Capability::CAP_SYS_ADMIN,
];

/// Confines this process, which must have one thread only.
pub(super) fn enter(root: &Path) -> Result<(), String> {
    let spaces = CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWIPC;
    unshare(spaces).map_err(|error| format!("new namespaces: {error}"))?;
    new_root(root).map_err(|error| format!("{}: make it the root: {error}", root.display()))?;
    umask(Mode::empty());
    prctl::set_no_new_privs().map_err(|error| format!("no new privileges: {error}"))?;
    capabilities::keep_only(&NEEDED).map_err(|error| format!("drop capabilities: {error}"))
}

fn new_root(root: &Path) -> nix::Result<()> {
    let none = None::<&str>;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)?;
    mount(Some(root), root, none, MsFlags::MS_BIND, none)?;
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(none, root, none, MsFlags::MS_REMOUNT | MsFlags::MS_BIND | flags, none)?;
    chdir(root)?;
    pivot_root(".", ".")?;
    umount2(".", MntFlags::MNT_DETACH)?;
    chdir("/")
}
