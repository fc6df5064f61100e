//! The guest's containers and what can be asked of them. One method per request of the agent
//! API's Container service.
//!
//! Lives on the server's thread. The registry's mutex guards the map alone and is never held
//! across an await; each container's `life` is an async mutex. Lock order: life, then map.
//!
//! The requests that change something must not be dropped half-way (a ttrpc handler is,
//! when its client goes away): [`crate::service`] runs them in tasks of their own.

use std::collections::{HashMap, VecDeque};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::cgroup::Cgroup;
use super::devices;
use super::disks::Disks;
use super::exec::Exec;
use super::life::Container;
use super::process::{Process, Snapshot, Status};
use super::rootfs::Rootfs;
use super::volumes::Volumes;
use super::{blocking, remove_dir, spec};
use crate::error::{AgentError, Result};
use crate::reaper::{Exit, Reaper};
use crate::runtime::{client, protocol};
use crate::say;
use crate::stdio::make::{self, Wanted};
use crate::stdio::streams::Streams;

const BUNDLES: &str = "/run/spore/bundles";
const STATE: &str = "/run/spore/state";
const MAX_ID: usize = spore_agent_api::stream::MAX_ID;
/// Deleted ids whose exit is remembered, so that Delete can be repeated.
const MAX_DELETED: usize = 1024;

/// What Create is given.
#[derive(Debug, Clone)]
pub struct CreateContainer {
    pub id: String,
    pub spec: Vec<u8>,
    pub lower: Vec<String>,
    pub writable: String,
    pub streams: Wanted,
    pub terminal: bool,
}

/// What Exec is given.
#[derive(Debug, Clone)]
pub struct ExecProcess {
    /// OCI process object.
    pub process: Vec<u8>,
    pub streams: Wanted,
    pub terminal: bool,
}

#[derive(Debug)]
enum Entry {
    /// Create is at work.
    Creating,
    Present(Arc<Container>),
}

#[derive(Debug, Default)]
struct Map {
    entries: HashMap<String, Entry>,
    deleted: HashMap<String, Exit>,
    deleted_order: VecDeque<String>,
    /// No more containers: the guest shuts down.
    closed: bool,
}

/// See the module.
#[derive(Debug)]
pub struct Registry {
    reaper: Arc<Reaper>,
    disks: Arc<Disks>,
    volumes: Arc<Volumes>,
    pub streams: Arc<Streams>,
    map: Mutex<Map>,
}

fn check_id(id: &str) -> Result<()> {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
    if id.is_empty() || id.len() > MAX_ID || id == "." || id == ".." || !id.bytes().all(allowed) {
        return Err(AgentError::InvalidArgument(format!(
            "container id \"{}\": 1 to {MAX_ID} characters of A-Z a-z 0-9 . _ - are allowed",
            id.escape_default()
        )));
    }
    Ok(())
}

impl Registry {
    pub fn new(reaper: Arc<Reaper>) -> Arc<Self> {
        Arc::new(Self {
            reaper,
            disks: Arc::default(),
            volumes: Arc::default(),
            streams: Arc::default(),
            map: Mutex::default(),
        })
    }

    fn map(&self) -> MutexGuard<'_, Map> {
        self.map.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn find(&self, id: &str) -> Result<Arc<Container>> {
        match self.map().entries.get(id) {
            Some(Entry::Present(container)) => Ok(Arc::clone(container)),
            Some(Entry::Creating) => {
                Err(AgentError::FailedPrecondition(format!("container \"{id}\": is still being created")))
            }
            None => {
                Err(AgentError::NotFound(format!("container \"{}\": does not exist", id.escape_default())))
            }
        }
    }

    /// Creates a container and returns its init's pid.
    pub async fn create(&self, request: CreateContainer) -> Result<u32> {
        check_id(&request.id)?;
        let id = request.id.clone();
        {
            let mut map = self.map();
            if map.closed {
                return Err(AgentError::FailedPrecondition("the guest is shutting down".into()));
            }
            if map.entries.contains_key(&id) {
                return Err(AgentError::AlreadyExists(format!("container \"{id}\": already exists")));
            }
            map.entries.insert(id.clone(), Entry::Creating);
        }
        let result = self.create_reserved(request).await;
        let mut map = self.map();
        match result {
            Ok(container) => {
                let pid = container.init.pid();
                map.entries.insert(id, Entry::Present(container));
                Ok(pid)
            }
            Err(error) => {
                map.entries.remove(&id);
                Err(error)
            }
        }
    }

