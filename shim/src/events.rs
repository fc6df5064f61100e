//! Task events to containerd: one queue per shim, in order, none dropped while the shim
//! lives. A publisher that cannot reach containerd (restart, upgrade) keeps the event and
//! tries again.

use std::time::Duration;

use containerd_shim::event::Event;
use containerd_shim::protos::protobuf::MessageDyn;
use containerd_shim::util::{convert_to_any, timestamp};
use containerd_shim_protos::api::{Empty, ForwardRequest};
use containerd_shim_protos::shim::event::Envelope;
use slog::{Logger, debug, error, warn};
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, sleep, timeout_at};
use ttrpc::r#async::Client;
use ttrpc::context::with_duration;

/// One attempt's time.
const FORWARD_TIMEOUT: Duration = Duration::from_secs(5);
const FIRST_RETRY: Duration = Duration::from_millis(50);
const LONGEST_RETRY: Duration = Duration::from_secs(2);

enum Item {
    Publish(Box<Envelope>),
    Flush(oneshot::Sender<()>),
}

/// The sending end of the queue. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Events {
    namespace: String,
    queue: mpsc::UnboundedSender<Item>,
    log: Logger,
}

impl Events {
    /// Starts the publisher; `address` is containerd's ttrpc socket (`TTRPC_ADDRESS`).
    pub(crate) fn start(address: String, namespace: String, log: Logger) -> Self {
        let (queue, receiver) = mpsc::unbounded_channel();
        tokio::spawn(publish(address, receiver, log.clone()));
        Self { namespace, queue, log }
    }

    pub(crate) fn namespace(&self) -> &str {
        &self.namespace
    }

    /// Queues an event. Its time is now, whenever it is delivered.
    pub(crate) fn send<E: Event + MessageDyn>(&self, event: E) {
        let topic = event.topic();
        let envelope = timestamp().and_then(|timestamp| {
            Ok(Envelope {
                timestamp: Some(timestamp).into(),
                namespace: self.namespace.clone(),
                topic: topic.clone(),
                event: Some(convert_to_any(Box::new(event))?).into(),
                ..Default::default()
            })
        });
        match envelope {
            Ok(envelope) => {
                debug!(self.log, "event queued"; "topic" => topic);
                let _ = self.queue.send(Item::Publish(Box::new(envelope)));
            }
            Err(cause) => error!(self.log, "event cannot be encoded"; "topic" => topic, "error" => %cause),
        }
    }

    /// Waits until every event queued so far is delivered, at most `deadline`.
    pub(crate) async fn flush(&self, deadline: Duration) -> bool {
        let (done, wait) = oneshot::channel();
        let _ = self.queue.send(Item::Flush(done));
        matches!(tokio::time::timeout(deadline, wait).await, Ok(Ok(())))
    }
}

async fn publish(address: String, mut queue: mpsc::UnboundedReceiver<Item>, log: Logger) {
    let mut client = None;
    while let Some(item) = queue.recv().await {
        match item {
            Item::Flush(done) => drop(done.send(())),
            Item::Publish(envelope) => deliver(&address, &mut client, *envelope, &log).await,
        }
    }
}

async fn deliver(address: &str, client: &mut Option<Client>, envelope: Envelope, log: &Logger) {
    let topic = envelope.topic.clone();
    let mut request = ForwardRequest::new();
    request.envelope = Some(envelope).into();
    let mut pause = FIRST_RETRY;
    loop {
        match attempt(address, client, &request).await {
            Ok(()) => return,
            Err(cause) => {
                // The connection is in doubt after any failure.
                *client = None;
                warn!(log, "event not delivered, trying again";
                    "topic" => &topic, "address" => address, "error" => %cause, "pause_ms" => pause.as_millis());
            }
        }
        sleep(pause).await;
        pause = (pause * 2).min(LONGEST_RETRY);
    }
}

