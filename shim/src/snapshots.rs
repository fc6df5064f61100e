//! The Snapshots service for the `spore` command, on the socket of the Task service: decodes, delegates to the container,
//! encodes.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use ttrpc::r#async::{Service, TtrpcContext};

use crate::api::v1::snapshots::create_request::Wait;
use crate::api::v1::snapshots::{
    CreateRequest, CreateResponse, EndZygoteRequest, EndZygoteResponse, HibernateRequest, HibernateResponse,
    ResumeRequest, ResumeResponse, RollbackRequest, RollbackResponse, ZygoteRequest, ZygoteResponse,
};
use crate::api::v1::snapshots_ttrpc::{self, create_snapshots};
use crate::error::Error;
use crate::sandbox::Sandbox;
use crate::snapshot::manifest::Purpose;
use crate::snapshot::{ManifestError, SnapshotId};
use crate::task::to_the_end;

/// The method table.
pub(crate) fn service(sandbox: Arc<Sandbox>) -> HashMap<String, Service> {
    create_snapshots(Arc::new(Snapshots { sandbox }))
}

struct Snapshots {
    sandbox: Arc<Sandbox>,
}

fn ns(spent: Duration) -> u64 {
    u64::try_from(spent.as_nanos()).unwrap_or(u64::MAX)
}

#[async_trait]
impl snapshots_ttrpc::Snapshots for Snapshots {
    async fn create(&self, _: &TtrpcContext, request: CreateRequest) -> ttrpc::Result<CreateResponse> {
        let wait = request.wait.enum_value().map_err(|number| {
            Error::Invalid(format!("snapshot of container {}: there is no wait {number}", request.id))
        })?;
        let container = self.sandbox.container(&request.id)?;
        let store = self.sandbox.store();
        let purpose = if request.passing { Purpose::Checkpoint } else { Purpose::Snapshot };
        let underway =
            to_the_end("snapshot", async move { container.snapshot(store, purpose).await }).await?;
        let answer = CreateResponse {
            snapshot: underway.id.to_string(),
            stood_ns: ns(underway.stood),
            pause_ns: underway.times.pause_ns,
            quiesce_ns: underway.times.quiesce_ns,
            save_ns: underway.times.save_ns,
            fork_ns: underway.times.fork_ns,
            switch_ns: underway.times.switch_ns,
            ..Default::default()
        };
        if wait == Wait::DURABLE {
            underway.written().await?;
        }
        Ok(answer)
    }

    async fn zygote(&self, _: &TtrpcContext, request: ZygoteRequest) -> ttrpc::Result<ZygoteResponse> {
        let container = self.sandbox.container(&request.id)?;
        let sandbox = Arc::clone(&self.sandbox);
        let waiting = to_the_end("zygote", async move { container.zygote(sandbox.id()).await }).await?;
        Ok(ZygoteResponse {
            zygote: waiting.address,
            stood_ns: ns(waiting.stood),
            pause_ns: waiting.times.pause_ns,
            ..Default::default()
        })
    }

    async fn end_zygote(
        &self,
        _: &TtrpcContext,
        request: EndZygoteRequest,
    ) -> ttrpc::Result<EndZygoteResponse> {
        self.sandbox.container(&request.id)?.end_zygote(&request.zygote)?;
        Ok(EndZygoteResponse::new())
    }

    async fn rollback(&self, _: &TtrpcContext, request: RollbackRequest) -> ttrpc::Result<RollbackResponse> {
        let to: SnapshotId = request.snapshot.parse().map_err(|error: ManifestError| {
            Error::Invalid(format!("rollback of container {}: {error}", request.id))
        })?;
        let sandbox = Arc::clone(&self.sandbox);
        let times = to_the_end("rollback", async move { sandbox.rollback(&request.id, to).await }).await?;
        Ok(RollbackResponse {
            total_ns: ns(times.total),
            gap_ns: ns(times.gap),
            restore_ns: ns(times.restore),
            agent_ns: ns(times.agent),
            network_ns: ns(times.network),
            streams_ns: ns(times.streams),
            disk_ns: ns(times.disk),
            thaw_ns: ns(times.thaw),
            ..Default::default()
        })
    }

    async fn hibernate(
        &self,
        _: &TtrpcContext,
        request: HibernateRequest,
    ) -> ttrpc::Result<HibernateResponse> {
        let sandbox = Arc::clone(&self.sandbox);
        let done = to_the_end("hibernate", async move { sandbox.hibernate(&request.id).await }).await?;
        Ok(HibernateResponse {
            snapshot: done.snapshot.to_string(),
            total_ns: ns(done.total),
            rest_ns: ns(done.rest),
            save_ns: ns(done.save),
            write_ns: ns(done.write),
            ..Default::default()
        })
    }

    async fn resume(&self, _: &TtrpcContext, request: ResumeRequest) -> ttrpc::Result<ResumeResponse> {
        let sandbox = Arc::clone(&self.sandbox);
        let woken = to_the_end("resume", async move { sandbox.resume(&request.id).await }).await?;
        let times = woken.unwrap_or_default();
        Ok(ResumeResponse {
            total_ns: ns(times.total),
            restore_ns: ns(times.restore),
            agent_ns: ns(times.agent),
            network_ns: ns(times.network),
            streams_ns: ns(times.streams),
            disk_ns: ns(times.disk),
            ..Default::default()
        })
    }
}
