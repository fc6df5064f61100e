//! The file service of the shim: relayed to the guest for a container that is there, and no
//! further. With the fake VMM and agent of `support`.

#![allow(clippy::unwrap_used)]

mod support;

use containerd_shim_protos::api::ShutdownRequest;
use spore_agent_api::v1::files::watch_event::Kind;
use spore_agent_api::v1::files::{StatRequest, WatchRequest};
use spore_agent_api::v1::files_ttrpc::FilesClient;
use ttrpc::Code;
use ttrpc::r#async::Client;

use support::host::{DEADLINE, Host, code, ctx, delete_request, kill_request, start_request, wait_request};

/// Not a test: the process that the shim starts as its VMM.
#[test]
#[ignore = "the fake VMM, started by the shim under test"]
fn fake_vmm() {
    support::fake_vmm();
}

fn stat(id: &str, path: &[u8]) -> StatRequest {
    StatRequest { id: id.into(), path: path.into(), ..Default::default() }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn files_are_the_guests_while_the_container_is_there() {
    let host = Host::new("files").await;
    host.write_spec(&["/bin/sleep", "1000"]);
    let task = host.start().await;
    let files = FilesClient::new(Client::connect(&host.address()).await.unwrap());
    let id = host.id.clone();
    let missing = (Code::NOT_FOUND, "container not created: not found".to_string());
    assert_eq!(code(files.stat(ctx(), &stat(&id, b"/x")).await), missing);

    task.create(ctx(), &host.request()).await.unwrap();
    let answer = files.stat(ctx(), &stat(&id, b"/created")).await.unwrap();
    assert_eq!(answer.attributes.size, 8);
    assert_eq!(code(files.stat(ctx(), &stat("another", b"/x")).await), missing);
    task.start(ctx(), &start_request(&host)).await.unwrap();
    let refused = code(files.stat(ctx(), &stat(&id, support::HOSTILE)).await);
    assert_eq!(refused, (Code::NOT_FOUND, "guest agent: stat: no [2Jsuch file".into()));

    // The first events arrive while the stream goes on.
    let request = WatchRequest { id: id.clone(), path: b"/w".into(), ..Default::default() };
    let mut events = files.watch(ctx(), &request).await.unwrap();
    for kind in [Kind::WATCHING, Kind::MODIFIED] {
        let event = tokio::time::timeout(DEADLINE, events.recv()).await.unwrap().unwrap().unwrap();
        assert_eq!((event.kind.unwrap(), event.path.as_slice()), (kind, &b"/w"[..]));
    }

    task.kill(ctx(), &kill_request(&host, 9)).await.unwrap();
    task.wait(ctx(), &wait_request(&host)).await.unwrap();
    let stopped = code(files.stat(ctx(), &stat(&id, b"/x")).await);
    assert_eq!(stopped.0, Code::FAILED_PRECONDITION);
    assert!(stopped.1.contains("cannot reach the files of a stopped container"), "{}", stopped.1);
    task.delete(ctx(), &delete_request(&host)).await.unwrap();
    let address = host.address();
    task.shutdown(ctx(), &ShutdownRequest::new()).await.unwrap();
    host.delete();
    host.assert_clean(&address);
}
