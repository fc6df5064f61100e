//! The Snapshots service of the shim: when it answers, what is in the store then, and that nothing half-made stays. With
//! the fake VMM and agent of `support`.

#![allow(clippy::unwrap_used)]

mod support;

use std::fs::{File, OpenOptions};
use std::time::Instant;

use containerd_shim_protos::api::{CheckpointTaskRequest, ShutdownRequest};
use containerd_shim_protos::shim::oci::CheckpointOptions;
use containerd_shim_protos::shim_async::TaskClient;
use containerd_shim_spore::api::v1::snapshots::create_request::Wait;
use containerd_shim_spore::api::v1::snapshots::{CreateRequest, CreateResponse};
use containerd_shim_spore::api::v1::snapshots_ttrpc::SnapshotsClient;
use containerd_shim_spore::snapshot::manifest::Purpose;
use containerd_shim_spore::snapshot::{SnapshotId, Store};
use protobuf::Message;
use protobuf::well_known_types::any::Any;
use ttrpc::Code;
use ttrpc::r#async::Client;

use support::host::{DEADLINE, Host, code, ctx, delete_request, kill_request, start_request, wait_request};

/// Not a test: the process that the shim starts as its VMM.
#[test]
#[ignore = "the fake VMM, started by the shim under test"]
fn fake_vmm() {
    support::fake_vmm();
}

/// A shim with a container that runs.
struct Scene {
    host: Host,
    task: TaskClient,
    snapshots: SnapshotsClient,
    store: Store,
}

impl Scene {
    async fn new(id: &str, config: &str) -> Self {
        let host = Host::with_config(id, config).await;
        host.write_spec(&["/bin/sleep", "1000"]);
        let task = host.start().await;
        let snapshots = SnapshotsClient::new(Client::connect(&host.address()).await.unwrap());
        let store = Store::new(&host.path("state"));
        Self { host, task, snapshots, store }
    }

    async fn run(&self) {
        self.task.create(ctx(), &self.host.request()).await.unwrap();
        self.task.start(ctx(), &start_request(&self.host)).await.unwrap();
    }

    async fn create(&self, wait: Wait) -> ttrpc::Result<CreateResponse> {
        let request = CreateRequest { id: self.host.id.clone(), wait: wait.into(), ..Default::default() };
        self.snapshots.create(ctx(), &request).await
    }

    fn listed(&self) -> Vec<SnapshotId> {
        let listing = self.store.list().unwrap();
        assert!(listing.broken.is_empty(), "{listing:?}");
        listing.entries.iter().map(|entry| entry.manifest.id).collect()
    }

    /// What the store has, half-made things too; nothing before it is made.
    fn names(&self) -> usize {
        std::fs::read_dir(self.store.root()).map_or(0, Iterator::count)
    }

    /// Lets what waits at the gate go on, and opens it for good.
    async fn open_gate(&self) {
        let gate = self.host.path(support::GATE_FIFO);
        let opened = tokio::task::spawn_blocking({
            let gate = gate.clone();
            move || OpenOptions::new().write(true).open(gate)
        });
        let opened: File = tokio::time::timeout(DEADLINE, opened).await.unwrap().unwrap().unwrap();
        std::fs::remove_file(gate).unwrap();
        drop(opened);
    }

    async fn end(self) {
        self.task.kill(ctx(), &kill_request(&self.host, 9)).await.unwrap();
        self.task.wait(ctx(), &wait_request(&self.host)).await.unwrap();
        self.delete().await;
    }

    async fn delete(self) {
        self.task.delete(ctx(), &delete_request(&self.host)).await.unwrap();
        let address = self.host.address();
        self.task.shutdown(ctx(), &ShutdownRequest::new()).await.unwrap();
        self.host.delete();
        self.host.assert_clean(&address);
        assert_eq!(self.names(), self.listed().len(), "half-made snapshots");
    }
}

async fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !holds() {
        assert!(begun.elapsed() < DEADLINE, "not in time: {what}");
        tokio::task::yield_now().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_snapshot_is_answered_when_the_container_goes_on_or_when_it_is_durable() {
    let scene = Scene::new("snapshots", "").await;
    let missing = (Code::NOT_FOUND, "container not created: not found".to_string());
    assert_eq!(code(scene.create(Wait::DURABLE).await), missing);
    scene.task.create(ctx(), &scene.host.request()).await.unwrap();
    assert_eq!(code(scene.create(Wait::DURABLE).await).0, Code::FAILED_PRECONDITION);
    scene.task.start(ctx(), &start_request(&scene.host)).await.unwrap();

    let gate = scene.host.path(support::GATE_FIFO);
    nix::unistd::mkfifo(&gate, nix::sys::stat::Mode::S_IRWXU).unwrap();
    let resumed = scene.create(Wait::RESUMED).await.unwrap();
    assert!(resumed.stood_ns > 0 && resumed.pause_ns == support::PAUSE_NS, "{resumed:?}");
    assert_eq!((scene.listed(), scene.names()), (vec![], 1), "it is being written");
    scene.open_gate().await;
    let first: SnapshotId = resumed.snapshot.parse().unwrap();
    until("the snapshot is in the store", || scene.listed() == [first]).await;

    let second: SnapshotId = scene.create(Wait::DURABLE).await.unwrap().snapshot.parse().unwrap();
    assert!(scene.listed().contains(&second) && scene.listed().len() == 2);
    let opened = scene.store.open(second).unwrap();
    opened.verify().unwrap();
    let manifest = &opened.manifest;
    assert_eq!(
        (manifest.purpose, manifest.namespace.as_str(), manifest.container.as_str()),
        (Purpose::Snapshot, "test", "snapshots")
    );
    let writable = manifest.disks.iter().find(|disk| disk.serial == "rw0").unwrap();
    assert_eq!(writable.layers.len(), 2, "what was there, and what was written since the first");

    let bad = CreateRequest {
        id: scene.host.id.clone(),
        wait: protobuf::EnumOrUnknown::from_i32(7),
        ..Default::default()
    };
    assert_eq!(code(scene.snapshots.create(ctx(), &bad).await).0, Code::INVALID_ARGUMENT);
    scene.task.kill(ctx(), &kill_request(&scene.host, 9)).await.unwrap();
    scene.task.wait(ctx(), &wait_request(&scene.host)).await.unwrap();
    let (status, message) = code(scene.create(Wait::RESUMED).await);
    assert_eq!(status, Code::FAILED_PRECONDITION);
    assert!(message.contains("cannot take a snapshot of a stopped container"), "{message}");
    scene.delete().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_snapshot_that_is_asked_for_while_a_checkpoint_ends_the_container_is_refused_then() {
    let scene = Scene::new("ending", "").await;
    scene.run().await;
    let gate = scene.host.path(support::GATE_FIFO);
    nix::unistd::mkfifo(&gate, nix::sys::stat::Mode::S_IRWXU).unwrap();
    let exit = CheckpointOptions { exit: true, ..Default::default() };
    let options = Any {
        type_url: "containerd.runc.v1.CheckpointOptions".into(),
        value: exit.write_to_bytes().unwrap(),
        ..Default::default()
    };
    let request = CheckpointTaskRequest {
        id: scene.host.id.clone(),
        path: scene.host.path("checkpoint").display().to_string(),
        options: Some(options).into(),
        ..Default::default()
    };
    let second = async {
        until("the checkpoint is being written", || scene.names() == 1).await;
        scene.create(Wait::DURABLE).await
    };
    let go = async {
        // The second one is as far as it can come.
        until("both have begun", || scene.names() == 2).await;
        scene.open_gate().await;
    };
    let all = async { tokio::join!(scene.task.checkpoint(ctx(), &request), second, go) };
    let (checkpoint, second, ()) =
        tokio::time::timeout(DEADLINE, all).await.expect("they wait for each other");
    checkpoint.unwrap();
    assert_eq!(code(second).0, Code::FAILED_PRECONDITION);
    scene.task.wait(ctx(), &wait_request(&scene.host)).await.unwrap();
    scene.delete().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_cannot_be_written_leaves_nothing_and_the_container_goes_on() {
    let config = format!("kernel_args = {:?}", support::UNWRITTEN);
    let scene = Scene::new("unwritten", &config).await;
    scene.run().await;
    let (_, message) = code(scene.create(Wait::DURABLE).await);
    assert!(message.contains("No space left"), "{message}");
    assert_eq!(scene.names(), 0);
    scene.create(Wait::RESUMED).await.unwrap();
    until("the half-made snapshot is gone", || scene.names() == 0).await;
    scene.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_container_that_is_deleted_takes_a_half_made_snapshot_along() {
    let scene = Scene::new("cut", "").await;
    scene.run().await;
    let gate = scene.host.path(support::GATE_FIFO);
    nix::unistd::mkfifo(&gate, nix::sys::stat::Mode::S_IRWXU).unwrap();
    scene.create(Wait::RESUMED).await.unwrap();
    assert_eq!((scene.listed(), scene.names()), (vec![], 1));
    scene.end().await;
}
