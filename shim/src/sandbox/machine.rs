//! A container's machine, up to the moment when its guest answers and has its disks: a guest that has booted, or began
//! in a template, and gets new ones; or all of it as a checkpoint has it.

use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex};

use slog::warn;
use tokio::sync::{Notify, mpsc};
use tokio::time::Instant;

use super::{Sandbox, lock};
use crate::bundle::Bundle;
use crate::checkpoint::{self, Restored};
use crate::config::Machine;
use crate::container::{HeldDisks, with_vm};
use crate::error::Error;
use crate::guest::{Guest, GuestRootfs, GuestStdio};
use crate::rootfs::{self, Changes, Paths, PutBack, Source, WritableDisk};
use crate::rundir::RunDir;
use crate::template::{self, Found};
use crate::vm::{self, HostFiles, Image, ImageDisk, Vm, VmError};
use crate::zygote;

/// See the module.
pub(super) struct Ready {
    pub(super) guest: Arc<Guest>,
    pub(super) disks: HeldDisks,
    /// By which an error of the guest's tells which file is meant.
    pub(super) paths: Paths,
    pub(super) changes: Option<Changes>,
    /// Of a restored disk that takes the place of another.
    pub(super) put_back: Option<PutBack>,
}

/// What a machine is made of.
pub(super) struct Ground<'a> {
    pub(super) vm: &'a Arc<Vm>,
    pub(super) files: &'a HostFiles,
    pub(super) bundle: &'a Bundle,
    pub(super) wanted: &'a rootfs::Request<'a>,
    /// Gets the files of a restored disk that nobody must find if the task does not come to be.
    pub(super) adopted: &'a Mutex<Option<Paths>>,
}

impl Sandbox {
    /// The guest boots while its disks are prepared.
    pub(super) async fn bring_up(&self, ground: &Ground<'_>, source: Source) -> Result<Ready, Error> {
        let Ground { vm, files, bundle, wanted, .. } = *ground;
        let (config, log) = (&self.context.config, &self.context.log);
        let booting = Notify::new();
        let guest = async {
            let deadline = Instant::now() + config.boot_deadline();
            let (template, seed) = match template::find(config, files, vm.machine(), log) {
                Found::Template(template) => (Some(template), None),
                Found::Seed(seed) => (None, Some(seed)),
                Found::Nothing => (None, None),
            };
            vm.build(config, files, template.as_ref()).await?;
            self.mark("vmm_ready_ns");
            // Not before a template is saved: it has no disks.
            if seed.is_none() {
                booting.notify_one();
            }
            // A restored guest's agent also says so, once the connections of the template are gone.
            vm.ready(deadline, config).await?;
            if let Some(seed) = seed {
                seed.plant(vm, log.clone()).await;
                booting.notify_one();
            }
            self.greet(ground).await
        };
        let disks = async {
            let disks = rootfs::prepare(wanted, source, log).await?;
            self.mark("rootfs_ready_ns");
            let volumes = self.serve_volumes((vm, bundle), None).await?;
            booting.notified().await;
            if let Some((server, sockets)) = volumes {
                vm.attach_volumes(server, sockets).await?;
            }
            let paths = disks.paths();
            let mut lower = Vec::new();
            for image in disks.lower {
                lower.push((vm.attach_disk(image.file(), &[], true).await?, image));
            }
            let WritableDisk { top, below, layers } = disks.writable;
            let writable = vm.attach_disk(&top, &below, false).await?;
            Ok::<_, Error>((HeldDisks { lower, writable, layers }, paths, disks.changes))
        };
        let (guest, (disks, paths, changes)) = tokio::try_join!(guest, disks)?;
        Ok(Ready { guest, disks, paths, changes, put_back: None })
    }

    /// A VMM off a zygote.
    pub(super) async fn forked(
        &self,
        source: zygote::Source,
        machine: &Machine,
        dir: Arc<RunDir>,
        questions: mpsc::Sender<OwnedFd>,
    ) -> Result<Vm, Error> {
        let (ours, theirs, vmm_log) = vm::outfit(&dir)?;
        let refused = |source| VmError::Host { operation: "fork it off the zygote", source };
        let fork = move || source.fork(&theirs, &vmm_log).map_err(refused);
        let pidfd = checkpoint::blocking(fork).await?;
        Ok(Vm::forked((pidfd, ours), machine, dir, questions, self.context.log.clone())?)
    }

