//! A container's checkpoint: a snapshot of its VM with its disks, in the store, and what has to be known to make a
//! container of it again. `super::snapshot` takes its own by the same steps.

use std::fs::File;
use std::io::{Read, Seek};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use containerd_shim_protos::events::task::{TaskCheckpointed, TaskPaused};
use slog::{Logger, info, warn};

use super::{Container, Live, Phase};
use crate::checkpoint::{Remembered, Target, admit, blocking, export, memory_file};
use crate::error::Error;
use crate::rootfs::{Image, Layers, StagedLayer};
use crate::snapshot::manifest::{Disk, LayerKind, Purpose, Volumes};
use crate::snapshot::{Draft, Manifest, Placed, SnapshotId, Store, StoreError, digest};
use crate::vm::{Destination, Saved, SnapshotTimes, Then, VmError};
use crate::volumes::SavedVolumes;

/// The disks of a container, as its checkpoints want them.
pub(crate) struct HeldDisks {
    /// Read-only ones by serial.
    pub(crate) lower: Vec<(String, Image)>,
    /// The writable one's serial and files.
    pub(crate) writable: String,
    pub(crate) layers: Layers,
}

/// What a snapshot needs before the container stands still for it.
pub(super) struct Prepared {
    draft: Draft,
    state: File,
    memory: File,
    layer: SnapshotId,
    disks: StagedDisks,
}

/// Disks that are about to be captured.
pub(super) struct StagedDisks {
    /// Read-only ones by serial.
    pub(super) lower: Vec<(String, Image)>,
    /// The writable one as it is going to be captured, from the bottom up.
    pub(super) captured: Vec<File>,
    /// What it goes on in.
    pub(super) staged: StagedLayer,
}

/// A snapshot whose VM goes on, and which is being written.
pub(super) struct Taken {
    draft: Draft,
    state: File,
    layer: SnapshotId,
    saved: Saved,
    lower: Vec<(String, Image)>,
    /// The writable disk's serial.
    writable: String,
    captured: Vec<File>,
    /// As long as these have no other names.
    held: Arc<()>,
    /// For how long the container's processes did not run for it.
    pub(super) stood: Duration,
}

impl Taken {
    pub(super) fn id(&self) -> SnapshotId {
        self.draft.id()
    }

    pub(super) fn times(&self) -> SnapshotTimes {
        self.saved.times.clone()
    }
}

impl Container {
    /// Takes a snapshot of the container, which stands still until it is taken, and goes on then unless it was paused or is to
    /// `end`. Returns when the snapshot is in the store and in the directories, durable.
    pub(crate) async fn checkpoint(
        self: &Arc<Self>,
        store: Store,
        to: Vec<Target>,
        end: bool,
    ) -> Result<(), Error> {
        let staying = self.staying.read().await;
        let (turn, taken) = self.stand_and_take(&store, end).await?;
        // Writing takes as long as it takes; meanwhile a container that goes on may end, and be deleted.
        let turn = end.then_some(turn);
        let written = async {
            let id = self.finish(taken, Purpose::Checkpoint).await?;
            let store = store.clone();
            Ok::<_, Error>((id, blocking(move || export(&store, id, &to)).await?))
        };
        let written = written.await;
        drop(staying);
        if turn.is_some() && written.is_err() && self.phase() == Phase::Running {
            // It has not come to its end: as if nothing had been asked.
            self.thaw().await?;
        }
        if !end {
            tokio::spawn(Arc::clone(self).look_after_layers());
        }
        let (id, Placed { reflinked, linked, copied }) = written?;
        info!(self.log, "checkpoint"; "snapshot" => %id,
            "reflinked" => reflinked, "linked" => linked, "copied" => copied);
        let turn = match turn {
            Some(turn) => turn,
            None => self.turn.lock().await,
        };
        if self.phase() != Phase::Deleted {
            let (container_id, checkpoint) = (self.id.clone(), id.to_string());
            self.events.send(TaskCheckpointed { container_id, checkpoint, ..Default::default() });
        }
        if end {
            // It stands still, and nobody shall let it go on.
            self.leaving.store(true, Ordering::Release);
        }
        drop(turn);
        if end {
            match self.kill(libc::SIGKILL.unsigned_abs(), true).await {
                Ok(()) | Err(Error::Finished) => {}
                Err(error) => {
                    self.leaving.store(false, Ordering::Release);
                    return Err(error);
                }
            }
            self.wait().await;
        }
        Ok(())
    }

