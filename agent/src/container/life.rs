//! A container from created to deleted: its processes, its cgroup, its root.
//!
//! `life` is held for the whole of Start, Exec's start, Pause, Resume and Delete, so that these
//! exclude each other. The map of execs is a leaf, never held across an await.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use oci_spec::runtime::LinuxResources;

use super::cgroup::Cgroup;
use super::exec::Exec;
use super::process::{Process, Status};
use super::rootfs::{Changes, Rootfs};
use super::{blocking, remove_dir, update};
use crate::error::{AgentError, Result};
use crate::reaper::{Exit, Reaper};
use crate::runtime::client::Helper;
use crate::say;
use crate::stdio::streams::Streams;

/// A killed process is reaped within this time, or hangs in the kernel.
const KILL_DEADLINE: Duration = Duration::from_secs(10);
/// Processes that are told.
const MAX_PIDS: usize = 4096;

/// See the module.
#[derive(Debug)]
pub struct Container {
    pub id: String,
    pub init: Arc<Process>,
    pub cgroup: Cgroup,
    /// Holds `config.json` and the mounted root.
    pub bundle: PathBuf,
    pub life: tokio::sync::Mutex<Life>,
    paused: AtomicBool,
    execs: Mutex<HashMap<String, Arc<Exec>>>,
}

/// What there is until something ends it.
#[derive(Debug)]
pub struct Life {
    /// Until Start.
    helper: Option<Helper>,
    /// Until Delete.
    rootfs: Option<Rootfs>,
}

/// A process of the container.
#[derive(Debug, PartialEq, Eq)]
pub struct ProcessInfo {
    pub pid: u32,
    pub exec_id: String,
    pub command: String,
}

/// What Stats reads.
const STATS: [&str; 14] = [
    "cpu.stat",
    "cpu.max",
    "io.stat",
    "memory.current",
    "memory.events",
    "memory.max",
    "memory.peak",
    "memory.stat",
    "memory.swap.current",
    "memory.swap.max",
    "pids.current",
    "pids.max",
    "hugetlb.2MB.current",
    "hugetlb.2MB.max",
];
const MAX_STAT: usize = 64 * 1024;

impl Container {
    pub fn new(
        id: String,
        init: Process,
        cgroup: Cgroup,
        bundle: PathBuf,
        helper: Helper,
        rootfs: Rootfs,
    ) -> Self {
        Self {
            id,
            init: Arc::new(init),
            cgroup,
            bundle,
            life: tokio::sync::Mutex::new(Life { helper: Some(helper), rootfs: Some(rootfs) }),
            paused: false.into(),
            execs: Mutex::default(),
        }
    }

    fn execs(&self) -> MutexGuard<'_, HashMap<String, Arc<Exec>>> {
        self.execs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How errors name a process: an exec, or with an empty id the container's init.
    pub fn name_of(&self, exec_id: &str) -> String {
        if exec_id.is_empty() {
            format!("container \"{}\"", self.id)
        } else {
            format!("container \"{}\": exec \"{}\"", self.id, exec_id.escape_default())
        }
    }

    pub fn exec(&self, exec_id: &str) -> Result<Arc<Exec>> {
        let exec = self.execs().get(exec_id).cloned();
        exec.ok_or_else(|| AgentError::NotFound(format!("{}: does not exist", self.name_of(exec_id))))
    }

    /// The exec's process, or with an empty id the container's init.
    pub fn process(&self, exec_id: &str) -> Result<Arc<Process>> {
        if exec_id.is_empty() {
            return Ok(Arc::clone(&self.init));
        }
        Ok(Arc::clone(&self.exec(exec_id)?.process))
    }

    pub fn is_paused(&self) -> bool {
        self.paused.load(Ordering::Relaxed)
    }

    /// Lets the container's init run.
    pub async fn start(&self, reaper: &Reaper) -> Result<()> {
        let mut life = self.life.lock().await;
        let name = self.name_of("");
        if let Some(exit) = self.init.exited() {
            let status = exit.status;
            return Err(AgentError::FailedPrecondition(format!(
                "{name}: cannot start, it has ended with status {status}"
            )));
        }
        let helper = life
            .helper
            .take()
            .ok_or_else(|| AgentError::FailedPrecondition(format!("{name}: cannot start, it is running")))?;
        self.init.set_started();
        if let Err(error) = helper.start().await {
            // It would wait for a start that can no longer come.
            let _ = self.init.signal(reaper, libc::SIGKILL, &name);
            return Err(error);
        }
        Ok(())
    }

    /// Takes a prepared exec up.
    pub fn add_exec(&self, exec_id: &str, exec: Exec) -> Result<()> {
        let mut execs = self.execs();
        if execs.contains_key(exec_id) {
            return Err(AgentError::AlreadyExists(format!("{}: already exists", self.name_of(exec_id))));
        }
        execs.insert(exec_id.into(), Arc::new(exec));
        Ok(())
    }

    pub async fn start_exec(&self, exec_id: &str, reaper: &Arc<Reaper>, streams: &Streams) -> Result<u32> {
        let exec = self.exec(exec_id)?;
        let _life = self.life.lock().await;
        let refused = |state: &str| {
            let name = self.name_of(exec_id);
            AgentError::FailedPrecondition(format!("{name}: cannot exec in a {state} container"))
        };
        match self.init.status() {
            Status::Stopped => return Err(refused("stopped")),
            Status::Running if self.is_paused() => return Err(refused("paused")),
            // As with runc, a container that is created only may be entered.
            Status::Created | Status::Running => {}
        }
        exec.start(self, exec_id, reaper, streams).await?;
        Ok(exec.process.pid())
    }

