//! `spore template ls`.

use indicatif::BinaryBytes;
use serde_json::json;

use crate::Global;
use crate::failure::Failure;
use crate::show;
use crate::snapshot::store;

pub(super) fn run(global: &Global) -> Result<(), Failure> {
    let store = store()?;
    let templates = store.templates()?;
    let rows = templates.iter().map(|entry| (&entry.manifest, store.size(entry.manifest.id)));
    if global.json {
        let values = rows.map(|(manifest, size)| {
            json!({
                "name": manifest.name,
                "id": manifest.id,
                "container": manifest.container,
                "namespace": manifest.namespace,
                "created": manifest.created,
                "own_bytes": size.own,
                "shared_bytes": size.shared,
            })
        });
        return show::json(&values.collect());
    }
    let heading = ["TEMPLATE", "ID", "CONTAINER", "NAMESPACE", "CREATED", "OWN", "SHARED"];
    let mut table = vec![heading.map(str::to_owned).to_vec()];
    table.extend(rows.map(|(manifest, size)| {
        let seconds = i64::try_from(manifest.created).unwrap_or(i64::MAX);
        vec![
            show::name(manifest.name.as_deref().unwrap_or("-").as_bytes()),
            manifest.id.to_string(),
            show::name(manifest.container.as_bytes()),
            show::name(manifest.namespace.as_bytes()),
            show::time(seconds.saturating_mul(1_000_000_000)),
            BinaryBytes(size.own).to_string(),
            BinaryBytes(size.shared).to_string(),
        ]
    }));
    show::table(&table)
}
