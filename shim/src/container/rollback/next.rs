//! The machine that is to take the place of another, until it could.

use std::sync::Arc;
use std::time::{Duration, Instant};

use slog::warn;
use ttrpc::Code;

use super::captured::Fates;
use super::{Container, Live, RolledBack};
use crate::checkpoint::Restored;
use crate::config::Config;
use crate::container::with_vm;
use crate::error::Error;
use crate::guest::{Guest, GuestError};
use crate::io::GuestEnds;
use crate::network::Held;
use crate::rootfs::{Image, WritableDisk};
use crate::snapshot::SnapshotId;
use crate::vm::{HostFiles, Image as SavedImage, ImageDisk, Vm};
use crate::volumes::{self, matched};

/// How long a process of a guest that nobody knows any more may take to be killed.
const CLEARED: Duration = Duration::from_secs(2);

/// What it is made of.
pub(in crate::container) struct Wanted<'a> {
    pub(in crate::container) config: &'a Config,
    pub(in crate::container) host: &'a HostFiles,
    pub(in crate::container) restored: &'a mut Restored,
    /// The task's own read-only disks, which are the snapshot's too.
    pub(in crate::container) lower: &'a [(String, Image)],
    pub(in crate::container) disk: &'a WritableDisk,
    pub(in crate::container) to: SnapshotId,
}

/// See the module.
pub(in crate::container) struct Next {
    pub(in crate::container) guest: Arc<Guest>,
    pub(in crate::container) network: Held,
    pub(in crate::container) fates: Fates,
    pub(in crate::container) streams: Option<GuestEnds>,
    /// Of those execs that go on.
    pub(in crate::container) exec_streams: Vec<Option<GuestEnds>>,
    /// Since when the container stands still.
    pub(in crate::container) paused: Instant,
}

impl Container {
    /// Its container stands still: it was saved like that.
    pub(in crate::container) async fn build_next(
        self: &Arc<Self>,
        old: &Live,
        vm: &Arc<Vm>,
        (mut network, paused): (Held, Instant),
        wanted: Wanted<'_>,
        times: &mut RolledBack,
    ) -> Result<Next, Error> {
        let Wanted { config, host, restored, lower, disk, to } = wanted;
        let saved = restored.volumes.take();
        let ordered = matched(saved.as_ref().map_or(&[][..], |saved| &saved.exports), &self.basis.volumes)?;
        // While nothing of the machine that stands still is under way.
        let volumes = volumes::serve(config, vm, &ordered, saved).await?;
        let deadline = tokio::time::Instant::now() + config.boot_deadline();
        let fixed = lower.iter().map(|(serial, image)| ImageDisk { serial, top: image.file(), below: &[] });
        let writable = ImageDisk { serial: &restored.writable.0, top: &disk.top, below: &disk.below };
        let image = SavedImage {
            state: restored.state.as_ref(),
            layers: restored.memory.iter().map(|(id, file)| (id.clone(), file)).collect(),
            disks: fixed.chain([writable]).collect(),
        };
        vm.bring_back(host, &image, volumes).await?;
        self.note_machines(&old.vm, Some(vm));
        times.restore = paused.elapsed();

        let begun = Instant::now();
        vm.ready(deadline, config).await?;
        let guest = with_vm(vm, "connecting to the agent", Guest::connect(Arc::clone(vm))).await?;
        with_vm(vm, "setting the guest up", guest.setup(&self.basis.hostname)).await?;
        times.agent = begun.elapsed();

        let begun = Instant::now();
        network.lend(vm, &guest).await?;
        times.network = begun.elapsed();

        let begun = Instant::now();
        let fates = self.captured.fates(to, self.execs());
        let unknown = match &fates.cleared {
            Some(known) => known.clone(),
            None => with_vm(vm, "asking for processes", self.execs_in(&guest)).await?,
        };
        self.clear_execs(&guest, &unknown).await;
        let found = self.streams.find_again(&guest, (&self.guest_id, ""), self.terminal);
        let streams = Some(with_vm(vm, "connecting standard streams", found).await?);
        let mut exec_streams = Vec::with_capacity(fates.going_on.len());
        for exec in &fates.going_on {
            let ends = match exec.streams() {
                Some(streams) => {
                    let found = streams.find_again(&guest, (&self.guest_id, &exec.id), exec.stdio.terminal);
                    Some(with_vm(vm, "connecting standard streams", found).await?)
                }
                None => None,
            };
            exec_streams.push(ends);
        }
        times.streams = begun.elapsed();
        let guest = Arc::new(guest);
        Ok(Next { guest, network, fates, streams, exec_streams, paused })
    }

    async fn execs_in(&self, guest: &Guest) -> Result<Vec<String>, GuestError> {
        let processes = guest.pids(&self.guest_id).await?;
        Ok(processes.into_iter().map(|process| process.exec_id).filter(|id| !id.is_empty()).collect())
    }

    /// Removes execs from a guest that nobody knows any more. One that does not go stays with its container.
    pub(in crate::container) async fn clear_execs(&self, guest: &Guest, ids: &[String]) {
        for id in ids {
            let cleared = async {
                match guest.signal(&self.guest_id, id, libc::SIGKILL.unsigned_abs(), false).await {
                    // A frozen process obeys it too.
                    Ok(()) => drop(guest.wait(&self.guest_id, id).await?),
                    // It has ended, or never began.
                    Err(GuestError::Refused {
                        code: Code::NOT_FOUND | Code::FAILED_PRECONDITION, ..
                    }) => {}
                    Err(error) => return Err(error),
                }
                guest.delete(&self.guest_id, id).await
            };
            match tokio::time::timeout(CLEARED, cleared).await {
                Ok(Ok(()) | Err(GuestError::Refused { code: Code::NOT_FOUND, .. })) => {}
                Ok(Err(error)) => {
                    warn!(self.log, "an exec is not removed from the guest"; "exec" => id, "error" => %error);
                }
                Err(_) => warn!(self.log, "an exec is not removed from the guest in time"; "exec" => id),
            }
        }
    }
}