    async fn create_reserved(&self, request: CreateContainer) -> Result<Arc<Container>> {
        let CreateContainer { id, spec, lower, writable, streams, terminal } = request;
        let bundle = Path::new(BUNDLES).join(&id);
        let root = bundle.join("rootfs");
        let mut prepared = spec::prepare(&id, &spec, &root)?;
        if prepared.terminal != terminal {
            return Err(AgentError::InvalidArgument(format!(
                "config.json: process.terminal is {}, but the request says {terminal}",
                prepared.terminal
            )));
        }
        let cgroup = Cgroup::new(&prepared.cgroup);
        if cgroup.exists() && cgroup.pids().is_ok_and(|pids| !pids.is_empty()) {
            return Err(AgentError::FailedPrecondition(format!(
                "config.json: linux.cgroupsPath \"{}\" is another container's",
                prepared.cgroup.display()
            )));
        }

        let (disks, volumes) = (Arc::clone(&self.disks), Arc::clone(&self.volumes));
        let has_volumes = prepared.has_volumes;
        let bundle_dir = bundle.clone();
        let cleanup = RemoveDir(bundle.clone());
        let (mut spec, cwd) = (prepared.spec, prepared.cwd.clone());
        prepared.spec = Default::default();
        let mut rootfs = blocking(move || {
            let rootfs = Rootfs::mount(&disks, &lower, &writable, &root)?;
            rootfs.create_cwd(&cwd)?;
            if has_volumes {
                volumes.mount()?;
            }
            if let Some(process) = spec.process_mut() {
                spec::add_home(process, || rootfs.passwd());
            }
            let config = bundle_dir.join("config.json");
            let json =
                serde_json::to_vec(&spec).map_err(|error| AgentError::internal("config.json", error))?;
            fs::write(&config, json).map_err(|error| AgentError::internal(config.display(), error))?;
            Ok(rootfs)
        })
        .await?;

        let created = self.create_process(&id, &bundle, &prepared, streams, terminal).await;
        let (created, streams) = match created {
            Ok(created) => created,
            Err(error) => {
                let leftover = cgroup.clone();
                let state = Path::new(STATE).join(&id);
                let undone = blocking(move || {
                    leftover.remove().map_err(|error| AgentError::internal("remove cgroup", error))?;
                    remove_dir(&state)?;
                    rootfs.unmount()
                });
                if let Err(undo) = undone.await {
                    say!("container \"{id}\": clean up after a failed create: {undo}");
                }
                return Err(error);
            }
        };
        cleanup.keep();
        rootfs.note_prepared();
        // Before the process runs. A kernel without cgroup BPF leaves the guest itself as the
        // boundary, which is said once per container.
        if let Err(error) = devices::apply(cgroup.path(), &prepared.devices) {
            say!("container \"{id}\": device rules are not enforced: {error}");
        }
        self.streams.insert(&id, "", streams);
        let init = Process::created(created.init, created.terminal);
        let container = Arc::new(Container::new(id, init, cgroup, bundle, created.helper, rootfs));
        if !prepared.own_pid_namespace {
            tokio::spawn(Arc::clone(&container).kill_rest());
        }
        Ok(container)
    }

    async fn create_process(
        &self,
        id: &str,
        bundle: &Path,
        prepared: &spec::Prepared,
        wanted: Wanted,
        terminal: bool,
    ) -> Result<(client::Created, crate::stdio::streams::ProcessStreams)> {
        let request = protocol::Create {
            id: id.into(),
            bundle: bundle.into(),
            state: STATE.into(),
            terminal,
            loopback: prepared.own_network_namespace,
        };
        let failed = |error| AgentError::internal(format!("container \"{id}\": standard streams"), error);
        if terminal {
            let created = client::create(&self.reaper, request, Vec::new()).await?;
            let master = created.terminal.as_ref();
            let master = master.ok_or_else(|| failed(std::io::Error::other("no terminal came back")))?;
            let master = master.try_clone().map_err(failed)?;
            let streams = make::terminal(master, prepared.uid, prepared.console_size).map_err(failed)?;
            return Ok((created, streams));
        }
        let (streams, theirs) = make::pipes(wanted, prepared.uid).map_err(failed)?;
        let created = client::create(&self.reaper, request, theirs).await?;
        Ok((created, streams))
    }

