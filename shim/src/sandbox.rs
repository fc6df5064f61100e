//! The sandbox: what one shim owns. It makes the VM, the holder and the disks for a
//! container, gives them up again on every path, and knows when it may end.
//!
//! Creation runs in a task of its own: a caller that goes away (containerd's deadline) does
//! not leave half a sandbox; `Shutdown` abandons it.

mod end;
mod hibernate;
mod machine;
mod rollback;

use std::collections::HashMap;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use containerd_shim_protos::api::CreateTaskRequest;
use containerd_shim_protos::events::task::{TaskCreate, TaskIO};
use slog::{Logger, info, warn};
use spore_agent_api::network::MOST_QUESTIONS;
use tokio::sync::{Notify, mpsc, watch};
use tokio::task::JoinHandle;

use self::machine::{Ground, Ready};
use crate::bundle::Bundle;
use crate::checkpoint::{self, Restored};
use crate::clone::{self, Identity};
use crate::config::Config;
use crate::container::{Basis, Container, Live, Parts, with_vm};
use crate::error::Error;
use crate::events::Events;
use crate::holder::Holder;
use crate::hooks::{Hooks, Point, Told};
use crate::io::{Ends, Stdio, Streams};
use crate::network::{self, Network};
use crate::options;
use crate::process::ProcessId;
use crate::rootfs;
use crate::rundir::RunDir;
use crate::snapshot::Store;
use crate::timeline::Timeline;
use crate::vm::{HostFiles, Vm};
use crate::volumes::{self, FileServer, SavedVolumes};

enum Slot {
    Creating,
    Ready(Arc<Container>),
}

/// What the sandbox needs to know of its surroundings.
pub(crate) struct Context {
    pub(crate) config: Config,
    pub(crate) namespace: String,
    pub(crate) id: String,
    /// containerd's gRPC socket.
    pub(crate) containerd: String,
    pub(crate) events: Events,
    pub(crate) log: Logger,
}

pub(crate) struct Sandbox {
    context: Context,
    slots: Mutex<HashMap<String, Slot>>,
    closing: watch::Sender<bool>,
    /// Ends a creation's wait in `Shutdown`.
    created: Notify,
    reclaiming: Mutex<Option<JoinHandle<()>>>,
    timeline: Mutex<Timeline>,
}

