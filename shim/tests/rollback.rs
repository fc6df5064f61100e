//! Rollback in the shim: what stays, and that whatever fails or is killed in between leaves one machine, or none, and nothing else. With
//! the fake VMM and agent of `support`, whose restored machines begin their processes anew.

#![allow(clippy::unwrap_used)]

mod support;

use std::io::BufRead;
use std::path::PathBuf;

use containerd_shim_protos::api::{PauseRequest, ResumeRequest, Status};
use containerd_shim_spore::snapshot::Store;
use nix::sys::signal::Signal;
use ttrpc::Code;

use support::host::{DEADLINE, code, ctx, is_zombie, kill_request, send_signal, wait_request};
use support::scene::{Scene, until};

/// Not a test: the process that the shim starts as its VMM.
#[test]
#[ignore = "the fake VMM, started by the shim under test"]
fn fake_vmm() {
    support::fake_vmm();
}

/// What a client reads, line by line.
fn read_lines(path: PathBuf) -> tokio::sync::mpsc::UnboundedReceiver<String> {
    let (sender, lines) = tokio::sync::mpsc::unbounded_channel();
    std::thread::spawn(move || {
        for line in std::io::BufReader::new(std::fs::File::open(path).unwrap()).lines() {
            let _ = sender.send(line.unwrap());
        }
    });
    lines
}

