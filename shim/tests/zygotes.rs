//! Clones off a zygote: two shims, of which one has the machine and the other gets a copy. With the fake VMM and agent of
//! `support`; real machines are in `tests/native` and `tests/e2e`.

#![allow(clippy::unwrap_used)]

mod support;

use std::path::PathBuf;

use containerd_shim_protos::api::Status;
use containerd_shim_protos::shim_async::TaskClient;
use containerd_shim_spore::api::v1::snapshots::{EndZygoteRequest, ZygoteRequest, ZygoteResponse};
use serde_json::{Value, json};
use ttrpc::Code;

use support::host::{
    Host, code, ctx, delete_request, is_zombie, kill_request, start_request, state_request, wait_request,
};
use support::scene::Scene;

/// Not a test: the process that the shim starts as its VMM.
#[test]
#[ignore = "the fake VMM, started by the shim under test"]
fn fake_vmm() {
    support::fake_vmm();
}

async fn zygote(source: &Scene) -> ttrpc::Result<ZygoteResponse> {
    let request = ZygoteRequest { id: source.host.id.clone(), ..Default::default() };
    source.snapshots.zygote(ctx(), &request).await
}

async fn end(source: &Scene, zygote: &str) -> ttrpc::Result<()> {
    let (id, zygote) = (source.host.id.clone(), zygote.to_owned());
    let request = EndZygoteRequest { id, zygote, ..Default::default() };
    source.snapshots.end_zygote(ctx(), &request).await.map(drop)
}

/// Sockets of zygotes that wait.
fn sockets(source: &Scene) -> Vec<PathBuf> {
    let dir = source.host.path("run/test").join(&source.host.id);
    let paths = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    paths
        .filter(|path| path.extension().is_some_and(|end| end == "sock"))
        .filter(|path| is_zygotes(path))
        .collect()
}

fn is_zygotes(path: &std::path::Path) -> bool {
    path.file_name().unwrap().to_string_lossy().starts_with("zygote-")
}

/// A shim on the source's host that has not created its task.
async fn neighbour(source: &Scene, id: &str) -> (Host, TaskClient) {
    let host = Host::new(id).await;
    std::os::unix::fs::symlink(source.host.path("run"), host.path("run")).unwrap();
    let task = host.start().await;
    (host, task)
}

fn shall_be_clone_of(host: &Host, wanted: &str) {
    host.write_spec(&["/bin/false"]);
    let path = host.path("bundle/config.json");
    let mut spec: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    spec["annotations"] = json!({ "io.spore.clone-from": wanted });
    std::fs::write(path, spec.to_string()).unwrap();
}

