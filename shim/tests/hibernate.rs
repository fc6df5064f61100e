//! Hibernation in the shim: a task without a machine is still a task, and whatever fails or is killed leaves what there was, or nothing.
//! With the fake VMM and agent of `support`, whose processes here have no streams.

#![allow(clippy::unwrap_used)]

mod support;

use containerd_shim_protos::api::{ExecProcessRequest, ResumeRequest, StatsRequest, Status};
use containerd_shim_spore::api::v1::snapshots::{
    CreateRequest, HibernateRequest, HibernateResponse, ResumeRequest as WakeRequest, ResumeResponse,
};
use containerd_shim_spore::api::v1::snapshots_ttrpc::SnapshotsClient;
use containerd_shim_spore::snapshot::manifest::Purpose;
use containerd_shim_spore::snapshot::{SnapshotId, Store};
use nix::sys::signal::Signal;
use ttrpc::Code;

use support::host::{Host, code, ctx, is_zombie, kill_request, send_signal, wait_request};
use support::scene::{Scene, until};

/// Not a test: the process that the shim starts as its VMM.
#[test]
#[ignore = "the fake VMM, started by the shim under test"]
fn fake_vmm() {
    support::fake_vmm();
}

async fn hibernate(scene: &Scene) -> ttrpc::Result<HibernateResponse> {
    let request = HibernateRequest { id: scene.host.id.clone(), ..Default::default() };
    scene.snapshots.hibernate(ctx(), &request).await
}

async fn wake(client: SnapshotsClient, id: String) -> ttrpc::Result<ResumeResponse> {
    client.resume(ctx(), &WakeRequest { id, ..Default::default() }).await
}

async fn wake_now(scene: &Scene) -> ttrpc::Result<ResumeResponse> {
    wake(scene.snapshots.clone(), scene.host.id.clone()).await
}

/// What the store has, with its purposes.
fn stored(host: &Host) -> Vec<(SnapshotId, Purpose)> {
    let entries = Store::new(&host.path("state")).list().unwrap().entries;
    entries.iter().map(|entry| (entry.manifest.id, entry.manifest.purpose)).collect()
}

