//! A container's machine is put away, and comes back.

use super::Sandbox;
use crate::checkpoint::{blocking, forget_hibernations};
use crate::container::{Container, Hibernated, RolledBack};
use crate::error::Error;

impl Sandbox {
    pub(crate) async fn hibernate(&self, id: &str) -> Result<Hibernated, Error> {
        self.container(id)?.hibernate(&self.context.config, &self.store()).await
    }

    /// Lets a paused container run. One that hibernates gets a machine first; how long that took.
    pub(crate) async fn resume(&self, id: &str) -> Result<Option<RolledBack>, Error> {
        let container = self.container(id)?;
        loop {
            let woken = match container.is_asleep() {
                true => container.wake(&self.context.config, &self.store()).await?,
                false => None,
            };
            match container.freeze(false).await {
                // It was being put away when this was asked.
                Err(_) if container.is_asleep() => {}
                outcome => return outcome.map(|()| woken),
            }
        }
    }

    /// Of a container that has been deleted.
    pub(super) async fn forget_hibernations(&self, container: &Container) {
        if !container.has_hibernated() {
            return;
        }
        let (store, run_dir) = (self.store(), self.context.config.run_dir.clone());
        let (namespace, id) = (self.context.namespace.clone(), container.id.clone());
        let forget = move || forget_hibernations(&store, &run_dir, (&namespace, &id), None);
        let forgotten = blocking(forget).await;
        if let Err(error) = forgotten {
            slog::warn!(self.context.log, "what the task hibernated in is not removed"; "task" => &container.id, "error" => %error);
        }
    }
}
