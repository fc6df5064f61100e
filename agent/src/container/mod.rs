//! Containers: the registry and each one's life, Creating → Created → Running → Stopped.
//!
//! * [`spec`]: what of the OCI spec the guest accepts, and how it is rewritten.
//! * [`disks`], [`rootfs`]: block devices by serial, joined by overlayfs.
//! * [`volumes`]: the host's directories and files.
//! * [`cgroup`]: everything that belongs to a container, by its cgroup.
//! * [`devices`]: which device nodes it may use.
//! * [`process`]: one process, [`exec`]: further ones, [`life`]: the container around them.
//! * [`block_io`], [`update`], [`oom`]: its limits made the guest's, changed, and met.
//! * [`registry`]: the requests.

use std::fs;
use std::path::Path;

use crate::error::{AgentError, Result};

pub mod block_io;
pub mod cgroup;
pub mod devices;
pub mod disks;
pub mod exec;
pub mod life;
pub mod oom;
pub mod process;
pub mod registry;
pub mod rootfs;
pub mod spec;
pub mod update;
pub mod volumes;

/// Runs blocking work on a worker thread.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => Err(AgentError::internal("worker thread", error)),
    }
}

fn remove_dir(path: &Path) -> Result<()> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(AgentError::internal(format!("remove {}", path.display()), error))
        }
        _ => Ok(()),
    }
}
