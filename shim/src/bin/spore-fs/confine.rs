//! Takes away what serving files does not need: every file but those given by the shim, the
//! network, and all capabilities but those that act on files.

use caps::Capability;
use containerd_shim_spore::keep_only;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use nix::sys::prctl;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::stat::{Mode, umask};
use nix::unistd::{chdir, pivot_root, setgroups};

/// Where this process's descriptors are after [`enter`]: the one thing in its root.
pub(crate) const DESCRIPTORS: &str = "/fd";
/// Where the new root is put together; any directory that every system has.
const STAGE: &str = "/tmp";

/// What acting for any user on any file takes.
const NEEDED: [Capability; 8] = [
    Capability::CAP_CHOWN,
    Capability::CAP_DAC_OVERRIDE,
    Capability::CAP_FOWNER,
    Capability::CAP_FSETID,
    Capability::CAP_MKNOD,
    Capability::CAP_SETFCAP,
    Capability::CAP_SETGID,
    Capability::CAP_SETUID,
];

#[derive(Debug, thiserror::Error)]
pub(crate) enum ConfineError {
    #[error("confine the file server: {operation}: {source}; it has to be started by root")]
    System { operation: &'static str, source: nix::Error },
    #[error("confine the file server: capabilities: {0}")]
    Capabilities(#[from] caps::errors::CapsError),
}

/// As many files as the system lets a process have: each file that the guest knows is one.
pub(crate) fn raise_open_files() {
    if let Ok((_, hard)) = getrlimit(Resource::RLIMIT_NOFILE) {
        let _ = setrlimit(Resource::RLIMIT_NOFILE, hard, hard);
    }
}

/// Confines this process, which must have one thread only.
pub(crate) fn enter() -> Result<(), ConfineError> {
    let failed = |operation| move |source| ConfineError::System { operation, source };
    let spaces = CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWIPC;
    unshare(spaces).map_err(failed("new namespaces"))?;
    new_root().map_err(failed("new root"))?;
    // A file's mode is what the guest's kernel has made of its caller's umask.
    umask(Mode::empty());
    setgroups(&[]).map_err(failed("drop groups"))?;
    prctl::set_no_new_privs().map_err(failed("no new privileges"))?;
    // Acting for another user must not cost the capabilities that it takes.
    crate::sys::no_setuid_fixup().map_err(failed("keep capabilities over a change of user"))?;
    Ok(keep_only(&NEEDED)?)
}

/// An empty root with nothing but this process's descriptors, which are how a file that is known
/// by a path descriptor is opened.
fn new_root() -> nix::Result<()> {
    let none = None::<&str>;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)?;
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(Some("spore-fs"), STAGE, Some("tmpfs"), flags, Some("size=64k,mode=0555"))?;
    chdir(STAGE)?;
    let inside = DESCRIPTORS.trim_start_matches('/');
    nix::unistd::mkdir(inside, Mode::S_IRWXU)?;
    mount(Some("/proc/self/fd"), inside, none, MsFlags::MS_BIND, none)?;
    mount(none, ".", none, MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY | flags, none)?;
    pivot_root(".", ".")?;
    umount2(".", MntFlags::MNT_DETACH)?;
    chdir("/")
}