    /// Until the VM goes on, and with it the container unless it was paused or is to end. The caller sees to it that the machine stays.
    pub(super) async fn stand_and_take(
        &self,
        store: &Store,
        end: bool,
    ) -> Result<(tokio::sync::MutexGuard<'_, ()>, Taken), Error> {
        self.merge_layers(Layers::are_too_many).await;
        // Before `turn`: who has that waits for no disk.
        let mut disks = self.disks.lock().await;
        self.check(self.phase())?;
        let prepared = self.prepare(store, &mut disks).await?;
        let turn = self.turn.lock().await;
        let (phase, begun) = (self.phase(), Instant::now());
        if let Err(error) = self.stand(phase).await {
            self.give_back(&mut disks.layers, prepared).await;
            return Err(error);
        }
        let taken = self.take(prepared, &mut disks, Then::GoOn).await;
        if let Ok(taken) = &taken {
            self.captured.note(taken.id(), &self.execs());
        }
        if phase == Phase::Running && (taken.is_err() || !end) {
            self.thaw().await?;
        }
        let mut taken = taken?;
        if phase == Phase::Running {
            taken.stood = begun.elapsed();
        }
        Ok((turn, taken))
    }

    pub(super) fn check(&self, phase: Phase) -> Result<(), Error> {
        if self.leaving.load(Ordering::Acquire) {
            return Err(Error::State(
                "cannot take a snapshot of a container that ends with its checkpoint".into(),
            ));
        }
        if !matches!(phase, Phase::Running | Phase::Paused) {
            return Err(Error::State(format!("cannot take a snapshot of a {} container", phase.name())));
        }
        self.live().awake("snapshot")
    }

    /// Has it stand still, if it can be captured in this phase and is not paused.
    pub(super) async fn stand(&self, phase: Phase) -> Result<(), Error> {
        self.check(phase)?;
        if phase != Phase::Running {
            return Ok(());
        }
        let live = self.live();
        let paused = live.ask("freezing the container", live.guest.pause(&self.guest_id)).await;
        if matches!(paused, Err(Error::Guest(_))) {
            // It may have come to it after all.
            self.thaw().await?;
        }
        paused
    }

    /// A container that does not go on is a paused one, so that a client can resume it.
    pub(super) async fn thaw(&self) -> Result<(), Error> {
        let live = self.live();
        let resumed = live.guest.resume(&self.guest_id);
        let thawed = live.ask("thawing the container", resumed).await;
        if thawed.is_err() && self.phase() == Phase::Running {
            self.enter(Phase::Paused);
            self.events.send(TaskPaused { container_id: self.id.clone(), ..Default::default() });
        }
        thawed
    }

    /// All that has to do with files.
    pub(super) async fn prepare(&self, store: &Store, disks: &mut HeldDisks) -> Result<Prepared, Error> {
        let live = self.live();
        let (store, machine) = (store.clone(), live.vm.machine().clone());
        let begun = blocking(move || {
            admit(&store, &machine)?;
            let mut draft = store.begin()?;
            let (at, memory) = draft.new_layer(LayerKind::Memory)?;
            let layer = draft.layers().get(at as usize).map(|layer| layer.id);
            let state = memory_file(&[]).map_err(StoreError::own("make", "the state's file"))?;
            Ok::<_, StoreError>((draft, memory, layer, state))
        });
        let (draft, memory, layer, state) = begun.await?;
        let layer = layer.ok_or_else(|| Error::Invalid("a snapshot without a memory layer".into()))?;
        let disks = self.stage(disks).await?;
        Ok(Prepared { draft, state, memory, layer, disks })
    }

    /// Makes the layer that the writable disk goes on in.
    pub(super) async fn stage(&self, disks: &mut HeldDisks) -> Result<StagedDisks, Error> {
        let lower = disks.lower.iter().map(|(serial, image)| Ok((serial.clone(), image.try_clone()?)));
        let lower =
            lower.collect::<std::io::Result<_>>().map_err(StoreError::own("open", "an image again"))?;
        let (mut own, log) = (disks.layers.clone(), self.log.clone());
        let (captured, staged, own) = blocking(move || {
            let captured = own.files()?;
            let staged = own.stage()?;
            match own.add(&staged) {
                Ok(()) => Ok((captured, staged, own)),
                Err(error) => {
                    give_up(&mut own, staged, &log);
                    Err(error)
                }
            }
        })
        .await?;
        disks.layers = own;
        Ok(StagedDisks { lower, captured, staged })
    }

    /// Nothing has come of it.
    pub(super) async fn give_back(&self, layers: &mut Layers, prepared: Prepared) {
        self.take_back(layers, prepared.disks.staged).await;
    }

    /// The VMM has not switched to it.
    pub(super) async fn take_back(&self, layers: &mut Layers, staged: StagedLayer) {
        let (mut own, log) = (layers.clone(), self.log.clone());
        let work = move || {
            give_up(&mut own, staged, &log);
            Ok::<_, Error>(own)
        };
        if let Ok(own) = blocking(work).await {
            *layers = own;
        }
    }

