//! When a container's changes are exported: containerd tells nobody of a commit or a diff, but
//! clients that want one have paused the container, or it has ended.

use slog::{info, warn};

use super::Container;
use crate::error::Error;
use crate::rootfs::Changes;

impl Container {
    /// After the container was frozen. A pause that would show a client nothing, or half, is refused.
    pub(super) async fn export_for_pause(&self) -> Result<(), Error> {
        let live = self.live();
        let Some(changes) = &self.changes else { return Ok(()) };
        let killed = async {
            self.ending.over().await;
            "the container has ended meanwhile"
        };
        let Err(error) = self.export(changes, killed).await else { return Ok(()) };
        // It runs on as if nothing had been asked.
        if let Err(thaw) = live.ask("resuming the container", live.guest.resume(&self.guest_id)).await {
            warn!(self.log, "not thawed after a pause that was refused"; "error" => %thaw);
        }
        Err(error)
    }

    /// After the container's process has ended, before that is told: who sees a stopped container may commit it.
    /// Its end comes whatever becomes of the export.
    pub(super) async fn export_for_end(&self) {
        let Some(changes) = &self.changes else { return };
        // What hibernates has been exported as it is.
        if self.ending.is_hurried() || self.is_asleep() {
            return;
        }
        let failed = if self.is_lost() {
            Some("the virtual machine ended before the container did".to_owned())
        } else {
            let hurried = async {
                self.ending.hurried().await;
                "the shim has to go"
            };
            self.export(changes, hurried).await.err().map(|error| error.to_string())
        };
        if let Some(reason) = failed {
            warn!(self.log, "the container's changes are not exported: commit and diff do not see them, the next start does"; "cause" => &reason);
            if let Err(error) = changes.fail(&reason).await {
                warn!(self.log, "the upper directory is not as it was"; "error" => %error);
            }
        }
    }

    /// Before the container runs on: what was exported is out of date with the first byte that it writes.
    pub(super) async fn take_changes_back(&self) -> Result<(), Error> {
        let Some(changes) = &self.changes else { return Ok(()) };
        changes.outdate().await?;
        if let Err(error) = changes.take_back().await {
            warn!(self.log, "the upper directory is not as it was before the pause"; "error" => %error);
        }
        Ok(())
    }

    /// After a container that is paused has gone back: what a client sees of it does so too.
    pub(super) async fn export_anew(&self) {
        let Some(changes) = &self.changes else { return };
        let killed = async {
            self.ending.over().await;
            "the container has ended meanwhile"
        };
        let exported = async {
            self.take_changes_back().await?;
            self.export(changes, killed).await
        };
        if let Err(error) = exported.await {
            let reason = error.to_string();
            warn!(self.log, "what the container has written as of its snapshot is not exported: commit and diff do not see it"; "cause" => &reason);
            if let Err(error) = changes.fail(&reason).await {
                warn!(self.log, "the upper directory is not as it was"; "error" => %error);
            }
        }
    }

    async fn export(&self, changes: &Changes, stop: impl Future<Output = &'static str>) -> Result<(), Error> {
        let live = self.live();
        let asked = live.guest.open_changes(&self.guest_id);
        let stream = live.ask("asking for the container's changes", asked).await?;
        let ended = async {
            live.vm.ended().await;
            "the virtual machine has ended"
        };
        let stop = async {
            tokio::select! {
                reason = stop => reason,
                reason = ended => reason,
            }
        };
        let skipped = changes.export(stream, stop).await?;
        if skipped > 0 {
            info!(self.log, "device nodes and sockets are not exported"; "count" => skipped);
        }
        Ok(())
    }
}
