//! Asks containerd which image a container's root file system stands on. The connection
//! lasts for that question only.

use std::time::Duration;

use containerd_client::services::v1::GetContainerRequest;
use containerd_client::services::v1::snapshots::{MountsRequest, StatSnapshotRequest};
use containerd_client::tonic::Request as Call;
use containerd_client::{Client, with_namespace};

use super::Request;

/// containerd answers in milliseconds or is in trouble; the fallback needs it not.
const DEADLINE: Duration = Duration::from_secs(3);

/// The parent of the container's snapshot: for an unpacked image its chain id. `None` when
/// the container has no snapshot (Docker, `--rootfs`) or was given other mounts than its own.
pub(super) async fn chain_id(request: &Request<'_>) -> Result<Option<String>, String> {
    if request.mounts.is_empty() || request.containerd.is_empty() {
        return Ok(None);
    }
    tokio::time::timeout(DEADLINE, ask(request)).await.map_err(|_| "timed out".to_string())?
}

async fn ask(request: &Request<'_>) -> Result<Option<String>, String> {
    let path = request.containerd.trim_start_matches("unix://");
    let client = Client::from_path(path).await.map_err(|error| format!("connect to {path}: {error}"))?;
    let namespace = request.namespace;
    let get = GetContainerRequest { id: request.id.into() };
    let container = client
        .containers()
        .get(with_namespace_checked(get, namespace)?)
        .await
        .map_err(|status| format!("container {}: {status}", request.id))?;
    let Some(container) = container.into_inner().container else { return Ok(None) };
    if container.snapshotter.is_empty() || container.snapshot_key.is_empty() {
        return Ok(None);
    }
    let (snapshotter, key) = (container.snapshotter, container.snapshot_key);
    let mounts = MountsRequest { snapshotter: snapshotter.clone(), key: key.clone() };
    let mounts = client
        .snapshots()
        .mounts(with_namespace_checked(mounts, namespace)?)
        .await
        .map_err(|status| format!("mounts of snapshot {key}: {status}"))?
        .into_inner()
        .mounts;
    let same = mounts.len() == request.mounts.len()
        && mounts.iter().zip(request.mounts).all(|(theirs, given)| {
            theirs.r#type == given.type_ && theirs.source == given.source && theirs.options == given.options
        });
    if !same {
        return Ok(None);
    }
    let stat = StatSnapshotRequest { snapshotter, key: key.clone() };
    let info = client
        .snapshots()
        .stat(with_namespace_checked(stat, namespace)?)
        .await
        .map_err(|status| format!("snapshot {key}: {status}"))?
        .into_inner()
        .info;
    Ok(info.map(|info| info.parent))
}

/// The client crate's macro panics on a namespace that no header can carry.
fn with_namespace_checked<T>(message: T, namespace: &str) -> Result<Call<T>, String> {
    if !namespace.bytes().all(|byte| byte.is_ascii_graphic()) {
        return Err(format!("namespace {namespace:?} cannot be a header"));
    }
    Ok(stamp(message, namespace))
}

#[allow(clippy::unwrap_used)] // Inside the client crate's macro, after the check above.
fn stamp<T>(message: T, namespace: &str) -> Call<T> {
    use Call as Request;
    with_namespace!(message, namespace)
}
