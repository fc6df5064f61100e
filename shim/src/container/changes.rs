//! When a container's changes are exported: containerd tells nobody of a commit or a diff, but
//! clients that want one have paused the container, or it has ended.

use slog::{info, warn};

use super::{Container, Phase, with_vm};
use crate::error::Error;
use crate::rootfs::Changes;

impl Container {
    /// After the container was frozen. A pause that would show a client nothing, or half, is refused.
    pub(super) async fn export_for_pause(&self) -> Result<(), Error> {
        let Some(changes) = &self.changes else { return Ok(()) };
        let Err(error) = self.export(changes).await else { return Ok(()) };
        // It runs on as if nothing had been asked.
        if let Err(thaw) = with_vm(&self.vm, "resuming the container", self.guest.resume(&self.id)).await {
            warn!(self.log, "not thawed after a pause that was refused"; "error" => %thaw);
        }
        Err(error)
    }

    /// Before the container's disks are unmounted. Its end comes whatever becomes of the export.
    pub(super) async fn export_for_delete(&self, phase: Phase) {
        let Some(changes) = &self.changes else { return };
        // What never ran has changed nothing.
        if phase == Phase::Created {
            return;
        }
        let failed = if self.is_lost() {
            Some("the virtual machine ended before the container did".to_owned())
        } else {
            self.export(changes).await.err().map(|error| error.to_string())
        };
        if let Some(reason) = failed {
            warn!(self.log, "the container's changes are not exported: commit and diff do not see them, the next start does"; "cause" => &reason);
            if let Err(error) = changes.fail(&reason).await {
                warn!(self.log, "the upper directory is not as it was"; "error" => %error);
            }
        }
    }

    /// Before the container runs on: what was exported is soon out of date.
    pub(super) async fn take_changes_back(&self) {
        let Some(changes) = &self.changes else { return };
        if let Err(error) = changes.take_back().await {
            warn!(self.log, "the upper directory is not as it was before the pause"; "error" => %error);
        }
    }

    async fn export(&self, changes: &Changes) -> Result<(), Error> {
        let asked = self.guest.open_changes(&self.id);
        let stream = with_vm(&self.vm, "asking for the container's changes", asked).await?;
        let skipped = changes.export(stream).await?;
        if skipped > 0 {
            info!(self.log, "device nodes and sockets are not exported"; "count" => skipped);
        }
        Ok(())
    }
}
