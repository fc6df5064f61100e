//! What becomes of execs when their container goes back.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use crate::container::{Exec, Phase};
use crate::snapshot::SnapshotId;

/// Which execs the snapshots have that were taken of this task. It grows by what each had; a snapshot that is not in it was taken
/// of another task, or of this one without execs.
#[derive(Default)]
pub(in crate::container) struct Captured(Mutex<HashMap<SnapshotId, Vec<Had>>>);

struct Had {
    id: String,
    phase: Phase,
    /// Another one may have got the id since.
    exec: Weak<Exec>,
}

/// See the module.
#[derive(Default)]
pub(in crate::container) struct Fates {
    /// They ran then and run now.
    pub(super) going_on: Vec<Arc<Exec>>,
    /// Begun since.
    pub(super) dropped: Vec<Arc<Exec>>,
    /// To be removed from the snapshot's guest, as nobody knows them any more; `None` if nobody knows which.
    pub(super) cleared: Option<Vec<String>>,
}

impl Captured {
    /// Called while the container stands still for the snapshot.
    pub(in crate::container) fn note(&self, snapshot: SnapshotId, execs: &[Arc<Exec>]) {
        let had =
            |exec: &Arc<Exec>| Had { id: exec.id.clone(), phase: exec.phase(), exec: Arc::downgrade(exec) };
        // One without execs is as one that is not known.
        if !execs.is_empty() {
            self.lock().insert(snapshot, execs.iter().map(had).collect());
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<SnapshotId, Vec<Had>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Of those that there are `now`.
    pub(super) fn fates(&self, snapshot: SnapshotId, now: Vec<Arc<Exec>>) -> Fates {
        let captured = self.lock();
        let had = captured.get(&snapshot);
        let then = |exec: &Arc<Exec>| {
            let is = |had: &&Had| std::ptr::eq(had.exec.as_ptr(), Arc::as_ptr(exec));
            had.and_then(|had| had.iter().find(is)).map(|had| had.phase)
        };
        let (mut fates, mut stay) = (Fates::default(), Vec::new());
        for exec in now {
            match (then(&exec), exec.phase()) {
                // It tells its end itself.
                (_, Phase::Running) if exec.has_ended() => {}
                (Some(Phase::Running), Phase::Running) => {
                    stay.push(exec.id.clone());
                    fates.going_on.push(exec);
                }
                (Some(Phase::Created), Phase::Created) | (Some(Phase::Stopped), _) => {
                    stay.push(exec.id.clone());
                }
                (_, Phase::Created | Phase::Running) => fates.dropped.push(exec),
                _ => {}
            }
        }
        let cleared = |had: &Vec<Had>| {
            had.iter().map(|had| had.id.clone()).filter(|id| !stay.contains(id)).collect::<Vec<_>>()
        };
        fates.cleared = had.map(cleared);
        fates
    }
}
