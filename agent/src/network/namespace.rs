//! The containers' network namespace: made before anything else of the network, with loopback up,
//! and kept by a mount, so that a container's spec can name it.

use std::fs::File;
use std::io;
use std::path::Path;
use std::thread;

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, setns, unshare};

use crate::sys;

/// What a container's spec names.
pub const PATH: &str = "/run/spore/netns";
/// The calling thread's own, whichever it is in.
pub const CURRENT: &str = "/proc/thread-self/ns/net";

fn because(what: &str, error: impl Into<io::Error>) -> io::Error {
    let error = error.into();
    io::Error::new(error.kind(), format!("containers' network namespace: {what}: {error}"))
}

/// Makes the namespace, from a thread of its own: the caller stays where it is.
pub fn make(path: &'static Path) -> io::Result<()> {
    let made = thread::spawn(move || {
        if let Some(directory) = path.parent() {
            std::fs::create_dir_all(directory).map_err(|error| because("directory", error))?;
        }
        File::create(path).map_err(|error| because("file", error))?;
        unshare(CloneFlags::CLONE_NEWNET).map_err(|error| because("unshare", error))?;
        sys::loopback_up().map_err(|error| because("lo", error))?;
        let none = None::<&str>;
        mount(Some(CURRENT), path, none, MsFlags::MS_BIND, none).map_err(|error| because("mount", error))
    });
    made.join().unwrap_or_else(|_| Err(io::Error::other("containers' network namespace: the thread failed")))
}

/// Puts the calling thread into a namespace, for the rest of its life.
pub fn enter(namespace: &File) -> io::Result<()> {
    setns(namespace, CloneFlags::CLONE_NEWNET).map_err(|error| because("join", error))
}
