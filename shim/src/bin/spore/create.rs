//! A container of containerd's with its rootfs snapshot and its running task: made step by step, and taken back. The container
//! comes first: from then on its name is taken, and its rootfs snapshot is not garbage.

use std::time::{Duration, Instant};

use containerd_client::services::v1::snapshots::{
    PrepareSnapshotRequest, RemoveSnapshotRequest, ViewSnapshotRequest,
};
use containerd_client::services::v1::{
    Container, CreateContainerRequest, CreateTaskRequest, DeleteContainerRequest, DeleteTaskRequest,
    KillRequest, StartRequest, UpdateContainerRequest, WaitRequest,
};
use containerd_client::tonic::{Code, Response, Status};
use containerd_client::types::Mount;
use prost_types::FieldMask;

use crate::containerd::{Containerd, Namespace};
use crate::failure::{Failure, of_containerd};

/// How long a task may take to end by SIGKILL: the shim kills a machine that does not.
const KILLED: Duration = Duration::from_secs(60);

/// What rootfs snapshots stand on.
#[derive(Debug, Clone, Default)]
pub(crate) struct Root {
    pub(crate) parent: String,
    /// Nothing is written to them.
    pub(crate) view: bool,
}

/// What is to be made.
#[derive(Debug, Default)]
pub(crate) struct Recipe {
    /// Its rootfs snapshot has the container's name.
    pub(crate) record: Container,
    /// What takes the record's place once the task runs: for the container's next task.
    pub(crate) afterwards: Option<Container>,
    pub(crate) root: Root,
    pub(crate) terminal: bool,
    pub(crate) log_uri: String,
}

/// What there is of a container.
#[derive(Debug, Default)]
pub(crate) struct Made {
    pub(crate) name: String,
    pub(crate) pid: u32,
    /// By step.
    pub(crate) times: Vec<(&'static str, Duration)>,
    snapshotter: String,
    container: bool,
    rootfs: bool,
    task: bool,
}

pub(crate) struct Maker<'a> {
    pub(crate) containerd: &'a Containerd,
    pub(crate) namespace: &'a Namespace,
    /// What errors call the containers.
    pub(crate) kind: &'static str,
}

