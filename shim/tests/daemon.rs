//! The shim daemon as containerd meets it: `start`, the Task API over its socket, events,
//! `delete`; with a fake VMM and agent (see `support`), so that everything of the shim's own is
//! tested where no VM can boot.

#![allow(clippy::unwrap_used)]

mod support;

use std::io::{BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use containerd_shim_protos::api::{
    CheckpointTaskRequest, CloseIORequest, ConnectRequest, CreateTaskRequest, KillRequest, PauseRequest,
    PidsRequest, ShutdownRequest, StateRequest, Status, WaitRequest,
};
use containerd_shim_protos::events::task::TaskExit;
use nix::sys::signal::Signal;
use protobuf::Message;
use ttrpc::Code;
use ttrpc::r#async::Client;

use support::host::{
    DEADLINE, Host, SHIM, code, ctx, delete_request, is_zombie, oom_score_adj, send_signal, start_request,
    wait_request,
};

/// Not a test: the process that the shim starts as its VMM.
#[test]
#[ignore = "the fake VMM, started by the shim under test"]
fn fake_vmm() {
    support::fake_vmm();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_container_lives_and_ends_as_containerd_expects() {
    let mut host = Host::new("life").await;
    host.write_spec(&["/bin/sh", "-c", "cat; echo problem >&2; exit 7"]);
    let task = host.start().await;
    let id = host.id.clone();
    let request = CreateTaskRequest {
        stdin: host.fifo("stdin"),
        stdout: host.fifo("stdout"),
        stderr: host.fifo("stderr"),
        ..host.request()
    };
    let read = |path: PathBuf| {
        std::thread::spawn(move || {
            let mut text = String::new();
            std::fs::File::open(path).unwrap().read_to_string(&mut text).unwrap();
            text
        })
    };
    let (stdout, stderr) = (read(host.path("stdout")), read(host.path("stderr")));
    let created = task.create(ctx(), &request).await.unwrap();
    assert!(Path::new(&format!("/proc/{}", created.pid)).exists());
    assert_ne!(
        std::fs::read_link(format!("/proc/{}/ns/net", created.pid)).unwrap(),
        std::fs::read_link("/proc/self/ns/net").unwrap()
    );
    let state = || StateRequest { id: id.clone(), ..Default::default() };
    let seen = task.state(ctx(), &state()).await.unwrap();
    assert_eq!(
        (seen.status.unwrap(), seen.pid, seen.stdout.clone()),
        (Status::CREATED, created.pid, request.stdout.clone())
    );
    let again = code(task.create(ctx(), &request).await);
    assert_eq!(again.0, Code::ALREADY_EXISTS);

    assert_eq!(task.start(ctx(), &start_request(&host)).await.unwrap().pid, created.pid);
    assert_eq!(task.state(ctx(), &state()).await.unwrap().status.unwrap(), Status::RUNNING);
    let restart = code(task.start(ctx(), &start_request(&host)).await);
    assert_eq!(restart.0, Code::FAILED_PRECONDITION);
    assert!(restart.1.contains("cannot start a running process"));
    assert!(
        code(task.delete(ctx(), &delete_request(&host)).await).1.contains("cannot delete a running process")
    );
    let pids = task.pids(ctx(), &PidsRequest { id: id.clone(), ..Default::default() }).await.unwrap();
    assert_eq!((pids.processes.len(), pids.processes[0].pid), (2, created.pid));
    let connect =
        task.connect(ctx(), &ConnectRequest { id: id.clone(), ..Default::default() }).await.unwrap();
    assert_eq!(connect.task_pid, created.pid);
    let rss: u64 = std::fs::read_to_string(format!("/proc/{}/status", connect.shim_pid))
        .unwrap()
        .lines()
        .filter(|line| line.starts_with("RssAnon") || line.starts_with("RssFile"))
        .map(|line| line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap())
        .sum();
    println!("shim resident: {rss} KiB");
    assert_eq!(oom_score_adj(connect.shim_pid), (oom_score_adj(std::process::id()) + 1).min(1000));
    assert_eq!(oom_score_adj(host.recorded_pid("vmm")), 321, "the spec's");

    std::fs::File::options()
        .write(true)
        .open(host.path("stdin"))
        .unwrap()
        .write_all(b"fed on stdin")
        .unwrap();
    let close = CloseIORequest { id: id.clone(), stdin: true, ..Default::default() };
    task.close_io(ctx(), &close).await.unwrap();
    let wait = task.wait(ctx(), &WaitRequest { id: id.clone(), ..Default::default() }).await.unwrap();
    assert_eq!(wait.exit_status, 7);
    assert!(wait.exited_at.seconds > 0);
    assert_eq!(
        (stdout.join().unwrap().as_str(), stderr.join().unwrap().as_str()),
        ("fed on stdin", "problem\n")
    );
    let kill = KillRequest { id: id.clone(), signal: 9, ..Default::default() };
    let finished = code(task.kill(ctx(), &kill).await);
    assert_eq!(finished, (Code::NOT_FOUND, "process already finished: not found".into()));
    let stopped = task.state(ctx(), &state()).await.unwrap();
    assert_eq!((stopped.status.unwrap(), stopped.exit_status), (Status::STOPPED, 7));

    let deleted = task.delete(ctx(), &delete_request(&host)).await.unwrap();
    assert_eq!((deleted.exit_status, deleted.pid), (7, created.pid));
    assert!(!Path::new(&format!("/proc/{}", created.pid)).exists(), "the holder goes with Delete");
    assert_eq!(
        code(task.state(ctx(), &state()).await),
        (Code::NOT_FOUND, "container not created: not found".into())
    );
    assert_eq!(host.topics(4).await, ["/tasks/create", "/tasks/start", "/tasks/exit", "/tasks/delete"]);
    let address = host.address();
    task.shutdown(ctx(), &ShutdownRequest { id, ..Default::default() }).await.unwrap();
    while Path::new(&format!("/proc/{}", connect.shim_pid)).exists() && !is_zombie(connect.shim_pid) {
        tokio::task::yield_now().await;
    }
    host.assert_clean(&address);
    assert_eq!(host.delete().exit_status, 137, "containerd runs delete after every shim");
    let line = std::fs::read_to_string(host.path("timeline")).unwrap();
    let line: serde_json::Value = serde_json::from_str(line.trim()).unwrap();
    let order = [
        "shim_start_ns",
        "serving_ns",
        "create_ns",
        "vmm_spawned_ns",
        "vmm_ready_ns",
        "agent_ready_ns",
        "container_created_ns",
        "container_started_ns",
        "exit_seen_ns",
    ];
    let times: Vec<u64> =
        order.iter().map(|key| line[key].as_u64().unwrap_or_else(|| panic!("{key}: {line}"))).collect();
    assert!(times.is_sorted(), "{line}");
    assert_eq!(line["agent_boot_ns"], 4, "{line}");
    for key in ["rootfs_ready_ns", "kernel_entry_ns", "shim_rss_kib", "vmm_rss_kib", "guest_rss_kib"] {
        assert!(line[key].is_u64(), "{key}: {line}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_second_task_reuses_the_writable_layer_and_v2_is_served_as_well() {
    let host = Host::new("again").await;
    let mut layers = Vec::new();
    for _ in 0..2 {
        let task = host.start().await;
        task.create(ctx(), &host.request()).await.unwrap();
        task.start(ctx(), &start_request(&host)).await.unwrap();
        let wait = task.wait(ctx(), &wait_request(&host)).await.unwrap();
        assert_eq!(wait.exit_status, 0);
        task.delete(ctx(), &delete_request(&host)).await.unwrap();
        let names: Vec<_> =
            std::fs::read_dir(host.path("state/writable")).unwrap().flatten().map(|e| e.path()).collect();
        layers.push(names);
        task.shutdown(ctx(), &ShutdownRequest::new()).await.unwrap();
        host.delete();
    }
    assert_eq!(layers[0].len(), 1);
    assert_eq!(layers[0], layers[1]);
    // The same tables answer under the name that containerd 1.x calls.
    let output = host.command("start");
    let answer: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let client = Client::connect(answer["address"].as_str().unwrap()).await.unwrap();
    for service in ["containerd.task.v2.Task", "containerd.task.v3.Task"] {
        let request = ttrpc::Request {
            service: service.into(),
            method: "Connect".into(),
            payload: ConnectRequest::new().write_to_bytes().unwrap(),
            timeout_nano: i64::try_from(DEADLINE.as_nanos()).unwrap(),
            ..Default::default()
        };
        let response = client.request(request).await.unwrap();
        assert!(!response.payload.is_empty());
    }
    std::fs::remove_dir_all(host.path("root")).unwrap();
    host.delete();
    assert_eq!(std::fs::read_dir(host.path("state/writable")).unwrap().count(), 0, "collected with its root");
    host.assert_clean(&host.address());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_vmm_ends_the_task_with_137() {
    let mut host = Host::new("vmmkill").await;
    host.write_spec(&["/bin/sleep", "1000"]);
    let task = host.start().await;
    task.create(ctx(), &host.request()).await.unwrap();
    task.start(ctx(), &start_request(&host)).await.unwrap();
    send_signal(host.recorded_pid("vmm"), Signal::SIGKILL);
    let wait = task.wait(ctx(), &wait_request(&host)).await.unwrap();
    assert_eq!(wait.exit_status, 137);
    assert_eq!(host.topics(2).await, ["/tasks/create", "/tasks/start"]);
    let (topic, event) = tokio::time::timeout(DEADLINE, host.events.recv()).await.unwrap().unwrap();
    let exit = TaskExit::parse_from_bytes(&event).unwrap();
    assert_eq!((topic.as_str(), exit.exit_status, exit.id.as_str()), ("/tasks/exit", 137, "vmmkill"));
    assert_eq!(task.delete(ctx(), &delete_request(&host)).await.unwrap().exit_status, 137);
    let address = host.address();
    task.shutdown(ctx(), &ShutdownRequest::new()).await.unwrap();
    host.delete();
    host.assert_clean(&address);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn delete_reclaims_what_a_killed_shim_left() {
    let host = Host::new("shimkill").await;
    host.write_spec(&["/bin/sleep", "1000"]);
    let task = host.start().await;
    let created = task.create(ctx(), &host.request()).await.unwrap();
    task.start(ctx(), &start_request(&host)).await.unwrap();
    let connect =
        task.connect(ctx(), &ConnectRequest { id: host.id.clone(), ..Default::default() }).await.unwrap();
    send_signal(connect.shim_pid, Signal::SIGKILL);
    let response = host.delete();
    assert_eq!((response.exit_status, response.pid), (137, created.pid));
    assert!(response.exited_at.seconds > 0);
    host.assert_clean(&host.address());
    assert_eq!(host.delete().pid, 0, "idempotent");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_guest_that_panics_or_hangs_fails_create_with_its_console_and_leaves_nothing() {
    for (args, needle, console, expected) in [
        // Of a panic the reason is shown, not what the kernel said before.
        (support::PANIC, "asked for a reset", "Kernel panic - not syncing", Code::UNAVAILABLE),
        (support::HANG, "did not become ready within 2 s", "fake guest boots", Code::DEADLINE_EXCEEDED),
    ] {
        let host = Host::with_config("boot", &format!("kernel_args = {args:?}\nboot_deadline_s = 2")).await;
        let task = host.start().await;
        let (found, message) = code(task.create(ctx(), &host.request()).await);
        assert_eq!(found, expected, "{message}");
        assert!(message.contains(needle) && message.contains(console), "{message}");
        assert_eq!(code(task.delete(ctx(), &delete_request(&host)).await).0, Code::NOT_FOUND);
        task.shutdown(ctx(), &ShutdownRequest::new()).await.unwrap();
        host.delete();
        host.assert_clean(&host.address());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bad_input_is_refused_with_one_clear_error() {
    let host = Host::new("bad").await;
    let task = host.start().await;
    let create = |request: CreateTaskRequest| {
        let task = task.clone();
        async move { code(task.create(ctx(), &request).await) }
    };
    let (found, message) = create(CreateTaskRequest { stdout: "http://x".into(), ..host.request() }).await;
    assert!(found == Code::INVALID_ARGUMENT && message.contains("\"http\""), "{message}");
    let (_, message) = create(CreateTaskRequest { stdout: "binary:///x".into(), ..host.request() }).await;
    assert!(message.contains("/x: No such file or directory"), "{message}");
    let (found, message) = create(CreateTaskRequest { checkpoint: "/x".into(), ..host.request() }).await;
    assert!(found == Code::NOT_FOUND && message.contains("open /x"), "{message}");
    host.write_spec(&["/bin/no-such-program"]);
    let (found, message) = create(host.request()).await;
    assert_eq!(found, Code::UNKNOWN);
    assert_eq!(
        message,
        "OCI runtime create failed: exec: \"/bin/no-such-program\": executable file not found in $PATH"
    );
    std::fs::write(host.path("bundle/config.json"), b"{ nonsense").unwrap();
    let (found, message) = create(host.request()).await;
    assert!(found == Code::INVALID_ARGUMENT && message.contains("config.json: malformed"), "{message}");
    host.write_spec(&["/bin/true"]);
    std::fs::remove_file(host.path("kernel")).unwrap();
    let (found, message) = create(host.request()).await;
    assert!(found == Code::FAILED_PRECONDITION && message.contains("guest kernel"), "{message}");
    let refused = code(task.checkpoint(ctx(), &CheckpointTaskRequest::new()).await);
    assert_eq!(refused, (Code::NOT_FOUND, "container not created: not found".into()));
    let unknown = code(task.pause(ctx(), &PauseRequest::new()).await);
    assert_eq!(unknown.0, Code::NOT_FOUND);
    task.shutdown(ctx(), &ShutdownRequest::new()).await.unwrap();
    host.delete();
    host.assert_clean(&host.address());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_created_task_can_be_deleted_and_signals_are_128_plus_n() {
    let mut host = Host::new("signal").await;
    host.write_spec(&["/bin/sleep", "1000"]);
    let task = host.start().await;
    task.create(ctx(), &host.request()).await.unwrap();
    assert_eq!(task.delete(ctx(), &delete_request(&host)).await.unwrap().exit_status, 137);
    assert_eq!(host.topics(3).await, ["/tasks/create", "/tasks/exit", "/tasks/delete"]);
    task.create(ctx(), &host.request()).await.unwrap();
    task.start(ctx(), &start_request(&host)).await.unwrap();
    let kill = KillRequest { id: host.id.clone(), signal: 15, ..Default::default() };
    task.kill(ctx(), &kill).await.unwrap();
    let wait = task.wait(ctx(), &wait_request(&host)).await.unwrap();
    assert_eq!(wait.exit_status, 143);
    task.delete(ctx(), &delete_request(&host)).await.unwrap();
    task.shutdown(ctx(), &ShutdownRequest::new()).await.unwrap();
    host.delete();
    host.assert_clean(&host.address());
}

#[test]
fn flags_are_answered() {
    let output = Command::new(SHIM).arg("-v").output().unwrap();
    assert!(String::from_utf8_lossy(&output.stdout).contains(env!("CARGO_PKG_VERSION")));
    let output = Command::new(SHIM).arg("-info").stdin(Stdio::null()).output().unwrap();
    let info =
        containerd_shim_protos::types::introspection::RuntimeInfo::parse_from_bytes(&output.stdout).unwrap();
    assert_eq!(info.name, "io.containerd.spore.v2");
    let output = Command::new(SHIM).args(["-namespace", "x/y", "-id", "a", "start"]).output().unwrap();
    assert!(!output.status.success());
    let line = BufReader::new(output.stderr.as_slice()).lines().next().unwrap().unwrap();
    assert!(line.contains("-namespace is \"x/y\""), "{line}");
}