/// What creation has made so far; given up together when it fails.
#[derive(Default)]
struct Making {
    dir: Option<Arc<RunDir>>,
    holder: Option<Holder>,
    vm: Option<Arc<Vm>>,
    network: Option<Arc<Network>>,
    hooks: Option<(Hooks, Told)>,
    /// A restored disk.
    adopted: Arc<Mutex<Option<rootfs::Paths>>>,
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Sandbox {
    pub(crate) fn new(context: Context, timeline: Timeline) -> Arc<Self> {
        Arc::new(Self {
            context,
            slots: Mutex::default(),
            closing: watch::Sender::new(false),
            created: Notify::new(),
            reclaiming: Mutex::default(),
            timeline: Mutex::new(timeline),
        })
    }

    /// The container, once it is created.
    pub(crate) fn container(&self, id: &str) -> Result<Arc<Container>, Error> {
        match lock(&self.slots).get(id) {
            Some(Slot::Ready(container)) => Ok(Arc::clone(container)),
            _ => Err(Error::NoContainer),
        }
    }

    /// Creates the container and its VM; returns the task's pid.
    pub(crate) async fn create(self: &Arc<Self>, request: CreateTaskRequest) -> Result<u32, Error> {
        self.mark("create_ns");
        let id = request.id.clone();
        {
            let mut slots = lock(&self.slots);
            if slots.contains_key(&id) {
                return Err(Error::Exists(id));
            }
            if let Some(other) = slots.keys().next() {
                return Err(Error::Unimplemented(format!(
                    "create task {id}: the sandbox has container {other} already, and several containers in one sandbox"
                )));
            }
            if *self.closing.borrow() {
                return Err(Error::Abandoned(id));
            }
            slots.insert(id.clone(), Slot::Creating);
        }
        let this = Arc::clone(self);
        let task = tokio::spawn(async move {
            let id = request.id.clone();
            let outcome = this.make(&request).await;
            match &outcome {
                Ok(container) => {
                    lock(&this.slots).insert(id, Slot::Ready(Arc::clone(container)));
                }
                Err(error) => {
                    warn!(this.context.log, "create failed"; "task" => &id, "error" => crate::error::chain(error));
                    lock(&this.slots).remove(&id);
                }
            }
            this.created.notify_waiters();
            outcome
        });
        match task.await {
            Ok(outcome) => outcome.map(|container| container.pid),
            Err(_) => {
                lock(&self.slots).remove(&id);
                self.created.notify_waiters();
                Err(Error::Abandoned(id))
            }
        }
    }

    async fn make(self: &Arc<Self>, request: &CreateTaskRequest) -> Result<Arc<Container>, Error> {
        // The VM of a deleted container may still be going.
        self.reclaimed().await;
        let mut making = Making::default();
        let mut closing = self.closing.subscribe();
        let outcome = tokio::select! {
            outcome = self.build(request, &mut making) => outcome,
            _ = closing.wait_for(|closing| *closing) => Err(Error::Abandoned(request.id.clone())),
        };
        if outcome.is_err() {
            // What the first hooks have set up the last take down again, as with runc.
            if let Some((hooks, told)) = making.hooks.take()
                && let Err(error) = hooks.run(Point::Poststop, &told).await
            {
                warn!(self.context.log, "hook failed"; "error" => %error);
            }
            if let Some(network) = making.network.take() {
                network.close().await;
            }
            drop(making.holder.take());
            if let Some(vm) = making.vm.take() {
                vm.kill().await;
            }
            let adopted = lock(&making.adopted).take();
            if let Some(Err(error)) = adopted.map(|paths| rootfs::forget_restored(&paths)) {
                warn!(self.context.log, "a restored disk is not removed"; "error" => %error);
            }
            if let Some(dir) = making.dir.take() {
                self.remove_dir(&dir);
            }
        }
        outcome
    }

    async fn build(
        self: &Arc<Self>,
        request: &CreateTaskRequest,
        making: &mut Making,
    ) -> Result<Arc<Container>, Error> {
        let Context { config, namespace, log, .. } = &self.context;
        let id = request.id.as_str();
        if let Some(options) = request.options.as_ref() {
            options::check(options, log)?;
        }
        // Everything that can be refused is, before anything is started.
        let stdio = Stdio {
            stdin: request.stdin.clone(),
            stdout: request.stdout.clone(),
            stderr: request.stderr.clone(),
            terminal: request.terminal,
        };
        stdio.check()?;
        let mut bundle = Bundle::load(Path::new(&request.bundle))?;
        for field in &bundle.unheeded {
            warn!(log, "a field of the specification has no effect in a virtual machine"; "task" => id, "field" => field);
        }
        let mut machine = config.machine(&bundle.annotations, &bundle.limits)?;
        let run_dir = RunDir::path_of(&config.run_dir, namespace, &self.context.id);
        let mut restored = self.checkpointed(request, &mut bundle, &run_dir).await?;
        if let Some(restored) = &restored {
            (machine.vcpus, machine.memory_mib) = (restored.vcpus, restored.remembered.memory_mib);
        }
        let files = HostFiles::open(config)?;
        let root = bundle.root.clone();
        let wanted = self.wanted(request, &root, &run_dir, machine.writable_size_mib);
        let source = rootfs::find(&wanted)?;
        let ends = Ends::open(&stdio, namespace, id).await?;

        let dir_error = |source| Error::RunDir { path: run_dir.clone(), source };
        let dir = Arc::new(RunDir::create(&config.run_dir, namespace, &self.context.id).map_err(dir_error)?);
        making.dir = Some(Arc::clone(&dir));
        let (asks, questions) = mpsc::channel(MOST_QUESTIONS);
        let vm = match restored.as_mut().and_then(|restored| restored.zygote.take()) {
            Some(source) => self.forked(source, &machine, Arc::clone(&dir), asks).await?,
            None => Vm::spawn(config, &machine, Arc::clone(&dir), asks, log.clone())?,
        };
        let vm = Arc::new(vm);
        making.vm = Some(Arc::clone(&vm));
        vm.set_oom_score_adj(&bundle.guest_spec);
        self.mark("vmm_spawned_ns");
        let holder = Holder::spawn(&bundle.network)?;
        let processes = (vm.id(), holder.id());
        making.holder = Some(holder);
        dir.record(|record| {
            record.shim = ProcessId::this().ok();
            (record.vmm, record.holder) = (Some(processes.0), Some(processes.1));
            (record.vcpus, record.memory_mib) = (Some(machine.vcpus), Some(machine.memory_mib));
            record.network = bundle.network.path().map(Into::into);
            record.network_inode = network::inode(processes.1.pid);
        })
        .map_err(dir_error)?;
        info!(log, "virtual machine started"; "task" => id, "vmm" => processes.0.pid, "holder" => processes.1.pid,
            "vcpus" => machine.vcpus, "memory_mib" => machine.memory_mib);

        let told = bundle.told(id, processes.1.pid);
        making.hooks = Some((bundle.hooks.clone(), told.clone()));
        for point in [Point::Prestart, Point::CreateRuntime] {
            bundle.hooks.run(point, &told).await?;
        }

        let adopted = Arc::clone(&making.adopted);
        let ground = Ground { vm: &vm, files: &files, bundle: &bundle, wanted: &wanted, adopted: &adopted };
        let remembered = restored.as_ref().map(|restored| restored.remembered.clone());
        let identity = restored.as_ref().and_then(|restored| restored.identity.clone());
        let ready = async {
            match restored {
                None => self.bring_up(&ground, source).await,
                Some(restored) => self.bring_back(&ground, source, restored).await,
            }
        };
        let network = async {
            let (holder, refuse) = (processes.1.pid, bundle.user_namespace);
            let network = Network::open(holder, refuse, machine.network, questions, log).await?;
            making.network = Some(Arc::clone(&network));
            Ok::<_, Error>(network)
        };
        let (ready, network) = tokio::try_join!(ready, network)?;
        // Before the container: settings of its spec may be an interface's.
        let joining = network.sync(&vm, &ready.guest).await?;
        self.mark("network_ready_ns");
        self.note("network_namespace_ns", joining.namespace);
        self.note("network_vmm_ns", joining.vmm);
        let (guest_id, terminal) = match &remembered {
            None => {
                self.create_in_guest(&vm, &ready, (id, bundle.guest_spec, stdio.wanted())).await?;
                (id.to_owned(), stdio.terminal)
            }
            Some(remembered) => (remembered.guest_id.clone(), remembered.terminal),
        };
        self.mark("container_created_ns");
        let Ready { guest, disks, changes, put_back, .. } = ready;
        let streams = Streams::attach(&guest, (&guest_id, ""), (terminal, remembered.is_some()), ends, log);
        let streams = with_vm(&vm, "connecting standard streams", streams).await?;
        if remembered.is_some() {
            self.settle_in(changes.as_ref(), put_back).await?;
        }
        let holder = making.holder.take().ok_or_else(|| Error::Abandoned(id.into()))?;
        let parts = Parts {
            id: id.into(),
            guest_id,
            restored: remembered.is_some(),
            identity,
            terminal,
            disks,
            bundle: bundle.path.display().to_string(),
            stdio,
            live: Live::new(Arc::clone(&vm), guest),
            basis: Basis { hostname: bundle.hostname.clone(), volumes: bundle.volumes.clone() },
            network,
            streams,
            holder,
            hooks: (bundle.hooks, told),
            changes: changes.filter(|_| machine.export_changes),
        };
        let container = Arc::new(Container::new(parts, self.context.events.clone(), log));
        self.context.events.send(created_event(request, container.pid));
        let this = Arc::clone(self);
        tokio::spawn(Arc::clone(&container).watch(move || this.mark("exit_seen_ns")));
        Ok(container)
    }

    /// The checkpoint that a task is to be created from, or the snapshot that it is to be a clone of, if there is one. The
    /// bundle's volumes come into its order, and a clone's host name into the bundle.
    async fn checkpointed(
        &self,
        request: &CreateTaskRequest,
        bundle: &mut Bundle,
        run_dir: &Path,
    ) -> Result<Option<Restored>, Error> {
        let source = clone::source(&bundle.annotations, &request.checkpoint)?.map(str::to_owned);
        let store = self.store();
        let restored = match source {
            None if request.checkpoint.is_empty() => return Ok(None),
            None => {
                let path = request.checkpoint.clone();
                checkpoint::blocking(move || Restored::import(&store, Path::new(&path))).await?
            }
            Some(source) => {
                let wanted = self.wanted(request, &bundle.root, run_dir, 0);
                if rootfs::has_run(&wanted, &rootfs::find(&wanted)?)? {
                    info!(self.context.log, "a clone that has run before boots with its own disk"; "task" => &request.id);
                    return Ok(None);
                }
                let (namespace, identity) =
                    (self.context.namespace.clone(), Identity::new(&bundle.hostname, &request.id));
                bundle.hostname.clone_from(&identity.hostname);
                let sandboxes = self.context.config.run_dir.clone();
                let open = move || clone::open((&store, &sandboxes), &namespace, &source, identity);
                checkpoint::blocking(open).await?
            }
        };
        let saved = restored.volumes.as_ref().map_or(&[][..], |saved| &saved.exports);
        bundle.volumes = volumes::matched(saved, &bundle.volumes)?;
        Ok(Some(restored))
    }

    fn wanted<'a>(
        &'a self,
        request: &'a CreateTaskRequest,
        root: &'a Path,
        run_dir: &'a Path,
        writable_size_mib: u64,
    ) -> rootfs::Request<'a> {
        let Context { config, namespace, containerd, .. } = &self.context;
        let (id, mounts, state_dir) = (&request.id, &request.rootfs, &config.state_dir);
        rootfs::Request { id, namespace, containerd, mounts, root, state_dir, run_dir, writable_size_mib }
    }

    pub(crate) fn id(&self) -> &str {
        &self.context.id
    }

    pub(crate) fn store(&self) -> Store {
        Store::new(&self.context.config.state_dir)
    }

    /// Starts the server of the bundle's volumes, if it has some; it goes on with the `saved` ones.
    async fn serve_volumes(
        &self,
        (vm, bundle): (&Vm, &Bundle),
        saved: Option<SavedVolumes>,
    ) -> Result<Option<(FileServer, Vec<UnixStream>)>, Error> {
        let served = volumes::serve(&self.context.config, vm, &bundle.volumes, saved).await?;
        if let Some((server, _)) = &served {
            let id = server.id();
            let dir_error = |source| Error::RunDir { path: vm.dir().path().into(), source };
            vm.dir().record(|record| record.file_server = Some(id)).map_err(dir_error)?;
        }
        Ok(served)
    }

    pub(crate) async fn start(&self, id: &str) -> Result<u32, Error> {
        let container = self.container(id)?;
        container.start().await?;
        self.mark("container_started_ns");
        Ok(container.pid)
    }

    fn mark(&self, event: &'static str) {
        if self.context.config.timeline.is_some() {
            lock(&self.timeline).mark(event);
        }
    }

    fn note(&self, key: &'static str, spent: Duration) {
        if self.context.config.timeline.is_some() {
            lock(&self.timeline).set(key, u64::try_from(spent.as_nanos()).unwrap_or(u64::MAX));
        }
    }
}

fn created_event(request: &CreateTaskRequest, pid: u32) -> TaskCreate {
    TaskCreate {
        container_id: request.id.clone(),
        bundle: request.bundle.clone(),
        rootfs: request.rootfs.clone(),
        io: Some(TaskIO {
            stdin: request.stdin.clone(),
            stdout: request.stdout.clone(),
            stderr: request.stderr.clone(),
            terminal: request.terminal,
            ..Default::default()
        })
        .into(),
        checkpoint: request.checkpoint.clone(),
        pid,
        ..Default::default()
    }
}