async fn attempt(
    address: &str,
    client: &mut Option<Client>,
    request: &ForwardRequest,
) -> Result<(), ttrpc::Error> {
    let deadline = Instant::now() + FORWARD_TIMEOUT;
    let connected = match client.take() {
        Some(connected) => connected,
        None => {
            let address =
                if address.contains("://") { address.to_string() } else { format!("unix://{address}") };
            Client::connect(&address).await?
        }
    };
    let events = containerd_shim_protos::shim_async::EventsClient::new(connected.clone());
    let forward = events.forward(with_duration(FORWARD_TIMEOUT), request);
    let _: Empty =
        timeout_at(deadline, forward).await.map_err(|_| ttrpc::Error::Others("timed out".into()))??;
    *client = Some(connected);
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};

    use async_trait::async_trait;
    use containerd_shim_protos::events::task::{TaskCreate, TaskDelete, TaskExit, TaskStart};
    use containerd_shim_protos::shim_async::{Events as EventsService, create_events};
    use ttrpc::r#async::{Server, TtrpcContext};

    use super::*;

    struct Containerd {
        seen: mpsc::UnboundedSender<(String, String)>,
        refuse_once: AtomicBool,
    }

    #[async_trait]
    impl EventsService for Containerd {
        async fn forward(&self, _: &TtrpcContext, request: ForwardRequest) -> ttrpc::Result<Empty> {
            if self.refuse_once.swap(false, Ordering::SeqCst) {
                return Err(ttrpc::Error::Others("not now".into()));
            }
            let envelope = request.envelope.unwrap();
            let _ = self.seen.send((envelope.topic, envelope.event.unwrap().type_url));
            Ok(Empty::new())
        }
    }

    async fn serve(path: &Path, seen: mpsc::UnboundedSender<(String, String)>) -> Server {
        let service = create_events(Arc::new(Containerd { seen, refuse_once: AtomicBool::new(true) }));
        let mut server =
            Server::new().bind(&format!("unix://{}", path.display())).unwrap().register_service(service);
        server.start().await.unwrap();
        server
    }

    fn life() -> [&'static str; 4] {
        ["/tasks/create", "/tasks/start", "/tasks/exit", "/tasks/delete"]
    }

    fn publish_life(events: &Events) {
        events.send(TaskCreate::new());
        events.send(TaskStart::new());
        events.send(TaskExit::new());
        events.send(TaskDelete::new());
    }

    async fn topics(seen: &mut mpsc::UnboundedReceiver<(String, String)>, count: usize) -> Vec<String> {
        let mut topics = Vec::new();
        while topics.len() < count {
            let next = tokio::time::timeout(Duration::from_secs(20), seen.recv()).await;
            topics.push(next.expect("an event before the deadline").unwrap().0);
        }
        topics
    }

    #[tokio::test]
    async fn events_arrive_in_order_across_refusals_and_a_restart_of_containerd() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ttrpc");
        let (sender, mut seen) = mpsc::unbounded_channel();
        let log = Logger::root(slog::Discard, slog::o!());
        let events = Events::start(path.display().to_string(), "default".into(), log);
        // containerd is not there yet.
        publish_life(&events);
        let mut server = serve(&path, sender.clone()).await;
        assert_eq!(topics(&mut seen, 4).await, life());
        server.shutdown().await.unwrap();
        std::fs::remove_file(&path).unwrap();
        publish_life(&events);
        assert!(!events.flush(Duration::from_millis(100)).await, "nobody to deliver to");
        let _server = serve(&path, sender).await;
        assert_eq!(topics(&mut seen, 4).await, life());
        assert!(events.flush(Duration::from_secs(20)).await);
    }

    #[tokio::test]
    async fn type_names_are_bare_as_containerd_expects() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ttrpc");
        let (sender, mut seen) = mpsc::unbounded_channel();
        let _server = serve(&path, sender).await;
        let log = Logger::root(slog::Discard, slog::o!());
        let events = Events::start(path.display().to_string(), "default".into(), log);
        events.send(TaskExit::new());
        let next = tokio::time::timeout(Duration::from_secs(20), seen.recv()).await.unwrap().unwrap();
        assert_eq!(next, ("/tasks/exit".into(), "containerd.events.TaskExit".into()));
    }
}