    /// Lets a created container, or a prepared exec in one, run.
    pub async fn start(&self, id: &str, exec_id: &str) -> Result<u32> {
        let container = self.find(id)?;
        if exec_id.is_empty() {
            container.start(&self.reaper).await?;
            return Ok(container.init.pid());
        }
        container.start_exec(exec_id, &self.reaper, &self.streams).await
    }

    /// Prepares a further process in a container.
    pub async fn exec(&self, id: &str, exec_id: &str, request: ExecProcess) -> Result<()> {
        let container = self.find(id)?;
        check_id(exec_id)?;
        if container.init.status() == Status::Stopped {
            let name = container.name_of(exec_id);
            return Err(AgentError::FailedPrecondition(format!(
                "{name}: cannot exec in a stopped container"
            )));
        }
        let (exec, streams) = Exec::prepare(&request.process, request.streams, request.terminal)?;
        container.add_exec(exec_id, exec)?;
        self.streams.insert(id, exec_id, streams);
        Ok(())
    }

    /// What State answers, and whether the container is paused.
    pub fn state(&self, id: &str, exec_id: &str) -> Result<(Snapshot, bool)> {
        let container = self.find(id)?;
        let snapshot = container.process(exec_id)?.snapshot();
        Ok((snapshot, snapshot.status == Status::Running && container.is_paused()))
    }

    /// Answers when the process has ended.
    pub async fn wait(&self, id: &str, exec_id: &str) -> Result<Exit> {
        let container = self.find(id)?;
        let process = container.process(exec_id)?;
        let name = container.name_of(exec_id);
        drop(container);
        process
            .wait()
            .await
            .ok_or_else(|| AgentError::NotFound(format!("{name}: was removed, never started")))
    }

    pub fn signal(&self, id: &str, exec_id: &str, signal: u32, all: bool) -> Result<()> {
        let signal = i32::try_from(signal).ok().filter(|signal| (1..=libc::SIGRTMAX()).contains(signal));
        let signal = signal.ok_or_else(|| {
            AgentError::InvalidArgument(format!("signal: 1 to {} are allowed", libc::SIGRTMAX()))
        })?;
        let container = self.find(id)?;
        if all && exec_id.is_empty() {
            let sent = container.cgroup.signal(signal);
            return sent
                .map_err(|error| AgentError::internal(format!("container \"{id}\": signal all"), error));
        }
        container.process(exec_id)?.signal(&self.reaper, signal, &container.name_of(exec_id))
    }

    pub fn resize(&self, id: &str, exec_id: &str, width: u32, height: u32) -> Result<()> {
        let container = self.find(id)?;
        let (Ok(columns), Ok(rows)) = (u16::try_from(width), u16::try_from(height)) else {
            return Err(AgentError::InvalidArgument(format!(
                "terminal size {width} x {height}: at most {0} x {0} are allowed",
                u16::MAX
            )));
        };
        let resized = container.process(exec_id)?.resize(rows, columns);
        resized
            .map_err(|error| AgentError::internal(format!("{}: resize", container.name_of(exec_id)), error))
    }

    /// Removes a container, or an exec, that does not run. A container again: answers as the
    /// first time.
    pub async fn delete(&self, id: &str, exec_id: &str) -> Result<Option<Exit>> {
        let container = match self.find(id) {
            Ok(container) => container,
            Err(error @ AgentError::NotFound(_)) if exec_id.is_empty() => {
                return self.map().deleted.get(id).copied().ok_or(error).map(Some);
            }
            Err(error) => return Err(error),
        };
        if !exec_id.is_empty() {
            // A Start under way comes first.
            let _life = container.life.lock().await;
            let exit = container.remove_exec(exec_id)?;
            self.streams.remove(id, exec_id);
            return Ok(exit);
        }
        let mut life = container.life.lock().await;
        if container.init.status() == Status::Running {
            return Err(AgentError::FailedPrecondition(format!(
                "container \"{id}\": cannot be deleted while it runs; kill it first"
            )));
        }
        let exit = container.tear_down(&mut life, &Path::new(STATE).join(id), &self.streams).await?;
        let mut map = self.map();
        map.entries.remove(id);
        if map.deleted.insert(id.into(), exit).is_none() {
            map.deleted_order.push_back(id.into());
        }
        if map.deleted_order.len() > MAX_DELETED
            && let Some(oldest) = map.deleted_order.pop_front()
        {
            map.deleted.remove(&oldest);
        }
        Ok(Some(exit))
    }