    /// Forgets an exec that does not run; what it ended with, if it ever ran.
    pub fn remove_exec(&self, exec_id: &str) -> Result<Option<Exit>> {
        let exec = self.exec(exec_id)?;
        if exec.process.status() == Status::Running {
            let name = self.name_of(exec_id);
            return Err(AgentError::FailedPrecondition(format!(
                "{name}: cannot be deleted while it runs; kill it first"
            )));
        }
        self.execs().remove(exec_id);
        Ok(exec.process.exited())
    }

    /// Freezes or thaws every process of the container.
    pub async fn freeze(&self, frozen: bool) -> Result<()> {
        let _life = self.life.lock().await;
        let name = self.name_of("");
        if self.init.status() != Status::Running {
            return Err(AgentError::FailedPrecondition(format!("{name}: is not running")));
        }
        let cgroup = self.cgroup.clone();
        blocking(move || {
            let what = if frozen { "freeze" } else { "thaw" };
            cgroup.freeze(frozen).map_err(|error| AgentError::internal(format!("{name}: {what}"), error))
        })
        .await?;
        self.paused.store(frozen, Ordering::Relaxed);
        Ok(())
    }

    /// Its processes, with the execs' named.
    pub fn pids(&self) -> Result<Vec<ProcessInfo>> {
        let failed = |error| AgentError::internal(format!("{}: pids", self.name_of("")), error);
        let mut pids = self.cgroup.pids().map_err(failed)?;
        pids.truncate(MAX_PIDS);
        let execs: HashMap<u32, String> =
            self.execs().iter().map(|(id, exec)| (exec.process.pid(), id.clone())).collect();
        let told = pids.into_iter().map(|pid| ProcessInfo {
            pid,
            exec_id: execs.get(&pid).cloned().unwrap_or_default(),
            command: fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default().trim_end().into(),
        });
        Ok(told.collect())
    }

    /// The cgroup's counters by file name.
    pub fn stats(&self) -> HashMap<String, String> {
        let read = |name: &&str| {
            let mut text = fs::read_to_string(self.cgroup.path().join(name)).ok()?;
            text.truncate(text.floor_char_boundary(MAX_STAT));
            Some(((*name).to_owned(), text))
        };
        STATS.iter().filter_map(read).collect()
    }

    /// Does something with the container's changes while nothing of it runs; neither Resume nor
    /// Delete comes in between.
    pub async fn with_changes<T: Send + 'static>(
        &self,
        act: impl FnOnce(Changes) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let life = self.life.lock().await;
        let changes = self.standing(&life)?.changes();
        blocking(move || act(changes)).await
    }

    /// The same with its root, as its disks have it: what is mounted in the container is not there.
    pub async fn with_root<T: Send + 'static>(
        &self,
        act: impl FnOnce(&Path) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let life = self.life.lock().await;
        let root = self.standing(&life)?.root().to_owned();
        blocking(move || act(&root)).await
    }

    fn standing<'a>(&self, life: &'a Life) -> Result<&'a Rootfs> {
        let name = self.name_of("");
        if self.init.status() == Status::Running && !self.is_paused() {
            return Err(AgentError::FailedPrecondition(format!("{name}: runs; pause it first")));
        }
        let rootfs = life.rootfs.as_ref();
        rootfs.ok_or_else(|| AgentError::NotFound(format!("{name}: its disks are unmounted")))
    }

    /// Changes limits.
    pub async fn update(&self, resources: LinuxResources) -> Result<()> {
        let _life = self.life.lock().await;
        let name = self.name_of("");
        if self.init.status() == Status::Stopped {
            return Err(AgentError::FailedPrecondition(format!(
                "{name}: has ended; nothing is left to limit"
            )));
        }
        let cgroup = self.cgroup.clone();
        blocking(move || {
            update::apply(&cgroup, resources)
                .map_err(|error| AgentError::InvalidArgument(format!("{name}: update: {error}")))
        })
        .await
    }

    /// Ends what is left of the container and gives everything back. May be repeated after an
    /// error.
    pub async fn tear_down(&self, life: &mut Life, state: &Path, streams: &Streams) -> Result<Exit> {
        let id = &self.id;
        let cgroup = self.cgroup.clone();
        let removed =
            blocking(move || cgroup.remove().map_err(|error| AgentError::internal("remove cgroup", error)));
        removed.await.map_err(|error| AgentError::internal(self.name_of(""), error))?;
        let ended = tokio::time::timeout(KILL_DEADLINE, Arc::clone(&self.init).wait()).await;
        let Ok(Some(exit)) = ended else {
            return Err(AgentError::Internal(format!(
                "container \"{id}\": its init is still there {KILL_DEADLINE:?} after SIGKILL"
            )));
        };
        life.helper = None;
        streams.remove(id, "");
        for (exec_id, _) in self.execs().drain() {
            streams.remove(id, &exec_id);
        }
        if let Some(mut rootfs) = life.rootfs.take() {
            let (bundle, state) = (self.bundle.clone(), state.to_owned());
            blocking(move || {
                remove_dir(&state)?;
                // Never below a mount that is still there: the container's files are in it.
                rootfs.unmount()?;
                remove_dir(&bundle)
            })
            .await?;
        }
        Ok(exit)
    }

    /// Without a pid namespace of its own, a container's other processes outlive its init.
    pub async fn kill_rest(self: Arc<Self>) {
        Arc::clone(&self.init).wait().await;
        if let Err(error) = self.cgroup.kill() {
            say!("{}: kill what its init left behind: {error}", self.name_of(""));
        }
    }
}
