//! Acting as the guest's user, so that what is made belongs to it. The thread keeps its
//! capabilities (`confine`): whether the user may was the guest kernel's to decide, which has
//! checked permissions before it asked.

use std::io;

use fuse_backend_rs::api::filesystem::Context;
use nix::unistd::{Gid, Uid, setfsgid, setfsuid};

use super::errno;

/// Gives the thread its own ids back.
struct Back;

impl Drop for Back {
    fn drop(&mut self) {
        setfsuid(Uid::from_raw(0));
        setfsgid(Gid::from_raw(0));
    }
}

/// Runs `work` with the file system ids of the request; they are this thread's alone.
pub(super) fn as_user<T>(context: &Context, work: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
    if (context.uid, context.gid) == (0, 0) {
        return work();
    }
    let _back = Back;
    let (uid, gid) = (Uid::from_raw(context.uid), Gid::from_raw(context.gid));
    setfsgid(gid);
    setfsuid(uid);
    // They do not fail in words; the ids that are set are what a second call returns.
    if setfsuid(uid) != uid || setfsgid(gid) != gid {
        return Err(errno(libc::EPERM));
    }
    work()
}
