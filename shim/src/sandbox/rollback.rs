//! A container of the sandbox goes back to one of its snapshots.

use std::time::Duration;

use super::{Sandbox, lock};
use crate::container::RolledBack;
use crate::error::Error;
use crate::snapshot::SnapshotId;

impl Sandbox {
    pub(crate) async fn rollback(&self, id: &str, to: SnapshotId) -> Result<RolledBack, Error> {
        let container = self.container(id)?;
        let times = container.rollback(&self.context.config, &self.store(), to).await?;
        if self.context.config.timeline.is_some() {
            let ns = |spent: Duration| u64::try_from(spent.as_nanos()).unwrap_or(u64::MAX);
            let mut timeline = lock(&self.timeline);
            for (key, spent) in [
                ("rollback_total_ns", times.total),
                ("rollback_gap_ns", times.gap),
                ("rollback_restore_ns", times.restore),
                ("rollback_agent_ns", times.agent),
                ("rollback_network_ns", times.network),
                ("rollback_streams_ns", times.streams),
                ("rollback_disk_ns", times.disk),
                ("rollback_thaw_ns", times.thaw),
            ] {
                timeline.put(key, ns(spent));
            }
        }
        Ok(times)
    }
}