    /// Saves the VM with its disks.
    pub(super) async fn take(
        &self,
        prepared: Prepared,
        disks: &mut HeldDisks,
        then: Then,
    ) -> Result<Taken, Error> {
        let live = self.live();
        let Prepared { draft, state, memory, layer, disks: StagedDisks { lower, captured, staged } } =
            prepared;
        let name = layer.to_string();
        let to = Destination {
            state: &state,
            memory: &memory,
            layer: &name,
            disks: &[(disks.writable.as_str(), &staged.file)],
        };
        match live.vm.save(&to, then).await {
            Ok(saved) => {
                let (held, stood) = (self.merging.capture(), Duration::ZERO);
                let writable = disks.writable.clone();
                Ok(Taken { draft, state, layer, saved, lower, writable, captured, held, stood })
            }
            Err(error) => Err(self.not_captured(&live, &mut disks.layers, staged, error).await),
        }
    }

    /// What is to be done about the staged layer when the VMM has not said that it uses it.
    pub(super) async fn not_captured(
        &self,
        live: &Live,
        layers: &mut Layers,
        staged: StagedLayer,
        error: VmError,
    ) -> Error {
        match &error {
            // The disk may have been switched before that; the new layer is right either way.
            VmError::Ended { .. } => {}
            // It may still be switched, who knows when.
            VmError::Stuck { .. } => live.vm.kill().await,
            _ => self.take_back(layers, staged).await,
        }
        error.into()
    }

    /// Waits until all of it is written, and puts it into the store. Its caller may have `turn`.
    pub(super) async fn finish(&self, taken: Taken, purpose: Purpose) -> Result<SnapshotId, Error> {
        let live = self.live();
        let Taken { mut draft, state, layer, mut saved, lower, writable, captured, held, .. } = taken;
        let volumes = saved.volumes.take();
        let needed = saved.written().await?;
        let host = |operation| move |source| VmError::Host { operation, source };
        let origin = live.vm.origin().map_err(host("look at the memory layers"))?;
        let own = layer.to_string();
        if let Some(missing) =
            needed.iter().find(|id| **id != own && !origin.iter().any(|(had, _)| had == *id))
        {
            let message = format!("it needs the memory layer {missing}, which the VM was not restored from");
            return Err(VmError::Refused { operation: "write a snapshot", message }.into());
        }
        let mut about = self.about(purpose);
        blocking(move || {
            draft.state(&content(state).map_err(StoreError::own("read", "the state"))?)?;
            if let Some(SavedVolumes { exports, tables: file }) = volumes {
                let tables = draft.tables(&content(file).map_err(StoreError::own("read", "the tables"))?)?;
                about.volumes = Some(Volumes { tables, exports });
            }
            if !needed.contains(&own) {
                draft.drop_layer()?;
            }
            for (id, file) in origin.iter().filter(|(id, _)| needed.contains(id)) {
                let id = id.parse().map_err(|source| StoreError::Manifest { id: layer, source })?;
                draft.link_layer(id, LayerKind::Memory, file)?;
            }
            for (serial, image) in lower {
                let digest = image.digest(digest).map_err(StoreError::own("read", "an image"))?;
                let added = draft.add_layer(LayerKind::Disk, image.file(), Some(digest))?;
                about.disks.push(Disk { serial, layers: vec![added] });
            }
            let added = captured.iter().map(|file| draft.add_layer(LayerKind::Disk, file, None));
            about.disks.push(Disk { serial: writable, layers: added.collect::<Result<_, _>>()? });
            drop(held);
            Ok::<_, StoreError>(draft.publish(about)?.id)
        })
        .await
    }

    /// All of the manifest that is known before the snapshot's files are.
    fn about(&self, purpose: Purpose) -> Manifest {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let (remembered, vcpus) = self.remembered();
        Manifest {
            created: since.as_secs(),
            labels: remembered.labels(),
            vcpus,
            ..Manifest::about(purpose, self.events.namespace(), &self.id)
        }
    }

    /// What has to be known of it and of its machine, with the number of processors.
    pub(super) fn remembered(&self) -> (Remembered, u8) {
        let live = self.live();
        let machine = live.vm.machine();
        let (guest_id, terminal, memory_mib) = (self.guest_id.clone(), self.terminal, machine.memory_mib);
        (Remembered { guest_id, terminal, memory_mib }, machine.vcpus)
    }
}

fn content(mut file: File) -> std::io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    file.rewind()?;
    file.read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// A failure is no worse than the layer's staying in the list.
fn give_up(layers: &mut Layers, staged: StagedLayer, log: &Logger) {
    if let Err(error) = layers.take_back(staged) {
        warn!(log, "a layer that is not used is not removed"; "error" => %error);
    }
}
