//! How tasks end when something goes wrong, as containerd meets it: guests that hang or disobey,
//! a VMM that makes no sense, holders and shims that are killed. With the fake VMM and agent of
//! `support`.

#![allow(clippy::unwrap_used)]

mod support;

use std::io::Read;
use std::time::{Duration, Instant};

use containerd_shim_protos::api::{ConnectRequest, CreateTaskRequest, PidsRequest, ShutdownRequest, Status};
use containerd_shim_protos::events::task::TaskExit;
use nix::sys::signal::Signal;
use protobuf::Message;
use ttrpc::Code;
use ttrpc::context::with_duration;

use support::host::{
    DEADLINE, Host, code, ctx, delete_request, is_zombie, kill_request, send_signal, start_request,
    state_request, wait_request,
};

const SIGKILL: u32 = 9;

/// Not a test: the process that the shim starts as its VMM.
#[test]
#[ignore = "the fake VMM, started by the shim under test"]
fn fake_vmm() {
    support::fake_vmm();
}

fn kernel_args(words: &str) -> String {
    format!("kernel_args = {words:?}")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_guest_that_answers_nothing_is_still_listed_killed_and_deleted() {
    let mut host = Host::with_config("deaf", &kernel_args(support::DEAF)).await;
    let task = host.start().await;
    let created = task.create(ctx(), &host.request()).await.unwrap();
    let starting = tokio::spawn({
        let (task, request) = (task.clone(), start_request(&host));
        async move { task.start(ctx(), &request).await }
    });
    let pids = task.pids(ctx(), &PidsRequest { id: host.id.clone(), ..Default::default() }).await.unwrap();
    assert_eq!(pids.processes.iter().map(|process| process.pid).collect::<Vec<_>>(), [created.pid]);
    let soon = with_duration(Duration::from_secs(5));
    let state = task.state(soon, &state_request(&host)).await.expect("State does not wait for Start");
    assert_eq!(state.status.unwrap(), Status::CREATED);

    task.kill(ctx(), &kill_request(&host, SIGKILL)).await.unwrap();
    let (_, message) = code(starting.await.unwrap());
    assert!(message.contains("ended while starting the container"), "{message}");
    assert_eq!(task.wait(ctx(), &wait_request(&host)).await.unwrap().exit_status, 137);
    assert_eq!(task.state(ctx(), &state_request(&host)).await.unwrap().status.unwrap(), Status::STOPPED);
    assert_eq!(task.delete(ctx(), &delete_request(&host)).await.unwrap().exit_status, 137);
    assert_eq!(host.topics(3).await, ["/tasks/create", "/tasks/exit", "/tasks/delete"]);
    task.shutdown(ctx(), &ShutdownRequest::new()).await.unwrap();
    host.delete();
    host.assert_clean(&host.address());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_guest_that_does_not_obey_sigkill_loses_its_vm() {
    let host = Host::with_config("immortal", &kernel_args(support::IMMORTAL)).await;
    host.write_spec(&["/bin/sleep", "1000"]);
    let task = host.start().await;
    task.create(ctx(), &host.request()).await.unwrap();
    task.start(ctx(), &start_request(&host)).await.unwrap();
    task.kill(ctx(), &kill_request(&host, SIGKILL)).await.unwrap();
    let (_, message) = code(task.delete(ctx(), &delete_request(&host)).await);
    assert!(message.contains("cannot delete a running process"), "{message}");
    assert_eq!(task.wait(ctx(), &wait_request(&host)).await.unwrap().exit_status, 137);
    assert_eq!(task.delete(ctx(), &delete_request(&host)).await.unwrap().exit_status, 137);
    // A created one, whose Delete has to kill.
    task.create(ctx(), &host.request()).await.unwrap();
    assert_eq!(task.delete(ctx(), &delete_request(&host)).await.unwrap().exit_status, 137);
    task.shutdown(ctx(), &ShutdownRequest::new()).await.unwrap();
    host.delete();
    host.assert_clean(&host.address());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_kills_the_tasks_pid_kills_the_task() {
    let mut host = Host::new("holder").await;
    host.write_spec(&["/bin/sleep", "1000"]);
    let task = host.start().await;
    let created = task.create(ctx(), &host.request()).await.unwrap();
    task.start(ctx(), &start_request(&host)).await.unwrap();
    send_signal(created.pid, Signal::SIGKILL);
    assert_eq!(task.wait(ctx(), &wait_request(&host)).await.unwrap().exit_status, 137);
    assert_eq!(task.delete(ctx(), &delete_request(&host)).await.unwrap().exit_status, 137);
    assert_eq!(host.topics(4).await, ["/tasks/create", "/tasks/start", "/tasks/exit", "/tasks/delete"]);
    task.shutdown(ctx(), &ShutdownRequest::new()).await.unwrap();
    host.delete();
    host.assert_clean(&host.address());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_start_whose_caller_gave_up_is_finished_nevertheless() {
    let mut host = Host::with_config("gate", &kernel_args(support::GATE)).await;
    host.write_spec(&["/bin/sleep", "1000"]);
    host.fifo(support::GATE_FIFO);
    let task = host.start().await;
    task.create(ctx(), &host.request()).await.unwrap();
    let impatient = with_duration(Duration::from_millis(300));
    task.start(impatient, &start_request(&host)).await.unwrap_err();
    assert_eq!(task.state(ctx(), &state_request(&host)).await.unwrap().status.unwrap(), Status::CREATED);
    let gate = host.path(support::GATE_FIFO);
    tokio::task::spawn_blocking(|| std::fs::File::options().write(true).open(gate)).await.unwrap().unwrap();
    assert_eq!(host.topics(2).await, ["/tasks/create", "/tasks/start"]);
    assert_eq!(task.state(ctx(), &state_request(&host)).await.unwrap().status.unwrap(), Status::RUNNING);
    task.kill(ctx(), &kill_request(&host, SIGKILL)).await.unwrap();
    assert_eq!(task.wait(ctx(), &wait_request(&host)).await.unwrap().exit_status, 137);
    task.delete(ctx(), &delete_request(&host)).await.unwrap();
    task.shutdown(ctx(), &ShutdownRequest::new()).await.unwrap();
    host.delete();
    host.assert_clean(&host.address());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_shim_that_is_told_to_go_shuts_the_guest_down_and_tells_the_end() {
    let mut host = Host::new("sigterm").await;
    let script = "trap 'echo last words; kill $!; exit 5' TERM; echo ready; sleep 1000 & wait";
    host.write_spec(&["/bin/bash", "-c", script]);
    let task = host.start().await;
    let request = CreateTaskRequest { stdout: host.fifo("stdout"), ..host.request() };
    task.create(ctx(), &request).await.unwrap();
    task.start(ctx(), &start_request(&host)).await.unwrap();
    let stdout = host.path("stdout");
    // It keeps the stream open and never reads the last words.
    let _client = tokio::task::spawn_blocking(move || {
        let mut client = std::fs::File::open(stdout).unwrap();
        let mut line = [0; 6];
        client.read_exact(&mut line).unwrap();
        assert_eq!(&line, b"ready\n");
        client
    })
    .await
    .unwrap();
    let connect = ConnectRequest { id: host.id.clone(), ..Default::default() };
    let shim = task.connect(ctx(), &connect).await.unwrap().shim_pid;
    let address = host.address();
    send_signal(shim, Signal::SIGTERM);
    assert_eq!(host.topics(2).await, ["/tasks/create", "/tasks/start"]);
    let (topic, event) = tokio::time::timeout(DEADLINE, host.events.recv()).await.unwrap().unwrap();
    let exit = TaskExit::parse_from_bytes(&event).unwrap();
    assert_eq!((topic.as_str(), exit.exit_status), ("/tasks/exit", 5), "its own status");
    assert_eq!(host.topics(1).await, ["/tasks/delete"]);
    assert!(host.path(support::SHUT_DOWN).exists(), "the agent was asked");
    let until = Instant::now() + DEADLINE;
    while !is_zombie(shim) {
        assert!(Instant::now() < until, "the shim does not end");
        tokio::task::yield_now().await;
    }
    host.assert_clean(&address);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn create_names_why_a_vm_is_gone() {
    for (words, needles, expected) in [
        (support::GARBAGE, ["said what cannot be understood", "a message of 16 bytes"], Code::UNAVAILABLE),
        (support::FAULT, ["triple fault; rip=0xdead", "fake guest boots"], Code::UNAVAILABLE),
    ] {
        let host = Host::with_config("why", &kernel_args(words)).await;
        let task = host.start().await;
        let (found, message) = code(task.create(ctx(), &host.request()).await);
        assert_eq!(found, expected, "{message}");
        for needle in needles {
            assert!(message.contains(needle), "{message}");
        }
        task.shutdown(ctx(), &ShutdownRequest::new()).await.unwrap();
        host.delete();
        host.assert_clean(&host.address());
    }
}
