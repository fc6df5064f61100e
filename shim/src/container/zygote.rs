//! A zygote of a container's machine, for clones: what a snapshot is (`super::checkpoint`), but that nothing is written, and it
//! lasts for as long as its clones are being made.

use std::collections::HashMap;
use std::io;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};

use slog::info;

use super::checkpoint::StagedDisks;
use super::{Container, HeldDisks, Phase};
use crate::error::Error;
use crate::rootfs::Layers;
use crate::snapshot::{SnapshotId, StoreError};
use crate::vm::{SnapshotTimes, VmError};
use crate::zygote::{Address, Parts, Served, serve};

type Map = Mutex<HashMap<String, Served>>;

/// Those of a container that there are, by address. They end with it.
#[derive(Default)]
pub(super) struct Zygotes(Arc<Map>);

impl Zygotes {
    fn add(&self, address: String, serve: impl FnOnce(Weak<Map>) -> io::Result<Served>) -> io::Result<()> {
        // Locked: its end finds it.
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.insert(address, serve(Arc::downgrade(&self.0))?);
        Ok(())
    }
}

/// Whether there was one.
fn remove(zygotes: &Map, address: &str) -> bool {
    zygotes.lock().unwrap_or_else(PoisonError::into_inner).remove(address).is_some()
}

/// A zygote that waits for clones.
pub(crate) struct Waiting {
    /// By which clones find it.
    pub(crate) address: String,
    /// For how long the container stood still.
    pub(crate) stood: Duration,
    /// Of its VM within that.
    pub(crate) times: SnapshotTimes,
}

impl Container {
    /// Returns when the container goes on, which `sandbox` is the one of.
    pub(crate) async fn zygote(self: &Arc<Self>, sandbox: &str) -> Result<Waiting, Error> {
        let name = SnapshotId::random().map_err(StoreError::own("choose", "a zygote's name"))?;
        let address = Address::new(sandbox, name);
        let staying = Arc::clone(&self.staying).read_owned().await;
        self.merge_layers(Layers::are_too_many).await;
        // Before `turn`: who has that waits for no disk.
        let mut disks = self.disks.lock().await;
        self.check(self.phase())?;
        let staged = self.stage(&mut disks).await?;
        let turn = self.turn.lock().await;
        let (phase, begun) = (self.phase(), Instant::now());
        if let Err(error) = self.stand(phase).await {
            self.take_back(&mut disks.layers, staged.staged).await;
            return Err(error);
        }
        let forked = self.fork(name, staged, &mut disks).await;
        if phase == Phase::Running {
            self.thaw().await?;
        }
        drop((turn, disks));
        let parts = forked?;
        let stood = if phase == Phase::Running { begun.elapsed() } else { Duration::ZERO };
        let (times, named) = (parts.zygote.times.clone(), address.to_string());
        let (dir, log) = (self.live().vm.shared_dir(), self.log.clone());
        let served = self.zygotes.add(named.clone(), |zygotes| {
            let known = named.clone();
            let over = move || {
                if let Some(zygotes) = zygotes.upgrade() {
                    remove(&zygotes, &known);
                }
            };
            serve(parts, dir, &address, log, over)
        });
        served.map_err(|source| VmError::Host { operation: "serve a zygote", source })?;
        drop(staying);
        tokio::spawn(Arc::clone(self).look_after_layers());
        info!(self.log, "zygote"; "zygote" => &named);
        Ok(Waiting { address: named, stood, times })
    }

    /// Ends a zygote, and with it that it can be asked for clones.
    pub(crate) fn end_zygote(&self, address: &str) -> Result<(), Error> {
        match remove(&self.zygotes.0, address) {
            true => Ok(()),
            false => Err(Error::State(format!("there is no zygote {address:?} of container {}", self.id))),
        }
    }

    async fn fork(
        &self,
        name: SnapshotId,
        staged: StagedDisks,
        disks: &mut HeldDisks,
    ) -> Result<Parts, Error> {
        let live = self.live();
        let StagedDisks { lower, captured, staged } = staged;
        let next = [(disks.writable.as_str(), &staged.file)];
        let zygote = match live.vm.zygote(&name.to_string(), &next).await {
            Ok(zygote) => zygote,
            Err(error) => return Err(self.not_captured(&live, &mut disks.layers, staged, error).await),
        };
        let (_held, writable) = (self.merging.capture(), (disks.writable.clone(), captured));
        let host = |source| VmError::Host { operation: "look at the memory layers", source };
        let (memory, (remembered, vcpus)) = (live.vm.origin().map_err(host)?, self.remembered());
        Ok(Parts { zygote, remembered, vcpus, memory, lower, writable, _held })
    }
}
