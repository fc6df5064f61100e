//! After a killed shim: redirects whose taps have vanished with the VMM would swallow what their
//! links receive.

use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::error::NetworkError;
use super::links;
use super::netlink::{Netlink, Refusal};
use super::redirect::{self, Ingress};
use super::within;
use crate::rootfs::mountinfo;

const DEADLINE: Duration = Duration::from_secs(3);

/// The number by which a process's network namespace is known.
pub(crate) fn inode(pid: u32) -> Option<u64> {
    std::fs::metadata(format!("/proc/{pid}/ns/net")).ok().map(|found| found.ino())
}

/// Where a namespace is mounted, and so outlives the processes in it: Docker keeps those that the
/// shim has made.
pub(crate) fn kept(inode: u64) -> Option<PathBuf> {
    let root = format!("net:[{inode}]");
    let mounts = mountinfo::parse(&std::fs::read_to_string("/proc/self/mountinfo").ok()?);
    let is_it = |mount: &mountinfo::Entry| mount.fs_type == "nsfs" && mount.root == Path::new(&root);
    mounts.into_iter().find(is_it).map(|mount| mount.mount_point)
}

/// Removes such redirects from the namespace at a path; one that is not there has none.
pub(crate) fn reclaim(namespace: &Path) -> Result<(), NetworkError> {
    let Ok(namespace) = File::open(namespace) else { return Ok(()) };
    within(Some(namespace), "remove redirects from it", DEADLINE, || async {
        let netlink = Netlink::open()
            .map_err(|source| NetworkError::Namespace { operation: "open netlink sockets", source })?;
        let failed = |operation| move |refusal: Refusal| NetworkError::Netlink { operation, refusal };
        let links = links::list(&netlink).await.map_err(failed("list its interfaces"))?;
        for link in &links {
            let ingress = redirect::examine(&netlink, link.index).await;
            let Ingress::Redirects(targets) = ingress.map_err(failed("look at its queueing disciplines"))?
            else {
                continue;
            };
            if targets.iter().all(|target| links.iter().all(|link| link.index != *target)) {
                redirect::remove(&netlink, link.index).await.map_err(failed("remove a redirect"))?;
            }
        }
        Ok(())
    })
}
