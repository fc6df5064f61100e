//! The shim and a network namespace: interfaces that are there, that come and that go; with the
//! fake VMM and agent of `support`, and real links, taps and redirects.

#![allow(clippy::unwrap_used)]

mod support;

use std::path::Path;
use std::time::Instant;

use containerd_shim_protos::api::{ShutdownRequest, StatsRequest};
use containerd_shim_protos::cgroups_v2::metrics::Metrics;
use containerd_shim_protos::shim_async::TaskClient;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::signal::Signal;
use protobuf::Message;
use spore_agent_api::v1::network::NetworkRequest;
use ttrpc::Code;

use support::host::{
    DEADLINE, Host, code, ctx, delete_request, kill_request, send_signal, start_request, wait_request,
};
use support::space::Space;

/// Not a test: the process that the shim starts as its VMM.
#[test]
#[ignore = "the fake VMM, started by the shim under test"]
fn fake_vmm() {
    support::fake_vmm();
}

/// What the guest was last told.
fn told(host: &Host) -> NetworkRequest {
    let bytes = std::fs::read(host.path(support::NETWORK)).unwrap_or_default();
    NetworkRequest::parse_from_bytes(&bytes).unwrap()
}

fn names(host: &Host) -> Vec<String> {
    told(host).interfaces.into_iter().map(|interface| interface.name).collect()
}

/// Waits until the guest has just these interfaces.
fn until_told(host: &Host, wanted: &[&str]) {
    let until = Instant::now() + DEADLINE;
    while names(host) != wanted {
        assert!(Instant::now() < until, "{:?}", told(host));
        std::thread::yield_now();
    }
}

struct Mounted<'a>(&'a Path);

impl Drop for Mounted<'_> {
    fn drop(&mut self) {
        umount2(self.0, MntFlags::MNT_DETACH).unwrap();
    }
}

async fn end(host: &Host, task: &TaskClient) {
    task.kill(ctx(), &kill_request(host, 9)).await.unwrap();
    task.wait(ctx(), &wait_request(host)).await.unwrap();
    task.delete(ctx(), &delete_request(host)).await.unwrap();
}

