//! The machine that a container runs in. A rollback puts another in its place: who needs the machine asks for the one that
//! there is, and who waits for something of it learns that it was replaced.

use std::sync::Arc;

use super::{Container, with_vm};
use crate::error::Error;
use crate::guest::{Guest, GuestError};
use crate::vm::Vm;

/// Who has it while it is replaced has a machine that ends soon.
pub(crate) struct Live {
    pub(crate) vm: Arc<Vm>,
    pub(crate) guest: Arc<Guest>,
}

impl Live {
    /// Runs a call to the guest, or tells why the VM ended under it.
    pub(super) async fn ask<T>(
        &self,
        phase: &'static str,
        call: impl Future<Output = Result<T, GuestError>>,
    ) -> Result<T, Error> {
        with_vm(&self.vm, phase, call).await
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
