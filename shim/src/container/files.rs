//! The container's files: what the guest's file service is asked.

use spore_agent_api::v1::files::WatchRequest;
use spore_agent_api::v1::files_ttrpc::FilesClient;
use ttrpc::context::Context;

use super::{Container, Live};
use crate::error::Error;
use crate::guest::{Guest, Watch};

const PHASE: &str = "asking for files";

impl Container {
    /// Asks the guest, unless the container has ended.
    pub(crate) async fn ask_files<'a, T, F>(
        &self,
        live: &'a Live,
        call: &'static str,
        ask: impl FnOnce(&'a FilesClient, Context) -> F,
    ) -> Result<T, Error>
    where
        F: Future<Output = ttrpc::Result<T>>,
    {
        self.alive("reach the files of")?;
        let (files, context) = live.guest.files();
        let answer = ask(files, context);
        live.ask(PHASE, async { Guest::answered(call, answer.await) }).await
    }

    pub(crate) async fn watch_files(&self, request: &WatchRequest) -> Result<Watch, Error> {
        let live = self.live();
        self.alive("watch the files of")?;
        live.ask(PHASE, live.guest.watch(request)).await
    }
}
