//! `spore snapshot ls`.

use containerd_shim_spore::clean;
use containerd_shim_spore::snapshot::{Entry, Size, SnapshotId, StoreError};
use indicatif::BinaryBytes;
use serde_json::{Value, json};

use crate::Global;
use crate::failure::Failure;
use crate::show;

pub(super) fn run(global: &Global) -> Result<(), Failure> {
    let store = super::store()?;
    let listing = store.list()?;
    let sized: Vec<_> = listing.entries.iter().map(|entry| (entry, store.size(entry.manifest.id))).collect();
    let broken: Vec<_> = listing.broken.iter().map(|(id, error)| (id, store.size(*id), error)).collect();
    if global.json {
        let good = sized.iter().map(|(entry, size)| as_json(entry, *size));
        let bad = broken.iter().map(|(id, size, error)| broken_json(**id, *size, error));
        return show::json(&good.chain(bad).collect());
    }
    let heading = ["SNAPSHOT", "CONTAINER", "NAMESPACE", "CREATED", "OWN", "SHARED", "PURPOSE"];
    let mut table = vec![heading.map(str::to_owned).to_vec()];
    table.extend(sized.iter().map(|(entry, size)| row(entry, *size)));
    for (id, size, _) in &broken {
        let [own, shared] = human(*size);
        let none = || "-".to_owned();
        table.push(vec![id.to_string(), none(), none(), none(), own, shared, "broken".into()]);
    }
    show::table(&table)?;
    for (_, _, error) in &broken {
        eprintln!("spore: warning: {}", clean(&error.to_string()));
    }
    Ok(())
}

fn human(size: Size) -> [String; 2] {
    [size.own, size.shared].map(|bytes| BinaryBytes(bytes).to_string())
}

fn row(entry: &Entry, size: Size) -> Vec<String> {
    let manifest = &entry.manifest;
    let seconds = i64::try_from(manifest.created).unwrap_or(i64::MAX);
    let [own, shared] = human(size);
    vec![
        manifest.id.to_string(),
        show::name(manifest.container.as_bytes()),
        show::name(manifest.namespace.as_bytes()),
        show::time(seconds.saturating_mul(1_000_000_000)),
        own,
        shared,
        manifest.purpose.name().into(),
    ]
}

fn as_json(entry: &Entry, size: Size) -> Value {
    let manifest = &entry.manifest;
    json!({
        "id": manifest.id,
        "container": manifest.container,
        "namespace": manifest.namespace,
        "created": manifest.created,
        "own_bytes": size.own,
        "shared_bytes": size.shared,
        "purpose": manifest.purpose.name(),
    })
}

fn broken_json(id: SnapshotId, size: Size, error: &StoreError) -> Value {
    let broken = error.to_string();
    json!({ "id": id, "own_bytes": size.own, "shared_bytes": size.shared, "broken": broken })
}

#[cfg(test)]
mod tests {
    use containerd_shim_spore::snapshot::Manifest;
    use containerd_shim_spore::snapshot::manifest::Purpose;

    use super::*;

    #[test]
    fn a_row_tells_what_the_manifest_says_and_drives_no_terminal() {
        let mut manifest = Manifest::about(Purpose::Snapshot, "default", "web\u{202e}");
        manifest.created = 951_827_696;
        let entry = Entry { manifest, arrived: std::time::SystemTime::UNIX_EPOCH };
        let size = Size { own: 3 << 20, shared: 0 };
        let cells = row(&entry, size);
        assert_eq!(
            cells[1..],
            ["web\\u{202e}", "default", "2000-02-29T12:34:56Z", "3.00 MiB", "0 B", "snapshot"]
        );
        let value = as_json(&entry, size);
        assert_eq!((&value["id"], &value["own_bytes"]), (&json!("0".repeat(32)), &json!(3 << 20)));
        assert_eq!((&value["created"], &value["purpose"]), (&json!(951_827_696), &json!("snapshot")));
    }
}
