//! The Files service for the `spore` command, on the socket of the Task service: each call goes
//! to the guest as it is, once the container is known to be there, and what comes back passes
//! `guest`. What is done here is done to the guest alone; no path of it is a path of the host.

use std::collections::HashMap;
use std::sync::Arc;

use async_trait::async_trait;
use spore_agent_api::v1::files::watch_event::Kind;
use spore_agent_api::v1::files::{
    LinkRequest, LinkResponse, ListRequest, ListResponse, MakeDirectoryRequest, MakeDirectoryResponse,
    ReadRequest, ReadResponse, RemoveRequest, RemoveResponse, RenameRequest, RenameResponse,
    SetAttributesRequest, SetAttributesResponse, StatRequest, StatResponse, WatchEvent, WatchRequest,
    WriteRequest, WriteResponse,
};
use spore_agent_api::v1::files_ttrpc::{self, create_files};
use tokio::sync::mpsc;
use tokio::sync::mpsc::error::TrySendError;
use ttrpc::r#async::{ServerStreamSender, Service, TtrpcContext};

use crate::container::Container;
use crate::error::Error;
use crate::guest::Watch;
use crate::sandbox::Sandbox;

/// Events that wait for a client which reads slowly. The guest never waits for it.
const WAITING_EVENTS: usize = 1024;

/// The method table.
pub(crate) fn service(sandbox: Arc<Sandbox>) -> HashMap<String, Service> {
    create_files(Arc::new(Files { sandbox }))
}

struct Files {
    sandbox: Arc<Sandbox>,
}

impl Files {
    /// The container; the guest is to be asked for it by the id that it has there.
    fn find(&self, id: &mut String) -> Result<Arc<Container>, Error> {
        let container = self.sandbox.container(id)?;
        id.clone_from(&container.guest_id);
        Ok(container)
    }
}

#[async_trait]
impl files_ttrpc::Files for Files {
    async fn stat(&self, _: &TtrpcContext, mut request: StatRequest) -> ttrpc::Result<StatResponse> {
        let container = self.find(&mut request.id)?;
        Ok(container
            .ask_files(&container.live(), "stat", |files, context| files.stat(context, &request))
            .await?)
    }

    async fn list(&self, _: &TtrpcContext, mut request: ListRequest) -> ttrpc::Result<ListResponse> {
        let container = self.find(&mut request.id)?;
        Ok(container
            .ask_files(&container.live(), "list", |files, context| files.list(context, &request))
            .await?)
    }

    async fn read(&self, _: &TtrpcContext, mut request: ReadRequest) -> ttrpc::Result<ReadResponse> {
        let container = self.find(&mut request.id)?;
        Ok(container
            .ask_files(&container.live(), "read", |files, context| files.read(context, &request))
            .await?)
    }

    async fn write(&self, _: &TtrpcContext, mut request: WriteRequest) -> ttrpc::Result<WriteResponse> {
        let container = self.find(&mut request.id)?;
        Ok(container
            .ask_files(&container.live(), "write", |files, context| files.write(context, &request))
            .await?)
    }

    async fn remove(&self, _: &TtrpcContext, mut request: RemoveRequest) -> ttrpc::Result<RemoveResponse> {
        let container = self.find(&mut request.id)?;
        Ok(container
            .ask_files(&container.live(), "remove", |files, context| files.remove(context, &request))
            .await?)
    }

    async fn rename(&self, _: &TtrpcContext, mut request: RenameRequest) -> ttrpc::Result<RenameResponse> {
        let container = self.find(&mut request.id)?;
        Ok(container
            .ask_files(&container.live(), "rename", |files, context| files.rename(context, &request))
            .await?)
    }

    async fn make_directory(
        &self,
        _: &TtrpcContext,
        mut request: MakeDirectoryRequest,
    ) -> ttrpc::Result<MakeDirectoryResponse> {
        let container = self.find(&mut request.id)?;
        let live = container.live();
        let ask = container
            .ask_files(&live, "make directory", |files, context| files.make_directory(context, &request));
        Ok(ask.await?)
    }

    async fn link(&self, _: &TtrpcContext, mut request: LinkRequest) -> ttrpc::Result<LinkResponse> {
        let container = self.find(&mut request.id)?;
        Ok(container
            .ask_files(&container.live(), "make link", |files, context| files.link(context, &request))
            .await?)
    }

    async fn set_attributes(
        &self,
        _: &TtrpcContext,
        mut request: SetAttributesRequest,
    ) -> ttrpc::Result<SetAttributesResponse> {
        let container = self.find(&mut request.id)?;
        let live = container.live();
        let ask = container
            .ask_files(&live, "set attributes", |files, context| files.set_attributes(context, &request));
        Ok(ask.await?)
    }

    async fn watch(
        &self,
        _: &TtrpcContext,
        mut request: WatchRequest,
        events: ServerStreamSender<WatchEvent>,
    ) -> ttrpc::Result<()> {
        let watch = self.find(&mut request.id)?.watch_files(&request).await?;
        let (sender, waiting) = mpsc::channel(WAITING_EVENTS);
        let queue = Queue { waiting: sender, lost: false };
        let (followed, ()) = tokio::join!(follow(watch, queue), deliver(waiting, events));
        Ok(followed?)
    }
}

/// Events on their way to a client. What it is too slow for is lost, which it is told.
struct Queue {
    waiting: mpsc::Sender<WatchEvent>,
    lost: bool,
}

impl Queue {
    fn put(&mut self, event: WatchEvent) {
        if self.lost {
            let overflow = WatchEvent { kind: Kind::OVERFLOW.into(), ..Default::default() };
            self.lost = self.waiting.try_send(overflow).is_err();
        }
        if !self.lost {
            self.lost = matches!(self.waiting.try_send(event), Err(TrySendError::Full(_)));
        }
    }
}

/// Puts what the guest tells into the queue until it ends or nobody takes it any more.
async fn follow(mut watch: Watch, mut queue: Queue) -> Result<(), Error> {
    loop {
        tokio::select! {
            biased;
            () = queue.waiting.closed() => return Ok(()),
            event = watch.next() => match event? {
                Some(event) => queue.put(event),
                None => return Ok(()),
            },
        }
    }
}

/// Delivers the queue in order. A client that is gone is noticed by the next event, which the
/// guest's sign of life is too.
async fn deliver(mut waiting: mpsc::Receiver<WatchEvent>, events: ServerStreamSender<WatchEvent>) {
    while let Some(event) = waiting.recv().await {
        if events.send(&event).await.is_err() {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_slow_client_misses_costs_no_memory_and_is_told() {
        let (sender, mut waiting) = mpsc::channel(2);
        let mut queue = Queue { waiting: sender, lost: false };
        let event = |cookie| WatchEvent { kind: Kind::MODIFIED.into(), cookie, ..Default::default() };
        let mut next = || waiting.try_recv().map(|event| (event.kind.unwrap(), event.cookie)).ok();
        for cookie in 1..=1000 {
            queue.put(event(cookie));
        }
        assert_eq!((next(), next(), next()), (Some((Kind::MODIFIED, 1)), Some((Kind::MODIFIED, 2)), None));
        queue.put(event(1001));
        assert_eq!((next(), next()), (Some((Kind::OVERFLOW, 0)), Some((Kind::MODIFIED, 1001))));
        queue.put(event(1002));
        assert_eq!((next(), next()), (Some((Kind::MODIFIED, 1002)), None));
    }
}