/// Waits until a machine's process has begun: what it has not written yet goes with its machine.
async fn begun(lines: &mut tokio::sync::mpsc::UnboundedReceiver<String>) {
    let line = tokio::time::timeout(DEADLINE, lines.recv()).await.unwrap();
    assert_eq!(line.as_deref(), Some("begun"), "of each machine, to the same client");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_task_goes_back_and_forth_and_stays_the_same() {
    let mut scene = Scene::with_stdout("back", "stdout").await;
    let mut output = read_lines(scene.host.path("stdout"));
    begun(&mut output).await;
    let first = scene.snapshot().await;
    let second = scene.snapshot().await;
    let mut vmm = scene.vmm();
    for (to, layers) in [(&first, 2), (&second, 3), (&first, 2)] {
        let told = scene.back_to(to).await.unwrap();
        assert!(told.gap_ns > 0 && told.total_ns >= told.gap_ns && told.thaw_ns > 0, "{told:?}");
        assert_eq!(scene.status().await, Status::RUNNING);
        assert_ne!(scene.vmm(), vmm, "another machine");
        vmm = scene.vmm();
        let (listed, there) = scene.disk();
        assert_eq!((listed.len(), &listed), (layers, &there), "and no other files");
        scene.goes_on(vmm, &(listed, there)).await;
        begun(&mut output).await;
    }
    let pause = PauseRequest { id: scene.host.id.clone(), ..Default::default() };
    scene.task.pause(ctx(), &pause).await.unwrap();
    assert_eq!(scene.back_to(&second).await.unwrap().thaw_ns, 0);
    assert_eq!(scene.status().await, Status::PAUSED);
    let resume = ResumeRequest { id: scene.host.id.clone(), ..Default::default() };
    scene.task.resume(ctx(), &resume).await.unwrap();
    begun(&mut output).await;
    let third = scene.snapshot().await;
    scene.back_to(&third).await.unwrap();
    let events = ["create", "start", "paused", "resumed"].map(|what| format!("/tasks/{what}"));
    assert_eq!(scene.host.topics(4).await, events);
    scene.task.kill(ctx(), &kill_request(&scene.host, 9)).await.unwrap();
    assert_eq!(scene.host.topics(1).await, ["/tasks/exit"]);
    scene.task.wait(ctx(), &wait_request(&scene.host)).await.unwrap();
    let store = Store::new(&scene.host.path("state"));
    assert_eq!(store.list().unwrap().entries.len(), 3, "all of them stay");
    scene.delete().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_that_fails_leaves_the_machine_that_runs() {
    let scene = Scene::new("fails").await;
    let snapshot = scene.snapshot().await;
    let (vmm, disk) = (scene.vmm(), scene.disk());
    std::fs::write(scene.host.path(support::UNRESTORABLE), "").unwrap();
    let (_, message) = code(scene.back_to(&snapshot).await);
    assert!(message.contains("the saved state is of no machine"), "{message}");
    assert_eq!(scene.status().await, Status::RUNNING);
    scene.goes_on(vmm, &disk).await;
    std::fs::remove_file(scene.host.path(support::UNRESTORABLE)).unwrap();

    // Its VMM is killed when it is all but ready.
    let (call, [_, other]) = scene.back_until_setup(&snapshot).await;
    send_signal(other, Signal::SIGKILL);
    let (status, message) = code(call.await.unwrap());
    assert_eq!(status, Code::UNAVAILABLE, "{message}");
    scene.goes_on(vmm, &disk).await;
    std::fs::remove_file(scene.host.path(support::SETUP_FIFO)).unwrap();

    scene.back_to(&snapshot).await.unwrap();
    assert_ne!(scene.vmm(), vmm);
    scene.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_no_snapshot_of_the_task_or_no_task_that_runs_is_refused() {
    let other = Scene::new("other").await;
    let scene = Scene::new("refused").await;
    let snapshot = scene.snapshot().await;
    let foreign = other.snapshot().await;
    let (from, to) = (other.host.path("state/snapshots"), scene.host.path("state/snapshots"));
    std::fs::rename(from.join(&foreign), to.join(&foreign)).unwrap();
    other.end().await;
    let (vmm, disk) = (scene.vmm(), scene.disk());
    for (wanted, status, part) in [
        (foreign.as_str(), Code::FAILED_PRECONDITION, "is of container other in namespace test"),
        (&"f".repeat(32), Code::NOT_FOUND, "there is none"),
        ("../x", Code::INVALID_ARGUMENT, "32 hexadecimal digits"),
    ] {
        let (found, message) = code(scene.back_to(wanted).await);
        assert!(found == status && message.contains(part), "{found:?}: {message}");
        scene.goes_on(vmm, &disk).await;
    }
    scene.task.kill(ctx(), &kill_request(&scene.host, 9)).await.unwrap();
    scene.task.wait(ctx(), &wait_request(&scene.host)).await.unwrap();
    let (status, message) = code(scene.back_to(&snapshot).await);
    assert_eq!(status, Code::FAILED_PRECONDITION);
    assert!(message.contains("cannot roll back a stopped container"), "{message}");
    scene.delete().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_end_that_comes_in_the_middle_wins() {
    let scene = Scene::new("killed").await;
    let snapshot = scene.snapshot().await;
    let (call, [vmm, other]) = scene.back_until_setup(&snapshot).await;
    send_signal(vmm, Signal::SIGKILL);
    let (status, message) = code(call.await.unwrap());
    assert_eq!(status, Code::FAILED_PRECONDITION, "{message}");
    assert!(message.contains("ended meanwhile"), "{message}");
    assert_eq!(scene.task.wait(ctx(), &wait_request(&scene.host)).await.unwrap().exit_status, 137);
    until("no machine is left", || is_zombie(vmm) && is_zombie(other)).await;
    scene.delete().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_signal_that_comes_in_the_middle_reaches_the_machine_that_there_is_then() {
    let scene = Scene::new("signal").await;
    let snapshot = scene.snapshot().await;
    let (call, _) = scene.back_until_setup(&snapshot).await;
    let kill = tokio::spawn({
        let (task, request) = (scene.task.clone(), kill_request(&scene.host, 15));
        async move { task.kill(ctx(), &request).await }
    });
    scene.open_setup().await;
    call.await.unwrap().unwrap();
    kill.await.unwrap().unwrap();
    let exit = scene.task.wait(ctx(), &wait_request(&scene.host)).await.unwrap().exit_status;
    assert_eq!(exit, 128 + 15);
    scene.delete().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn delete_ends_both_machines_after_a_killed_shim() {
    let scene = Scene::new("shim").await;
    let snapshot = scene.snapshot().await;
    let (call, machines) = scene.back_until_setup(&snapshot).await;
    let (shim, address) = (scene.host.recorded_pid("shim"), scene.host.address());
    send_signal(shim, Signal::SIGKILL);
    assert!(call.await.unwrap().is_err());
    until("the shim has ended", || is_zombie(shim)).await;
    assert_eq!(scene.host.delete().exit_status, 137);
    assert!(machines.into_iter().all(is_zombie));
    scene.host.assert_clean(&address);
}