/// A sandbox in a namespace with one interface, created.
async fn sandbox(id: &str, config: &str) -> (Host, Space, Space) {
    let (space, outside) = (Space::new(), Space::new());
    space.interface(&outside, "eth0", "10.1.1.2").await;
    let host = Host::with_config(id, config).await;
    host.write_spec_in(&["/bin/sleep", "1000"], Some(&space.path()));
    (host, space, outside)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn interfaces_come_and_go_and_the_guest_follows() {
    let (host, space, outside) = sandbox("follow", "").await;
    let before = space.counts().await;
    let task = host.start().await;
    task.create(ctx(), &host.request()).await.unwrap();
    assert_eq!(names(&host), ["eth0"], "before Create answers");
    assert_eq!(told(&host).interfaces[0].addresses[0].address, [10, 1, 1, 2]);
    assert_eq!(space.counts().await, (before.0 + 1, before.1 + 2));

    // As Docker does it.
    space.interface(&outside, "eth1", "10.2.1.2").await;
    task.start(ctx(), &start_request(&host)).await.unwrap();
    assert_eq!(names(&host), ["eth0", "eth1"], "before Start answers");
    space.interface(&outside, "eth2", "10.3.1.2").await;
    until_told(&host, &["eth0", "eth1", "eth2"]);
    outside.delete("eth0").await;
    until_told(&host, &["eth1", "eth2"]);
    space.interface(&outside, "eth3", "10.4.1.2").await;
    until_told(&host, &["eth3", "eth1", "eth2"]);

    let stats = StatsRequest { id: host.id.clone(), ..Default::default() };
    let stats = task.stats(ctx(), &stats).await.unwrap().stats.unwrap().value;
    let mut counted: Vec<_> =
        Metrics::parse_from_bytes(&stats).unwrap().network.into_iter().map(|one| one.name).collect();
    counted.sort();
    assert_eq!(counted, ["eth1", "eth2", "eth3"]);

    end(&host, &task).await;
    let links = before.0 + 2;
    assert_eq!(space.counts().await, (links, before.1), "three interfaces, and nothing of the shim's");
    task.shutdown(ctx(), &ShutdownRequest::new()).await.unwrap();
    host.delete();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_guest_asks_the_name_server_of_the_namespace() {
    let (host, space, _outside) = sandbox("names", "").await;
    space.name_server().await;
    let task = host.start().await;
    task.create(ctx(), &host.request()).await.unwrap();
    assert!(told(&host).name_server);
    let until = Instant::now() + DEADLINE;
    while std::fs::read(host.path(support::ANSWER)).unwrap_or_default() != b"\0\x08noitseuq" {
        assert!(Instant::now() < until, "no answer");
        std::thread::yield_now();
    }
    end(&host, &task).await;
    task.shutdown(ctx(), &ShutdownRequest::new()).await.unwrap();
    host.delete();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_network_that_the_guest_refuses_fails_create_and_is_undone() {
    let (host, space, _outside) = sandbox("refused", &format!("kernel_args = {:?}", support::UNROUTED)).await;
    let before = space.counts().await;
    let task = host.start().await;
    let (_, message) = code(task.create(ctx(), &host.request()).await);
    assert!(
        message.contains("network of the guest: interface eth0: address 10.1.1.2/24: no room"),
        "{message}"
    );
    assert_eq!(space.counts().await, before);
    task.shutdown(ctx(), &ShutdownRequest::new()).await.unwrap();
    host.delete();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn delete_gives_the_interface_back_after_a_killed_shim() {
    let (host, space, _outside) = sandbox("killed", "").await;
    let before = space.counts().await;
    let task = host.start().await;
    task.create(ctx(), &host.request()).await.unwrap();
    task.start(ctx(), &start_request(&host)).await.unwrap();
    assert_ne!(space.counts().await, before);
    let address = host.address();
    send_signal(host.recorded_pid("shim"), Signal::SIGKILL);
    host.delete();
    assert_eq!(space.counts().await, before);
    host.assert_clean(&address);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn so_does_it_in_a_namespace_that_docker_keeps() {
    let host = Host::new("kept").await;
    host.write_spec(&["/bin/sleep", "1000"]);
    let task = host.start().await;
    let pid = task.create(ctx(), &host.request()).await.unwrap().pid;
    // As Docker does it, which finds the namespace by the pid.
    let path = host.path("sandbox-key");
    std::fs::write(&path, "").unwrap();
    let none = None::<&str>;
    let of_the_task = format!("/proc/{pid}/ns/net");
    mount(Some(of_the_task.as_str()), &path, none, MsFlags::MS_BIND, none).unwrap();
    let _mounted = Mounted(&path);
    let (space, outside) = (Space::at(&path), Space::new());
    space.interface(&outside, "eth0", "10.1.1.2").await;
    let before = space.counts().await;
    task.start(ctx(), &start_request(&host)).await.unwrap();
    assert_eq!(space.counts().await, (before.0 + 1, before.1 + 2));
    send_signal(host.recorded_pid("shim"), Signal::SIGKILL);
    host.delete();
    assert_eq!(space.counts().await, before);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_second_sandbox_in_the_same_namespace_is_refused_clearly() {
    let (first, space, _outside) = sandbox("first", "").await;
    let one = first.start().await;
    one.create(ctx(), &first.request()).await.unwrap();
    let joined = space.counts().await;
    let second = Host::new("second").await;
    second.write_spec_in(&["/bin/true"], Some(&space.path()));
    let two = second.start().await;
    let (refused, message) = code(two.create(ctx(), &second.request()).await);
    assert_eq!(refused, Code::FAILED_PRECONDITION);
    assert!(message.contains("interface eth0: another virtual machine is joined to it"), "{message}");
    assert_eq!(space.counts().await, joined, "the first one's network is as it was");
    two.shutdown(ctx(), &ShutdownRequest::new()).await.unwrap();
    second.delete();
    end(&first, &one).await;
    one.shutdown(ctx(), &ShutdownRequest::new()).await.unwrap();
    first.delete();
}