impl Maker<'_> {
    /// Also of a failure it says what there is to be taken back.
    pub(crate) async fn make(&self, recipe: Recipe) -> (Made, Result<(), Failure>) {
        let (name, snapshotter) = (recipe.record.id.clone(), recipe.record.snapshotter.clone());
        let mut made = Made { name, snapshotter, ..Made::default() };
        let outcome = self.steps(&mut made, recipe).await;
        (made, outcome)
    }

    async fn steps(&self, made: &mut Made, recipe: Recipe) -> Result<(), Failure> {
        let Self { containerd, namespace, .. } = self;
        let (client, name) = (&containerd.client, made.name.clone());
        let mut begun = Instant::now();
        let mut lap = |made: &mut Made, step| {
            made.times.push((step, begun.elapsed()));
            begun = Instant::now();
        };

        let request = CreateContainerRequest { container: Some(recipe.record) };
        self.told(&name, "create its container", client.containers().create(namespace.call(request)).await)?;
        made.container = true;
        lap(made, "container");

        let rootfs = self.rootfs(made, recipe.root).await?;
        made.rootfs = true;
        lap(made, "rootfs");

        let request = CreateTaskRequest {
            container_id: name.clone(),
            rootfs,
            stderr: if recipe.terminal { String::new() } else { recipe.log_uri.clone() },
            stdout: recipe.log_uri,
            terminal: recipe.terminal,
            ..Default::default()
        };
        made.task = true;
        let created = client.tasks().create(namespace.call(request)).await;
        made.pid = self.told(&name, "create its task", created)?.pid;
        lap(made, "create");

        let request = StartRequest { container_id: name.clone(), exec_id: String::new() };
        self.told(&name, "start its task", client.tasks().start(namespace.call(request)).await)?;
        lap(made, "start");

        let Some(afterwards) = recipe.afterwards else { return Ok(()) };
        let request = UpdateContainerRequest {
            container: Some(afterwards),
            update_mask: Some(FieldMask { paths: vec!["spec".into()] }),
        };
        self.told(&name, "update its container", client.containers().update(namespace.call(request)).await)?;
        lap(made, "update");
        Ok(())
    }

    async fn rootfs(&self, made: &Made, root: Root) -> Result<Vec<Mount>, Failure> {
        let Self { containerd, namespace, .. } = self;
        let (snapshotter, key, parent) = (made.snapshotter.clone(), made.name.clone(), root.parent);
        let what = "make its rootfs snapshot";
        let mut snapshots = containerd.client.snapshots();
        if root.view {
            let request = ViewSnapshotRequest { snapshotter, key, parent, ..Default::default() };
            return Ok(self.told(&made.name, what, snapshots.view(namespace.call(request)).await)?.mounts);
        }
        let request = PrepareSnapshotRequest { snapshotter, key, parent, ..Default::default() };
        Ok(self.told(&made.name, what, snapshots.prepare(namespace.call(request)).await)?.mounts)
    }

    /// What containerd says of a container, by its name.
    fn told<T>(
        &self,
        name: &str,
        operation: &str,
        answer: Result<Response<T>, Status>,
    ) -> Result<T, Failure> {
        let operation = format!("{} \"{name}\": {operation}", self.kind);
        Ok(answer.map_err(of_containerd(&self.containerd.address, &operation))?.into_inner())
    }

    /// Takes back what was made; goes on after an error, and tells them all.
    pub(crate) async fn undo(&self, made: &Made) -> Vec<Failure> {
        let mut failures = Vec::new();
        if made.task {
            failures.extend(self.end(&made.name).await.err());
        }
        let (namespace, client, name) = (self.namespace, &self.containerd.client, made.name.clone());
        if made.container {
            let request = DeleteContainerRequest { id: name.clone() };
            let deleted = client.containers().delete(namespace.call(request)).await;
            failures.extend(self.gone(&name, "delete its container", deleted).err());
        }
        if made.rootfs {
            let (snapshotter, key) = (made.snapshotter.clone(), name.clone());
            let request = RemoveSnapshotRequest { snapshotter, key };
            let removed = client.snapshots().remove(namespace.call(request)).await;
            failures.extend(self.gone(&name, "remove its rootfs snapshot", removed).err());
        }
        failures
    }

    async fn end(&self, name: &str) -> Result<(), Failure> {
        let namespace = self.namespace;
        let mut tasks = self.containerd.client.tasks();
        let kill = KillRequest {
            container_id: name.into(),
            signal: libc::SIGKILL.unsigned_abs(),
            all: true,
            ..Default::default()
        };
        self.gone(name, "kill its task", tasks.kill(namespace.call(kill)).await)?;
        let wait = WaitRequest { container_id: name.into(), exec_id: String::new() };
        match tokio::time::timeout(KILLED, tasks.wait(namespace.call(wait))).await {
            Ok(ended) => self.gone(name, "wait for the end of its task", ended)?,
            Err(_) => {
                let detail = format!("its task has not ended {} s after SIGKILL", KILLED.as_secs());
                return Err(Failure::Container { id: name.into(), detail });
            }
        }
        let delete = DeleteTaskRequest { container_id: name.into() };
        self.gone(name, "delete its task", tasks.delete(namespace.call(delete)).await)
    }

    /// What is not there any more need not be taken back.
    fn gone<T>(
        &self,
        name: &str,
        operation: &str,
        answer: Result<Response<T>, Status>,
    ) -> Result<(), Failure> {
        match answer {
            Err(status) if status.code() == Code::NotFound => Ok(()),
            other => self.told(name, operation, other).map(drop),
        }
    }
}
