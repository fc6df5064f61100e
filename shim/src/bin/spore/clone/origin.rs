//! What clones begin with.

use std::time::{Duration, Instant};

use containerd_shim_spore::api::v1::snapshots::{EndZygoteRequest, ZygoteRequest, ZygoteResponse};
use containerd_shim_spore::api::v1::snapshots_ttrpc::SnapshotsClient;
use containerd_shim_spore::snapshot::SnapshotId;
use ttrpc::context::Context;

use crate::failure::Failure;
use crate::remote::shim_of;
use crate::{Global, progress, show};

pub(super) enum Origin {
    /// A given one, which stays.
    Snapshot(SnapshotId),
    /// What the source is now.
    Zygote {
        address: String,
        /// For how long the source stood still.
        stood: Duration,
        /// From the request on.
        took: Duration,
    },
}

impl Origin {
    /// The snapshot or template that is wanted, if one is, of this container; else a zygote of it.
    pub(super) async fn find(global: &Global, source: &str, wanted: Option<&str>) -> Result<Self, Failure> {
        match wanted {
            Some(wanted) => snapshot(global, source, wanted).map(Self::Snapshot),
            None => zygote(global, source).await,
        }
    }

    /// For the annotation.
    pub(super) fn named(&self) -> String {
        match self {
            Self::Snapshot(id) => id.to_string(),
            Self::Zygote { address, .. } => address.clone(),
        }
    }

    /// Nobody needs it any more.
    pub(super) async fn end(&self, global: &Global, source: &str) {
        let Self::Zygote { address, .. } = self else { return };
        if let Err(error) = end(global, source, address).await {
            // Its container may have ended meanwhile.
            eprintln!("spore: warning: the zygote of {source} ends within a minute by itself: {error}");
        }
    }
}

fn snapshot(global: &Global, source: &str, wanted: &str) -> Result<SnapshotId, Failure> {
    let store = crate::snapshot::store()?;
    let id = store.find(wanted)?;
    let opened = store.open(id)?;
    let (container, namespace) = (&opened.manifest.container, &opened.manifest.namespace);
    if (container.as_str(), namespace) != (source, &global.namespace) {
        return Err(Failure::Refused(format!(
            "snapshot {id}: it is of container \"{}\" in namespace \"{}\", not of \"{source}\"; clone that one, or create a container with the annotation {}",
            show::name(container.as_bytes()),
            show::name(namespace.as_bytes()),
            containerd_shim_spore::CLONE_FROM
        )));
    }
    Ok(id)
}

async fn zygote(global: &Global, source: &str) -> Result<Origin, Failure> {
    let begun = Instant::now();
    let what = format!("forking a zygote of {source}");
    let anyway = format!("a zygote of {source} may be there, and ends by itself within a minute");
    let answer = progress::answered(ask(global, source), &what, &anyway).await??;
    Ok(Origin::Zygote {
        address: answer.zygote,
        stood: Duration::from_nanos(answer.stood_ns),
        took: begun.elapsed(),
    })
}

/// Has the container's shim fork one, without a word.
pub(crate) async fn ask(global: &Global, container: &str) -> Result<ZygoteResponse, Failure> {
    let client = SnapshotsClient::new(shim_of(global, container).await?);
    let request = ZygoteRequest { id: container.into(), ..Default::default() };
    client.zygote(Context::default(), &request).await.map_err(|error| Failure::of_shim(container, error))
}

/// Has it end, which its clones do not notice.
pub(crate) async fn end(global: &Global, container: &str, zygote: &str) -> Result<(), Failure> {
    let client = SnapshotsClient::new(shim_of(global, container).await?);
    let request = EndZygoteRequest { id: container.into(), zygote: zygote.into(), ..Default::default() };
    let answer = client.end_zygote(Context::default(), &request).await;
    answer.map(drop).map_err(|error| Failure::of_shim(container, error))
}
