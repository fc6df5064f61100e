//! A container's machine is put away, and comes back.

use super::Sandbox;
use crate::checkpoint::{blocking, forget_hibernations};
use crate::container::{Container, Hibernated, RolledBack};
use crate::error::Error;

impl Sandbox {
    pub(crate) async fn hibernate(&self, id: &str) -> Result<Hibernated, Error> {
        self.container(id)?.hibernate(&self.store()).await
    }

    /// Lets a paused container run. One that hibernates gets a machine first; how long that took.
    pub(crate) async fn resume(&self, id: &str) -> Result<Option<RolledBack>, Error> {
        let container = self.container(id)?;
        let woken = match container.is_asleep() {
            true => Some(container.wake(&self.context.config, &self.store()).await?),
            false => None,
        };
        container.freeze(false).await?;
        Ok(woken)
    }

    /// Of a container that has been deleted.
    pub(super) async fn forget_hibernations(&self, container: &Container) {
        if !container.has_hibernated() {
            return;
        }
        let (store, namespace, id) = (self.store(), self.context.namespace.clone(), container.id.clone());
        let forgotten = blocking(move || forget_hibernations(&store, (&namespace, &id), None)).await;
        if let Err(error) = forgotten {
            slog::warn!(self.context.log, "what the task hibernated in is not removed"; "task" => &container.id, "error" => %error);
        }
    }
}
