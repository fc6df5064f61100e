//! A disk that was captured many times gets fewer layers again, in the background. `disks` is locked at the beginning and
//! at the end only: a checkpoint in between puts another layer on top, where nothing is merged.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use slog::{info, warn};

use super::Container;
use crate::checkpoint::blocking;
use crate::error::Error;
use crate::rootfs::Layers;
use crate::vm::VmError;

/// Changed with `disks` locked.
#[derive(Default)]
pub(super) struct Merging {
    under_way: AtomicBool,
    /// Of checkpoints too: those whose layers have no names but the disk's yet, which must stay until then.
    captured: Arc<()>,
}

impl Merging {
    /// To be held until the layers that the disk has now are a snapshot's.
    pub(super) fn capture(&self) -> Arc<()> {
        Arc::clone(&self.captured)
    }

    fn may_tidy(&self) -> bool {
        !self.under_way.load(Ordering::Acquire) && Arc::strong_count(&self.captured) == 1
    }
}

impl Container {
    /// Merges layers if there are `enough`. The caller sees to it that the machine stays. A failure leaves the disk as it was, and is tried again after the next checkpoint.
    pub(super) async fn merge_layers(&self, enough: fn(&Layers) -> bool) {
        match self.try_merge(enough).await {
            Ok(true) => info!(self.log, "layers of the writable disk are merged"),
            Ok(false) => {}
            Err(error) => {
                warn!(self.log, "layers of the writable disk are not merged"; "error" => crate::error::chain(&error));
            }
        }
    }

    async fn try_merge(&self, enough: fn(&Layers) -> bool) -> Result<bool, Error> {
        let live = self.live();
        if live.asleep.is_some() {
            return Ok(false);
        }
        let begun = {
            let disks = self.disks.lock().await;
            if !enough(&disks.layers) || self.merging.under_way.load(Ordering::Acquire) {
                return Ok(false);
            }
            let layers = disks.layers.clone();
            let merge = blocking(move || layers.begin_merge()).await?;
            self.merging.under_way.store(merge.is_some(), Ordering::Release);
            merge.map(|merge| (disks.writable.clone(), merge))
        };
        let Some((serial, merge)) = begun else { return Ok(false) };
        let done = live.vm.merge_disk(&serial, merge.numbers.clone(), &merge.staged.file).await;
        let mut disks = self.disks.lock().await;
        let mut layers = disks.layers.clone();
        // Whether the VMM has merged, or has not, and says so.
        let outcome = match &done {
            Ok(()) => Some(true),
            Err(VmError::Refused { .. }) => Some(false),
            Err(_) => None,
        };
        let kept = tokio::task::spawn_blocking(move || {
            let kept = match outcome {
                Some(true) => layers.merged(&merge),
                other => layers.not_merged(&merge, other.is_some()),
            };
            (layers, kept)
        });
        let (layers, kept) = kept.await.map_err(|error| Error::State(format!("merge layers: {error}")))?;
        disks.layers = layers;
        self.merging.under_way.store(false, Ordering::Release);
        drop(disks);
        done?;
        kept?;
        self.tidy_layers().await;
        Ok(true)
    }

    /// After each snapshot.
    pub(super) async fn look_after_layers(self: Arc<Self>) {
        let _staying = self.staying.read().await;
        self.tidy_layers().await;
        self.merge_layers(Layers::are_many).await;
    }

    /// Removes the files of layers that were merged, as soon as no checkpoint needs them by these names.
    async fn tidy_layers(&self) {
        let mut disks = self.disks.lock().await;
        if self.merging.may_tidy() {
            let mut layers = disks.layers.clone();
            let tidied = blocking(move || {
                layers.tidy();
                Ok::<_, Error>(layers)
            });
            if let Ok(layers) = tidied.await {
                disks.layers = layers;
            }
        }
    }
}
