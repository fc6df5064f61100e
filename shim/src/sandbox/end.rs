//! How a sandbox ends: containers deleted one by one, the VM reclaimed after the last, all of it
//! in order when the shim itself is told to go.

use std::sync::Arc;

use slog::warn;

use super::{Sandbox, Slot, lock};
use crate::container::{Container, Exit};
use crate::error::Error;
use crate::rundir::RunDir;
use crate::timeline;
use crate::vm::Vm;

impl Sandbox {
    /// Deletes the container; with the last one the VM goes.
    pub(crate) async fn delete(self: &Arc<Self>, id: &str) -> Result<(u32, Exit), Error> {
        let container = self.container(id)?;
        let exit = container.delete().await?;
        self.forget_hibernations(&container).await;
        let last = {
            let mut slots = lock(&self.slots);
            slots.remove(id);
            slots.is_empty()
        };
        let pid = container.pid;
        if last {
            // The answer does not wait for the host to take the VM's memory back.
            let this = Arc::clone(self);
            *lock(&self.reclaiming) = Some(tokio::spawn(async move { this.reclaim(&container).await }));
        }
        Ok((pid, exit))
    }

    /// Whether the shim may end: nothing is left and nothing new may come.
    pub(crate) async fn close(&self) -> bool {
        if !self.containers().is_empty() {
            return false;
        }
        self.give_up_creating().await;
        // A creation may have been quicker than its end.
        lock(&self.slots).is_empty()
    }

    /// Lets no creation begin, and waits for the end of those under way.
    async fn give_up_creating(&self) {
        self.closing.send_replace(true);
        loop {
            let created = self.created.notified();
            tokio::pin!(created);
            created.as_mut().enable();
            if !lock(&self.slots).values().any(|slot| matches!(slot, Slot::Creating)) {
                return;
            }
            created.await;
        }
    }

    fn containers(&self) -> Vec<Arc<Container>> {
        let slots = lock(&self.slots);
        let ready = slots.values().filter_map(|slot| match slot {
            Slot::Ready(container) => Some(Arc::clone(container)),
            Slot::Creating => None,
        });
        ready.collect()
    }

    /// Ends everything in order, whatever runs: the shim was told to go (SIGTERM). Guests get the
    /// time to write their disks back.
    pub(crate) async fn abandon(self: &Arc<Self>) {
        self.give_up_creating().await;
        for container in self.containers() {
            container.shut_down().await;
            if let Err(error) = self.delete(&container.id).await {
                warn!(self.context.log, "delete at shutdown"; "task" => &container.id, "error" => %error);
            }
        }
    }

    /// Waits until the VM of deleted containers is gone.
    pub(crate) async fn reclaimed(&self) {
        let reclaiming = lock(&self.reclaiming).take();
        if let Some(reclaiming) = reclaiming {
            let _ = reclaiming.await;
        }
    }

    async fn reclaim(&self, container: &Container) {
        self.write_timeline(container).await;
        let live = container.live();
        live.vm.kill().await;
        self.remove_dir(live.vm.dir());
    }

    pub(super) fn remove_dir(&self, dir: &RunDir) {
        if let Err(error) = dir.remove() {
            let path = dir.path().display().to_string();
            warn!(self.context.log, "run-time directory not removed"; "path" => path, "error" => %error);
        }
    }

    /// Asks the guest only here, where nobody waits, and only for a timeline.
    async fn write_timeline(&self, container: &Container) {
        let Some(path) = &self.context.config.timeline else { return };
        let live = container.live();
        let vm: &Vm = &live.vm;
        let mut timeline = std::mem::take(&mut *lock(&self.timeline));
        timeline.set("id", self.context.id.clone());
        if let Some(kib) = timeline::rss_kib(std::process::id()) {
            timeline.set("shim_rss_kib", kib);
        }
        if let Some((own, guest)) = timeline::vmm_rss_kib(vm.id().pid, vm.machine().memory_mib) {
            timeline.set("vmm_rss_kib", own);
            timeline.set("guest_rss_kib", guest);
        }
        if !vm.has_ended() {
            if let Ok(metrics) = vm.metrics().await {
                timeline.set("kernel_entry_ns", metrics.boot.entered_ns);
            }
            if let Some(duration) = container.agent_boot_ns().await {
                timeline.set("agent_boot_ns", duration);
            }
        }
        if let Err(error) = timeline.write(path) {
            warn!(self.context.log, "timeline not written"; "path" => %path.display(), "error" => %error);
        }
    }
}