fn hibernates_in(scene: &Scene) -> Option<String> {
    scene.record()["hibernates_in"].as_str().map(str::to_owned)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_task_hibernates_and_wakes_and_stays_the_same() {
    let mut scene = Scene::new("sleeps").await;
    let vmm = scene.vmm();
    let done = hibernate(&scene).await.unwrap();
    let id: SnapshotId = done.snapshot.parse().unwrap();
    assert!(done.total_ns >= done.rest_ns + done.save_ns && done.write_ns > 0, "{done:?}");
    assert_eq!(scene.status().await, Status::PAUSED);
    assert_eq!(scene.vmms(), Vec::<String>::new());
    assert!(is_zombie(vmm));
    assert_eq!(stored(&scene.host), [(id, Purpose::Hibernation)]);
    assert_eq!(hibernates_in(&scene), Some(done.snapshot.clone()));

    let of = || scene.host.id.clone();
    let stats = StatsRequest { id: of(), ..Default::default() };
    let exec = ExecProcessRequest { id: of(), exec_id: "sh".into(), ..Default::default() };
    let create = CreateRequest { id: of(), ..Default::default() };
    for (what, refused) in [
        ("stats", code(scene.task.stats(ctx(), &stats).await)),
        ("signal", code(scene.task.kill(ctx(), &kill_request(&scene.host, 15)).await)),
        ("exec", code(scene.task.exec(ctx(), &exec).await)),
        ("snapshot", code(scene.snapshots.create(ctx(), &create).await)),
        ("rollback", code(scene.back_to(&done.snapshot).await)),
        ("again", code(hibernate(&scene).await)),
    ] {
        let (status, message) = refused;
        assert_eq!(status, Code::FAILED_PRECONDITION, "{what}: {message}");
        // Paused is what containerd's clients know of it.
        let part = if what == "exec" { "paused state" } else { "hibernates; resume it first" };
        assert!(message.contains(part), "{what}: {message}");
    }

    let resume = ResumeRequest { id: of(), ..Default::default() };
    scene.task.resume(ctx(), &resume).await.unwrap();
    assert_eq!(scene.status().await, Status::RUNNING);
    let woken = scene.vmm();
    assert_ne!(woken, vmm);
    let (listed, there) = scene.disk();
    assert_eq!((listed.len(), &listed), (2, &there), "what it had, and what it writes since");
    scene.goes_on(woken, &(listed, there)).await;
    assert_eq!(hibernates_in(&scene), None);

    let next: SnapshotId = hibernate(&scene).await.unwrap().snapshot.parse().unwrap();
    assert_eq!(stored(&scene.host), [(next, Purpose::Hibernation)], "in the place of the one before");
    let times = wake_now(&scene).await.unwrap();
    assert!(times.total_ns > times.restore_ns && times.restore_ns > 0, "{times:?}");
    assert_eq!(scene.status().await, Status::RUNNING);
    let (listed, there) = scene.disk();
    assert_eq!((listed.len(), &listed), (3, &there));
    scene.goes_on(scene.vmm(), &(listed, there)).await;
    let (status, message) = code(wake_now(&scene).await);
    assert_eq!(status, Code::FAILED_PRECONDITION, "{message}");
    let again = ["paused", "resumed", "paused", "resumed"].map(|what| format!("/tasks/{what}"));
    assert_eq!(scene.host.topics(6).await[2..], again);
    scene.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_that_cannot_be_put_away_goes_on() {
    let config = format!("kernel_args = {:?}", support::UNWRITTEN);
    let scene = Scene::with(Host::with_config("unwritten", &config).await, "").await;
    let vmm = scene.vmm();
    let (_, message) = code(hibernate(&scene).await);
    assert!(message.contains("No space left"), "{message}");
    assert_eq!(scene.status().await, Status::RUNNING);
    let (listed, there) = scene.disk();
    assert_eq!(listed, there);
    scene.goes_on(vmm, &(listed, there)).await;
    assert_eq!((stored(&scene.host), hibernates_in(&scene)), (vec![], None));
    scene.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_that_cannot_wake_hibernates_on() {
    let scene = Scene::new("unwakeable").await;
    let snapshot = hibernate(&scene).await.unwrap().snapshot;
    std::fs::write(scene.host.path(support::UNRESTORABLE), "").unwrap();
    let (_, message) = code(wake_now(&scene).await);
    assert!(message.contains("the saved state is of no machine"), "{message}");
    assert_eq!(scene.status().await, Status::PAUSED);
    assert_eq!(hibernates_in(&scene), Some(snapshot));
    assert_eq!((scene.vmms().len(), stored(&scene.host).len()), (0, 1));
    std::fs::remove_file(scene.host.path(support::UNRESTORABLE)).unwrap();
    wake_now(&scene).await.unwrap();
    assert_eq!(scene.status().await, Status::RUNNING);
    scene.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_that_is_killed_while_it_hibernates_leaves_nothing() {
    let scene = Scene::new("killed").await;
    hibernate(&scene).await.unwrap();
    let host = scene.host.path("state");
    scene.task.kill(ctx(), &kill_request(&scene.host, 9)).await.unwrap();
    assert_eq!(scene.task.wait(ctx(), &wait_request(&scene.host)).await.unwrap().exit_status, 137);
    assert_eq!(scene.status().await, Status::STOPPED);
    let delete = support::host::delete_request(&scene.host);
    scene.task.delete(ctx(), &delete).await.unwrap();
    assert_eq!(Store::new(&host).list().unwrap().entries.len(), 0);
    let address = scene.host.address();
    scene.task.shutdown(ctx(), &containerd_shim_protos::api::ShutdownRequest::new()).await.unwrap();
    scene.host.delete();
    scene.host.assert_clean(&address);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_end_that_comes_while_it_wakes_wins() {
    let scene = Scene::new("waking").await;
    hibernate(&scene).await.unwrap();
    let gate = scene.host.path(support::SETUP_FIFO);
    nix::unistd::mkfifo(&gate, nix::sys::stat::Mode::S_IRWXU).unwrap();
    let call = tokio::spawn(wake(scene.snapshots.clone(), scene.host.id.clone()));
    until("the restored agent is asked", || support::scene::blocked_in_open(scene.other())).await;
    let other = scene.other();
    scene.task.kill(ctx(), &kill_request(&scene.host, 9)).await.unwrap();
    let (status, message) = code(call.await.unwrap());
    assert_eq!(status, Code::FAILED_PRECONDITION, "{message}");
    assert!(message.contains("ended meanwhile"), "{message}");
    assert_eq!(scene.task.wait(ctx(), &wait_request(&scene.host)).await.unwrap().exit_status, 137);
    until("no machine is left", || is_zombie(other)).await;
    scene.delete().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn delete_removes_what_the_task_of_a_killed_shim_hibernated_in() {
    let scene = Scene::new("shim").await;
    hibernate(&scene).await.unwrap();
    let (shim, address) = (scene.host.recorded_pid("shim"), scene.host.address());
    send_signal(shim, Signal::SIGKILL);
    until("the shim has ended", || is_zombie(shim)).await;
    assert_eq!(scene.host.delete().exit_status, 137);
    assert_eq!(stored(&scene.host), []);
    scene.host.assert_clean(&address);
}
