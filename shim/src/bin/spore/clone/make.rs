//! One clone, step by step, and back. Its container comes first: from then on its name is taken, and its rootfs snapshot is not
//! garbage.

use std::time::{Duration, Instant};

use containerd_client::services::v1::snapshots::{
    PrepareSnapshotRequest, RemoveSnapshotRequest, ViewSnapshotRequest,
};
use containerd_client::services::v1::{
    CreateContainerRequest, CreateTaskRequest, DeleteContainerRequest, DeleteTaskRequest, KillRequest,
    StartRequest, UpdateContainerRequest, WaitRequest,
};
use containerd_client::tonic::{Code, Response, Status};
use containerd_client::types::Mount;
use containerd_shim_spore::snapshot::SnapshotId;
use prost_types::FieldMask;

use super::plan::Plan;
use crate::containerd::{Containerd, Namespace};
use crate::failure::{Failure, of_containerd};

/// How long a task may take to end by SIGKILL: the shim kills a machine that does not.
const KILLED: Duration = Duration::from_secs(60);

/// What there is of a clone.
#[derive(Debug, Default)]
pub(super) struct Made {
    pub(super) name: String,
    pub(super) pid: u32,
    /// By step.
    pub(super) times: Vec<(&'static str, Duration)>,
    container: bool,
    rootfs: bool,
    task: bool,
}

pub(super) struct Maker<'a> {
    pub(super) containerd: &'a Containerd,
    pub(super) namespace: &'a Namespace,
    pub(super) plan: &'a Plan,
    pub(super) snapshot: SnapshotId,
}

impl Maker<'_> {
    /// Also of a failure it says what there is to be taken back.
    pub(super) async fn make(&self, name: &str) -> (Made, Result<(), Failure>) {
        let mut made = Made { name: name.into(), ..Made::default() };
        let outcome = self.steps(&mut made).await;
        (made, outcome)
    }

    async fn steps(&self, made: &mut Made) -> Result<(), Failure> {
        let Self { containerd, namespace, plan, .. } = self;
        let (client, name) = (&containerd.client, made.name.clone());
        let mut begun = Instant::now();
        let mut lap = |made: &mut Made, step| {
            made.times.push((step, begun.elapsed()));
            begun = Instant::now();
        };

        let snapshot = self.snapshot.to_string();
        let request = CreateContainerRequest { container: Some(plan.record(&name, Some(&snapshot))) };
        self.told(&name, "create its container", client.containers().create(namespace.call(request)).await)?;
        made.container = true;
        lap(made, "container");

        let rootfs = self.rootfs(&name).await?;
        made.rootfs = true;
        lap(made, "rootfs");

        let request = CreateTaskRequest {
            container_id: name.clone(),
            rootfs,
            stdout: plan.log_uri.clone(),
            stderr: if plan.terminal { String::new() } else { plan.log_uri.clone() },
            terminal: plan.terminal,
            ..Default::default()
        };
        made.task = true;
        let created = client.tasks().create(namespace.call(request)).await;
        made.pid = self.told(&name, "create its task", created)?.pid;
        lap(made, "create");

        let request = StartRequest { container_id: name.clone(), exec_id: String::new() };
        self.told(&name, "start its task", client.tasks().start(namespace.call(request)).await)?;
        lap(made, "start");

        // The next task of this container is not a clone but begins with what this one leaves on its disk.
        let request = UpdateContainerRequest {
            container: Some(plan.record(&name, None)),
            update_mask: Some(FieldMask { paths: vec!["spec".into()] }),
        };
        self.told(&name, "update its container", client.containers().update(namespace.call(request)).await)?;
        lap(made, "update");
        Ok(())
    }

    async fn rootfs(&self, name: &str) -> Result<Vec<Mount>, Failure> {
        let Self { containerd, namespace, plan, .. } = self;
        let (snapshotter, key, parent) =
            (plan.source.snapshotter.clone(), name.to_owned(), plan.root.parent.clone());
        let what = "make its rootfs snapshot";
        let mut snapshots = containerd.client.snapshots();
        if plan.root.view {
            let request = ViewSnapshotRequest { snapshotter, key, parent, ..Default::default() };
            return Ok(self.told(name, what, snapshots.view(namespace.call(request)).await)?.mounts);
        }
        let request = PrepareSnapshotRequest { snapshotter, key, parent, ..Default::default() };
        Ok(self.told(name, what, snapshots.prepare(namespace.call(request)).await)?.mounts)
    }

    /// What containerd says of a clone, by the clone's name.
    fn told<T>(
        &self,
        name: &str,
        operation: &str,
        answer: Result<Response<T>, Status>,
    ) -> Result<T, Failure> {
        let operation = format!("clone \"{name}\": {operation}");
        Ok(answer.map_err(of_containerd(&self.containerd.address, &operation))?.into_inner())
    }

    /// Takes back what was made; goes on after an error, and tells them all.
    pub(super) async fn undo(&self, made: &Made) -> Vec<Failure> {
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
            let (snapshotter, key) = (self.plan.source.snapshotter.clone(), name.clone());
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