    /// The checkpoint's machine. Its container stands still: it was saved like that.
    pub(super) async fn bring_back(
        &self,
        ground: &Ground<'_>,
        source: Source,
        restored: Restored,
    ) -> Result<Ready, Error> {
        let Ground { vm, files, bundle, wanted, .. } = *ground;
        let Restored { state, memory, lower, writable: (writable, layers), volumes, .. } = restored;
        let disks = rootfs::restore(wanted, source, layers).await?;
        let paths = disks.paths();
        if disks.put_back.is_none() {
            *lock(ground.adopted) = Some(paths.clone());
        }
        self.mark("rootfs_ready_ns");
        let WritableDisk { top, below, layers } = disks.writable;
        let disk = ImageDisk { serial: &writable, top: &top, below: &below };
        let fixed = lower.iter().map(|(serial, image)| ImageDisk { serial, top: image.file(), below: &[] });
        let volumes = self.serve_volumes((vm, bundle), volumes).await?;
        let image = Image {
            state: state.as_ref(),
            layers: memory.iter().map(|(id, file)| (id.clone(), file)).collect(),
            disks: fixed.chain([disk]).collect(),
        };
        // Not from before a disk that had to be copied.
        let deadline = Instant::now() + self.context.config.boot_deadline();
        vm.bring_back(files, &image, volumes).await?;
        self.mark("vmm_ready_ns");
        vm.ready(deadline, &self.context.config).await?;
        let guest = self.greet(ground).await?;
        let held = HeldDisks { lower, writable, layers };
        Ok(Ready { guest, disks: held, paths, changes: disks.changes, put_back: disks.put_back })
    }

    /// The last of a restore: what can fail has not. Who is killed in between leaves the disk that was there, or this one.
    pub(super) async fn settle_in(
        &self,
        changes: Option<&Changes>,
        put_back: Option<PutBack>,
    ) -> Result<(), Error> {
        if let Some(changes) = changes {
            // An export is that of the disk that was there.
            changes.outdate().await?;
        }
        if let Some(put_back) = put_back {
            rootfs::commit(put_back).await?;
        }
        // The disk is what counts now; the next start finishes this.
        if let Some(changes) = changes
            && let Err(error) = changes.take_back().await
        {
            warn!(self.context.log, "the upper directory is not as it was before the restore"; "error" => %error);
        }
        Ok(())
    }

    /// Gives a guest that is ready what makes it itself.
    async fn greet(&self, ground: &Ground<'_>) -> Result<Arc<Guest>, Error> {
        let Ground { vm, bundle, .. } = *ground;
        self.mark("guest_ready_ns");
        let guest = with_vm(vm, "connecting to the agent", Guest::connect(Arc::clone(vm))).await?;
        with_vm(vm, "setting the guest up", guest.setup(&bundle.hostname)).await?;
        self.mark("agent_ready_ns");
        Ok(Arc::new(guest))
    }

    /// Creates the container in the guest. What that says of a disk is told with the host's file.
    pub(super) async fn create_in_guest(
        &self,
        vm: &Vm,
        ready: &Ready,
        container: (&str, Vec<u8>, GuestStdio),
    ) -> Result<(), Error> {
        let (id, spec, stdio) = container;
        let lower: Vec<_> = ready.disks.lower.iter().map(|(serial, _)| serial.clone()).collect();
        let writable = ready.disks.writable.clone();
        let rootfs = GuestRootfs { lower: lower.clone(), writable: writable.clone() };
        let created = ready.guest.create(id, spec, rootfs, stdio);
        if let Err(error) = with_vm(vm, "creating the container", created).await {
            let of_a_disk = ready.paths.explain(&lower, &writable, &error.to_string());
            return Err(of_a_disk.map_or(error, Error::from));
        }
        // Not before: until now the container is a stopped one, of which clients see the changes.
        if let Some(changes) = &ready.changes {
            changes.take_back().await?;
        }
        Ok(())
    }
}
