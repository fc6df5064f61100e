//! The machine that a container runs in. A rollback puts another in its place: who needs the machine asks for the one that
//! there is, and who waits for something of it learns that it was replaced. A container that hibernates has none.

use std::sync::Arc;

use super::{Container, with_vm};
use crate::error::Error;
use crate::guest::{Guest, GuestError};
use crate::snapshot::SnapshotId;
use crate::vm::Vm;

/// Who has it while it is replaced has a machine that ends soon.
pub(crate) struct Live {
    pub(crate) vm: Arc<Vm>,
    pub(crate) guest: Arc<Guest>,
    /// What it hibernates in; the machine above has been put away then.
    pub(crate) asleep: Option<SnapshotId>,
}

impl Live {
    pub(crate) fn new(vm: Arc<Vm>, guest: Arc<Guest>) -> Self {
        Self { vm, guest, asleep: None }
    }

    /// Runs a call to the guest, or tells why the VM ended under it.
    pub(super) async fn ask<T>(
        &self,
        phase: &'static str,
        call: impl Future<Output = Result<T, GuestError>>,
    ) -> Result<T, Error> {
        self.awake(phase)?;
        with_vm(&self.vm, phase, call).await
    }

    /// Whether there is a machine for that.
    pub(super) fn awake(&self, phase: &'static str) -> Result<(), Error> {
        match self.asleep {
            None => Ok(()),
            Some(_) => Err(Error::State(format!("{phase}: the container hibernates; resume it first"))),
        }
    }

    /// Whether its machine has ended under it.
    pub(super) fn is_lost(&self) -> bool {
        self.asleep.is_none() && self.vm.has_ended()
    }
}

impl Container {
    pub(crate) fn live(&self) -> Arc<Live> {
        Arc::clone(&self.live.borrow())
    }

    /// Waits until another machine is in the place of this one.
    pub(super) async fn replaced(&self, live: &Arc<Live>) {
        let mut current = self.live.subscribe();
        // Its sender is the container's.
        let _ = current.wait_for(|current| !Arc::ptr_eq(current, live)).await;
    }
}
