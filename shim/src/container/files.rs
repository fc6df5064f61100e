//! The container's files: what the guest's file service is asked.

use spore_agent_api::v1::files::WatchRequest;
use spore_agent_api::v1::files_ttrpc::FilesClient;
use ttrpc::context::Context;

use super::{Container, with_vm};
use crate::error::Error;
use crate::guest::{Guest, Watch};

const PHASE: &str = "asking for files";

impl Container {
    /// Asks the guest, unless the container has ended.
    pub(crate) async fn ask_files<'a, T, F>(
        &'a self,
        call: &'static str,
        ask: impl FnOnce(&'a FilesClient, Context) -> F,
    ) -> Result<T, Error>
    where
        F: Future<Output = ttrpc::Result<T>>,
    {
        self.alive("reach the files of")?;
        let (files, context) = self.guest.files();
        let answer = ask(files, context);
        with_vm(&self.vm, PHASE, async { Guest::answered(call, answer.await) }).await
    }

    pub(crate) async fn watch_files(&self, request: &WatchRequest) -> Result<Watch, Error> {
        self.alive("watch the files of")?;
        with_vm(&self.vm, PHASE, self.guest.watch(request)).await
    }
}
