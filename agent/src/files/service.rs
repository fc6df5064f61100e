//! The Files service: decodes, runs the work on worker threads, encodes.

use std::sync::Arc;

use async_trait::async_trait;
use protobuf::MessageField;
use spore_agent_api::v1::files as pb;
use spore_agent_api::v1::files::write_request;
use spore_agent_api::v1::files_ttrpc;
use tokio::sync::Semaphore;
use ttrpc::r#async::{ServerStreamSender, TtrpcContext};

use super::attributes::{self, Changes};
use super::content::{self, Create, Write};
use super::root::Root;
use super::{list, tree, watch};
use crate::container::blocking;
use crate::container::registry::Registry;
use crate::error::{AgentError, Result};
use crate::service::status;

/// Calls that are worked on at a time. There are few worker threads, and a file system that
/// hangs must leave some of them to the containers' lives.
const AT_A_TIME: usize = 2;
/// Watches of all containers together.
const MAX_WATCHES: usize = 32;

pub struct Files {
    registry: Arc<Registry>,
    turns: Arc<Semaphore>,
    watches: Arc<Semaphore>,
}

impl Files {
    pub fn new(registry: Arc<Registry>) -> Self {
        let semaphore = |permits| Arc::new(Semaphore::new(permits));
        Self { registry, turns: semaphore(AT_A_TIME), watches: semaphore(MAX_WATCHES) }
    }

    /// Does something below a container's root. Once begun it goes on to its end.
    async fn inside<T: Send + 'static>(
        &self,
        id: &str,
        work: impl FnOnce(&Root) -> Result<T> + Send + 'static,
    ) -> ttrpc::Result<T> {
        let container = self.registry.find(id).map_err(status)?;
        let turn = Arc::clone(&self.turns).acquire_owned().await;
        let turn = turn.map_err(|error| status(AgentError::internal("files", error)))?;
        let done = blocking(move || {
            let _turn = turn;
            work(&Root::of(&container)?)
        });
        done.await.map_err(status)
    }
}

fn owner(owner: MessageField<pb::Owner>) -> Option<(u32, u32)> {
    owner.into_option().map(|owner| (owner.uid, owner.gid))
}

#[async_trait]
impl files_ttrpc::Files for Files {
    async fn stat(&self, _: &TtrpcContext, request: pb::StatRequest) -> ttrpc::Result<pb::StatResponse> {
        let (path, follow) = (request.path, request.follow);
        let found = self.inside(&request.id, move |root| attributes::stat(root, &path, follow)).await?;
        let (attributes, target) = found;
        Ok(pb::StatResponse { attributes: Some(attributes).into(), target, ..Default::default() })
    }

    async fn list(&self, _: &TtrpcContext, request: pb::ListRequest) -> ttrpc::Result<pb::ListResponse> {
        let pb::ListRequest { path, after, limit, .. } = request;
        let (entries, more) =
            self.inside(&request.id, move |root| list::list(root, &path, &after, limit)).await?;
        Ok(pb::ListResponse { entries, more, ..Default::default() })
    }

    async fn read(&self, _: &TtrpcContext, request: pb::ReadRequest) -> ttrpc::Result<pb::ReadResponse> {
        let pb::ReadRequest { path, offset, length, skip_hole, .. } = request;
        let work = move |root: &Root| content::read(root, &path, offset, length, skip_hole);
        let piece = self.inside(&request.id, work).await?;
        Ok(pb::ReadResponse {
            offset: piece.offset,
            data: piece.data,
            end: piece.end,
            device: piece.identity.0,
            inode: piece.identity.1,
            ..Default::default()
        })
    }

    async fn write(&self, _: &TtrpcContext, request: pb::WriteRequest) -> ttrpc::Result<pb::WriteResponse> {
        let create = match request.create.enum_value() {
            Ok(write_request::Create::NEVER) => Create::Never,
            Ok(write_request::Create::IF_MISSING) => Create::IfMissing,
            Ok(write_request::Create::ALWAYS) => Create::Always,
            Err(unknown) => {
                let message = format!("write: create is {unknown}, 0 to 2 are allowed");
                return Err(status(AgentError::InvalidArgument(message)));
            }
        };
        let write = Write {
            path: request.path,
            offset: request.offset,
            data: request.data,
            create,
            mode: request.mode,
            owner: owner(request.owner).unwrap_or_default(),
            size: request.size.into_option().map(|size| size.bytes),
        };
        let (device, inode) = self.inside(&request.id, move |root| content::write(root, &write)).await?;
        Ok(pb::WriteResponse { device, inode, ..Default::default() })
    }

    async fn remove(
        &self,
        _: &TtrpcContext,
        request: pb::RemoveRequest,
    ) -> ttrpc::Result<pb::RemoveResponse> {
        let (path, recursive) = (request.path, request.recursive);
        let removed = self.inside(&request.id, move |root| tree::remove(root, &path, recursive)).await?;
        Ok(pb::RemoveResponse { removed: removed.count, done: removed.done, ..Default::default() })
    }

    async fn rename(
        &self,
        _: &TtrpcContext,
        request: pb::RenameRequest,
    ) -> ttrpc::Result<pb::RenameResponse> {
        let pb::RenameRequest { from, to, replace, .. } = request;
        self.inside(&request.id, move |root| tree::rename(root, &from, &to, replace)).await?;
        Ok(pb::RenameResponse::default())
    }

    async fn make_directory(
        &self,
        _: &TtrpcContext,
        request: pb::MakeDirectoryRequest,
    ) -> ttrpc::Result<pb::MakeDirectoryResponse> {
        let pb::MakeDirectoryRequest { path, mode, parents, .. } = request;
        let work = move |root: &Root| tree::make_directory(root, &path, mode, parents);
        let made = self.inside(&request.id, work).await?;
        Ok(pb::MakeDirectoryResponse { made, ..Default::default() })
    }

    async fn link(&self, _: &TtrpcContext, request: pb::LinkRequest) -> ttrpc::Result<pb::LinkResponse> {
        let pb::LinkRequest { path, target, .. } = request;
        self.inside(&request.id, move |root| tree::link(root, &path, &target)).await?;
        Ok(pb::LinkResponse::default())
    }

    async fn set_attributes(
        &self,
        _: &TtrpcContext,
        request: pb::SetAttributesRequest,
    ) -> ttrpc::Result<pb::SetAttributesResponse> {
        let (path, follow) = (request.path, request.follow);
        let changes = Changes {
            owner: owner(request.owner),
            mode: request.mode.into_option().map(|mode| mode.bits),
            times: request.times.into_option().map(|times| (times.accessed_ns, times.modified_ns)),
        };
        self.inside(&request.id, move |root| attributes::change(root, &path, follow, changes)).await?;
        Ok(pb::SetAttributesResponse::default())
    }

    async fn watch(
        &self,
        _: &TtrpcContext,
        request: pb::WatchRequest,
        events: ServerStreamSender<pb::WatchEvent>,
    ) -> ttrpc::Result<()> {
        let container = self.registry.find(&request.id).map_err(status)?;
        let _one = Arc::clone(&self.watches).try_acquire_owned().map_err(|_| {
            let message =
                format!("watch: {MAX_WATCHES} watches are under way in this guest, no more are allowed");
            status(AgentError::FailedPrecondition(message))
        })?;
        let events = Arc::new(events);
        let tell = move |event: pb::WatchEvent| {
            let events = Arc::clone(&events);
            async move { events.send(&event).await.is_ok() }
        };
        watch::run(container, request.path, request.recursive, tell).await.map_err(status)
    }
}
