//! Tasks that shall be clones: what is refused is refused before anything is made, and the shim goes on. With the fake VMM and
//! agent of `support`; clones that run are in `tests/e2e`.

#![allow(clippy::unwrap_used)]

mod support;

use containerd_shim_protos::api::{CreateTaskRequest, ShutdownRequest};
use containerd_shim_spore::snapshot::manifest::Purpose;
use containerd_shim_spore::snapshot::{Manifest, Store};
use serde_json::{Value, json};
use ttrpc::Code;

use support::host::{Host, code, ctx, delete_request};

/// Not a test: the process that the shim starts as its VMM.
#[test]
#[ignore = "the fake VMM, started by the shim under test"]
fn fake_vmm() {
    support::fake_vmm();
}

fn shall_be_clone_of(host: &Host, wanted: &str) {
    let path = host.path("bundle/config.json");
    let mut spec: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    spec["annotations"] = json!({ "io.spore.clone-from": wanted });
    std::fs::write(path, spec.to_string()).unwrap();
}

fn snapshot(store: &Store, purpose: Purpose, namespace: &str, name: Option<&str>) -> String {
    let mut draft = store.begin().unwrap();
    draft.state(b"the machine's state").unwrap();
    let about = Manifest { name: name.map(str::to_owned), ..Manifest::about(purpose, namespace, "web") };
    draft.publish(about).unwrap().id.to_string()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_cannot_be_cloned_is_refused_and_leaves_nothing() {
    let host = Host::new("clone").await;
    let store = Store::new(&host.path("state"));
    let task = host.start().await;
    let elsewhere = snapshot(&store, Purpose::Snapshot, "other", Some("elsewhere"));
    let bare = snapshot(&store, Purpose::Snapshot, "test", None);
    snapshot(&store, Purpose::Template, "other", Some("warm"));
    let request = host.request();
    let both = CreateTaskRequest { checkpoint: "/x".into(), ..host.request() };
    for (wanted, request, expected, part) in [
        ("no-such", &request, Code::NOT_FOUND, "snapshot \"no-such\": there is none in "),
        ("../../etc", &request, Code::NOT_FOUND, "snapshot \"../../etc\": there is none in "),
        ("", &request, Code::NOT_FOUND, "snapshot \"\": there is none in "),
        (&elsewhere[..12], &request, Code::FAILED_PRECONDITION, "of a container in namespace \"other\""),
        // An archive may have brought the name.
        ("elsewhere", &request, Code::NOT_FOUND, "snapshot \"elsewhere\": there is none in "),
        // No machine's, which is found out for one's own and for templates of others.
        (&bare, &request, Code::INVALID_ARGUMENT, "it is no container's"),
        ("warm", &request, Code::INVALID_ARGUMENT, "it is no container's"),
        (&bare, &both, Code::INVALID_ARGUMENT, "it can be from one thing only"),
    ] {
        shall_be_clone_of(&host, wanted);
        let (found, message) = code(task.create(ctx(), request).await);
        assert_eq!(found, expected, "{wanted}: {message}");
        assert!(message.starts_with("annotation io.spore.clone-from: "), "{message}");
        assert!(message.contains(part), "{wanted}: {message}");
        let record = std::fs::read(host.path("run/test/clone/processes.json")).unwrap();
        let record: Value = serde_json::from_slice(&record).unwrap();
        assert!(record["vmm"].is_null() && record["holder"].is_null(), "{wanted}: {record}");
    }
    host.write_spec(&["/bin/true"]);
    task.create(ctx(), &request).await.unwrap();
    task.delete(ctx(), &delete_request(&host)).await.unwrap();
    let address = host.address();
    task.shutdown(ctx(), &ShutdownRequest::new()).await.unwrap();
    host.delete();
    host.assert_clean(&address);
}