    /// Ends every container, within `grace` gently, and unmounts all disks. For shutdown: goes
    /// on after errors, which it reports on the console.
    pub async fn shut_down(&self, grace: Duration) {
        let containers: Vec<_> = {
            let mut map = self.map();
            map.closed = true;
            let present = map.entries.drain().filter_map(|(_, entry)| match entry {
                Entry::Present(container) => Some(container),
                Entry::Creating => None,
            });
            present.collect()
        };
        if !grace.is_zero() {
            for container in &containers {
                if container.init.status() == Status::Running {
                    let _ = container.cgroup.signal(libc::SIGTERM);
                }
            }
            let running = containers.iter().filter(|container| container.init.status() == Status::Running);
            let ended = async {
                for container in running {
                    Arc::clone(&container.init).wait().await;
                }
            };
            let _ = tokio::time::timeout(grace, ended).await;
        }
        for container in &containers {
            let mut life = container.life.lock().await;
            let state = Path::new(STATE).join(&container.id);
            if let Err(error) = container.tear_down(&mut life, &state, &self.streams).await {
                say!("shutdown: {error}");
            }
        }
        let (disks, volumes) = (Arc::clone(&self.disks), Arc::clone(&self.volumes));
        let unmounted = blocking(move || {
            volumes.unmount();
            disks.release_all();
            nix::unistd::sync();
            Ok(())
        });
        if let Err(error) = unmounted.await {
            say!("shutdown: {error}");
        }
    }
}

/// Removes the bundle of a create that failed.
struct RemoveDir(PathBuf);

impl RemoveDir {
    fn keep(mut self) {
        self.0 = PathBuf::new();
    }
}

impl Drop for RemoveDir {
    fn drop(&mut self) {
        if !self.0.as_os_str().is_empty() {
            // The root file system is unmounted by now, or this fails on a busy directory.
            let _ = fs::remove_dir(self.0.join("rootfs"));
            let _ = fs::remove_file(self.0.join("config.json"));
            let _ = fs::remove_file(self.0.join("console.sock"));
            let _ = fs::remove_dir(&self.0);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_file_names_and_nothing_else() {
        for good in ["a", "web-1.2_x", &"x".repeat(128)] {
            check_id(good).unwrap();
        }
        for bad in ["", ".", "..", "a/b", "a b", "ä", &"x".repeat(129)] {
            assert!(matches!(check_id(bad), Err(AgentError::InvalidArgument(_))), "{bad}");
        }
    }

    #[tokio::test]
    async fn an_unknown_container_is_not_found_by_every_request() {
        let registry = Registry::new(Reaper::new());
        assert!(matches!(registry.start("x", "").await, Err(AgentError::NotFound(_))));
        assert!(matches!(registry.state("x", ""), Err(AgentError::NotFound(_))));
        assert!(matches!(registry.wait("x", "").await, Err(AgentError::NotFound(_))));
        assert!(matches!(registry.signal("x", "", 9, false), Err(AgentError::NotFound(_))));
        assert!(matches!(registry.delete("x", "").await, Err(AgentError::NotFound(_))));
        assert!(matches!(registry.signal("x", "", 65, false), Err(AgentError::InvalidArgument(_))));
        assert!(matches!(registry.wait("x", "e1").await, Err(AgentError::NotFound(_))));
        assert!(matches!(registry.delete("x", "e1").await, Err(AgentError::NotFound(_))));
    }

    #[tokio::test]
    async fn a_failed_create_leaves_the_id_free() {
        let registry = Registry::new(Reaper::new());
        let request = CreateContainer {
            id: "x".into(),
            spec: b"{}".to_vec(),
            lower: vec![],
            writable: String::new(),
            streams: Wanted { stdin: false, stdout: false, stderr: false },
            terminal: false,
        };
        for _ in 0..2 {
            assert!(matches!(registry.create(request.clone()).await, Err(AgentError::InvalidArgument(_))));
        }
    }
}
