//! A shim with a container that runs, of which another machine takes the place.

use std::fs::OpenOptions;
use std::time::Instant;

use containerd_shim_protos::api::{CreateTaskRequest, ShutdownRequest, Status};
use containerd_shim_protos::shim_async::TaskClient;
use containerd_shim_spore::api::v1::snapshots::{CreateRequest, RollbackRequest, RollbackResponse};
use containerd_shim_spore::api::v1::snapshots_ttrpc::SnapshotsClient;
use serde_json::Value;
use ttrpc::r#async::Client;

use super::host::{
    DEADLINE, Host, ctx, delete_request, is_zombie, kill_request, start_request, state_request, wait_request,
};

const SCRIPT: [&str; 3] = ["/bin/sh", "-c", "echo begun; exec sleep 1000"];

pub(crate) struct Scene {
    pub(crate) host: Host,
    pub(crate) task: TaskClient,
    pub(crate) snapshots: SnapshotsClient,
    pub(crate) pid: u32,
}

impl Scene {
    pub(crate) async fn new(id: &str) -> Self {
        Self::with(Host::new(id).await, "").await
    }

    pub(crate) async fn with_stdout(id: &str, stdout: &str) -> Self {
        Self::with(Host::new(id).await, stdout).await
    }

    pub(crate) async fn with(host: Host, stdout: &str) -> Self {
        host.write_spec(&SCRIPT);
        let stdout = if stdout.is_empty() { String::new() } else { host.fifo(stdout) };
        let task = host.start().await;
        let snapshots = SnapshotsClient::new(Client::connect(&host.address()).await.unwrap());
        let request = CreateTaskRequest { stdout, ..host.request() };
        let pid = task.create(ctx(), &request).await.unwrap().pid;
        task.start(ctx(), &start_request(&host)).await.unwrap();
        Self { host, task, snapshots, pid }
    }

    pub(crate) async fn snapshot(&self) -> String {
        let request = CreateRequest { id: self.host.id.clone(), ..Default::default() };
        self.snapshots.create(ctx(), &request).await.unwrap().snapshot
    }

    pub(crate) async fn back_to(&self, snapshot: &str) -> ttrpc::Result<RollbackResponse> {
        rollback(self.snapshots.clone(), self.host.id.clone(), snapshot.into()).await
    }

    /// One that waits for the restored agent's Setup, with the two machines' VMMs: the task's and the other.
    pub(crate) async fn back_until_setup(
        &self,
        snapshot: &str,
    ) -> (tokio::task::JoinHandle<ttrpc::Result<RollbackResponse>>, [u32; 2]) {
        let gate = self.host.path(super::SETUP_FIFO);
        nix::unistd::mkfifo(&gate, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let call = rollback(self.snapshots.clone(), self.host.id.clone(), snapshot.into());
        let call = tokio::spawn(call);
        until("the restored agent is asked", || blocked_in_open(self.other())).await;
        (call, [self.vmm(), self.other()])
    }

    pub(crate) fn record(&self) -> Value {
        let path = self.host.path("run/test").join(&self.host.id).join("processes.json");
        serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
    }

    pub(crate) fn vmm(&self) -> u32 {
        self.host.recorded_pid("vmm")
    }

    pub(crate) fn other(&self) -> u32 {
        self.record()["others"][0]["pid"].as_u64().map_or(0, |pid| u32::try_from(pid).unwrap())
    }

    /// Lets the agent answer, now and for good.
    pub(crate) async fn open_setup(&self) {
        let gate = self.host.path(super::SETUP_FIFO);
        let path = gate.clone();
        let opened = tokio::task::spawn_blocking(move || OpenOptions::new().write(true).open(path).unwrap());
        let opened = tokio::time::timeout(DEADLINE, opened).await.unwrap().unwrap();
        std::fs::remove_file(gate).unwrap();
        drop(opened);
    }

    pub(crate) async fn status(&self) -> Status {
        let state = self.task.state(ctx(), &state_request(&self.host)).await.unwrap();
        assert_eq!(state.pid, self.pid);
        state.status.unwrap()
    }

    /// The names of the writable disk's layers, and of the files that there are.
    pub(crate) fn disk(&self) -> (Vec<String>, Vec<String>) {
        let place =
            std::fs::read_dir(self.host.path("state/writable")).unwrap().next().unwrap().unwrap().path();
        let list = std::fs::read(place.join("layers.json")).unwrap();
        let list: Value = serde_json::from_slice(&list).unwrap();
        let mut listed: Vec<String> = serde_json::from_value(list["layers"].clone()).unwrap();
        let names =
            std::fs::read_dir(place).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
        let mut there: Vec<_> =
            names.filter(|name| name.ends_with(".delta") || name.ends_with(".ext4")).collect();
        listed.sort();
        there.sort();
        (listed, there)
    }

    /// One machine, the same as before, and nothing of another.
    pub(crate) async fn goes_on(&self, vmm: u32, disk: &(Vec<String>, Vec<String>)) {
        assert_eq!((self.vmm(), self.record()["others"].clone()), (vmm, Value::Array(vec![])));
        assert!(!is_zombie(vmm));
        assert_eq!(&self.disk(), disk);
        assert_eq!(self.vmms().len(), 1, "{:?}", self.vmms());
    }

    pub(crate) fn vmms(&self) -> Vec<String> {
        let ours = self.host.dir.path().display().to_string();
        let mut all = super::host::processes_with(&ours);
        all.retain(|process| process.contains("fake_vmm"));
        all
    }

    pub(crate) async fn end(self) {
        self.task.kill(ctx(), &kill_request(&self.host, 9)).await.unwrap();
        assert_eq!(self.task.wait(ctx(), &wait_request(&self.host)).await.unwrap().exit_status, 137);
        self.delete().await;
    }

    pub(crate) async fn delete(self) {
        self.task.delete(ctx(), &delete_request(&self.host)).await.unwrap();
        let address = self.host.address();
        self.task.shutdown(ctx(), &ShutdownRequest::new()).await.unwrap();
        self.host.delete();
        self.host.assert_clean(&address);
    }
}

async fn rollback(client: SnapshotsClient, id: String, snapshot: String) -> ttrpc::Result<RollbackResponse> {
    client.rollback(ctx(), &RollbackRequest { id, snapshot, ..Default::default() }).await
}

/// Whether a thread of the process waits for the other end of a fifo.
pub(crate) fn blocked_in_open(pid: u32) -> bool {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    tasks.into_iter().any(|task| {
        std::fs::read_to_string(task.path().join("wchan")).unwrap_or_default().contains("wait_for_partner")
    })
}

pub(crate) async fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !holds() {
        assert!(begun.elapsed() < DEADLINE, "not in time: {what}");
        tokio::task::yield_now().await;
    }
}