async fn leave(host: Host, task: TaskClient) {
    task.shutdown(ctx(), &containerd_shim_protos::api::ShutdownRequest::new()).await.unwrap();
    host.delete();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_clone_is_forked_off_a_zygote_and_outlives_it_and_its_source() {
    let source = Scene::new("forked").await;
    let told = zygote(&source).await.unwrap();
    assert!(told.stood_ns > 0 && told.pause_ns == support::PAUSE_NS, "{told:?}");
    assert_eq!((sockets(&source).len(), source.status().await), (1, Status::RUNNING));

    let (host, task) = neighbour(&source, "clone").await;
    shall_be_clone_of(&host, &told.zygote);
    task.create(ctx(), &host.request()).await.unwrap();
    task.start(ctx(), &start_request(&host)).await.unwrap();
    let vmm = host.recorded_pid("vmm");
    assert_ne!(vmm, source.vmm());
    assert_eq!(
        std::fs::read_dir(source.host.path("state"))
            .unwrap()
            .flatten()
            .filter(|entry| entry.file_name() == "snapshots")
            .count(),
        0,
        "nothing is written"
    );

    end(&source, &told.zygote).await.unwrap();
    assert_eq!(code(end(&source, &told.zygote).await).0, Code::FAILED_PRECONDITION);
    support::scene::until("its socket is gone", || sockets(&source).is_empty()).await;
    source.task.kill(ctx(), &kill_request(&source.host, 9)).await.unwrap();
    source.task.wait(ctx(), &wait_request(&source.host)).await.unwrap();
    source.task.delete(ctx(), &delete_request(&source.host)).await.unwrap();

    let state = task.state(ctx(), &state_request(&host)).await.unwrap();
    assert_eq!(state.status.unwrap(), Status::RUNNING);
    assert!(!is_zombie(vmm));
    task.kill(ctx(), &kill_request(&host, 9)).await.unwrap();
    assert_eq!(task.wait(ctx(), &wait_request(&host)).await.unwrap().exit_status, 137);
    task.delete(ctx(), &delete_request(&host)).await.unwrap();
    let other = source.host.address();
    leave(source.host, source.task).await;
    let address = host.address();
    assert!(!std::path::Path::new(other.trim_start_matches("unix://")).exists());
    leave(host, task).await;
    assert!(!std::path::Path::new(address.trim_start_matches("unix://")).exists());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_no_zygote_or_forks_nothing_makes_no_clone_and_leaves_nothing() {
    let source = Scene::new("unforked").await;
    let told = zygote(&source).await.unwrap();
    let (host, task) = neighbour(&source, "none").await;
    let absent = format!("zygote:unforked/{}", "0".repeat(32));
    for (wanted, expected, part) in [
        ("zygote:", Code::INVALID_ARGUMENT, "names no zygote"),
        ("zygote:../../etc/x", Code::INVALID_ARGUMENT, "names no zygote"),
        (&absent, Code::NOT_FOUND, "the zygote is no more"),
        (&absent.replace("unforked", "nobody"), Code::NOT_FOUND, "the zygote is no more"),
    ] {
        shall_be_clone_of(&host, wanted);
        let (found, message) = code(task.create(ctx(), &host.request()).await);
        assert_eq!(found, expected, "{wanted}: {message}");
        assert!(message.contains(part), "{wanted}: {message}");
    }
    std::fs::write(source.host.path(support::UNFORKABLE), "").unwrap();
    shall_be_clone_of(&host, &told.zygote);
    let (_, message) = code(task.create(ctx(), &host.request()).await);
    assert!(message.contains("Cannot allocate memory"), "{message}");
    std::fs::remove_file(source.host.path(support::UNFORKABLE)).unwrap();
    // It was the zygote's moment, not its end.
    task.create(ctx(), &host.request()).await.unwrap();
    task.start(ctx(), &start_request(&host)).await.unwrap();
    task.kill(ctx(), &kill_request(&host, 9)).await.unwrap();
    task.wait(ctx(), &wait_request(&host)).await.unwrap();
    task.delete(ctx(), &delete_request(&host)).await.unwrap();

    assert_eq!(source.status().await, Status::RUNNING);
    assert_eq!(source.disk().0.len(), 2, "what it had, and the layer that it goes on in");
    leave(host, task).await;
    // With the source its zygote goes, though nobody ended it.
    source.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_clone_goes_on_when_its_source_is_killed_and_no_more_come_of_that() {
    let source = Scene::new("killed").await;
    let told = zygote(&source).await.unwrap();
    let (host, task) = neighbour(&source, "survivor").await;
    shall_be_clone_of(&host, &told.zygote);
    task.create(ctx(), &host.request()).await.unwrap();
    task.start(ctx(), &start_request(&host)).await.unwrap();

    let shim = source.host.recorded_pid("shim");
    support::host::send_signal(shim, nix::sys::signal::Signal::SIGKILL);
    support::scene::until("the source's shim is gone", || is_zombie(shim)).await;
    assert!(!sockets(&source).is_empty(), "nobody has removed it");
    let (late, late_task) = neighbour(&source, "late").await;
    shall_be_clone_of(&late, &told.zygote);
    let (found, message) = code(late_task.create(ctx(), &late.request()).await);
    assert_eq!(found, Code::NOT_FOUND, "{message}");
    leave(late, late_task).await;
    source.host.delete();
    assert!(!source.host.path("run/test/killed").exists());

    let state = task.state(ctx(), &state_request(&host)).await.unwrap();
    assert_eq!(state.status.unwrap(), Status::RUNNING);
    task.kill(ctx(), &kill_request(&host, 9)).await.unwrap();
    assert_eq!(task.wait(ctx(), &wait_request(&host)).await.unwrap().exit_status, 137);
    task.delete(ctx(), &delete_request(&host)).await.unwrap();
    leave(host, task).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn there_is_no_zygote_of_what_does_not_run() {
    let source = Scene::new("stopped").await;
    let missing = ZygoteRequest { id: "nobody".into(), ..Default::default() };
    assert_eq!(code(source.snapshots.zygote(ctx(), &missing).await).0, Code::NOT_FOUND);
    source.task.kill(ctx(), &kill_request(&source.host, 9)).await.unwrap();
    source.task.wait(ctx(), &wait_request(&source.host)).await.unwrap();
    let (found, message) = code(zygote(&source).await);
    assert_eq!(found, Code::FAILED_PRECONDITION, "{message}");
    assert!(sockets(&source).is_empty());
    source.delete().await;
}
