//! `spore ps`: the containers that run with Spore, as containerd lists them.

use std::collections::HashMap;

use containerd_client::services::v1::ListTasksRequest;
use containerd_client::types::v1::Status;
use containerd_shim_spore::{Config, Running, running};
use serde_json::json;

use crate::Global;
use crate::containerd::{Containerd, Namespace};
use crate::failure::{Failure, of_containerd};
use crate::show;

const PAUSED: &str = "paused";

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Those of every namespace
    #[arg(short = 'A', long)]
    all_namespaces: bool,
}

/// What is told of one.
struct Row {
    namespace: String,
    id: String,
    image: String,
    /// containerd's.
    status: &'static str,
    pid: Option<u32>,
    running: Running,
}

impl Row {
    /// containerd knows of a task without a machine only that it is paused.
    fn status(&self) -> &'static str {
        if self.status == PAUSED && self.running.hibernates_in.is_some() { "hibernated" } else { self.status }
    }
}

pub(crate) async fn run(global: &Global, args: Args) -> Result<u8, Failure> {
    let containerd = Containerd::connect(global).await?;
    // Where the configuration is broken there are no sizes to tell, but containers nevertheless.
    let run_dir = Config::load().unwrap_or_default().run_dir;
    let names =
        if args.all_namespaces { containerd.namespaces().await? } else { vec![global.namespace.clone()] };
    let mut rows = Vec::new();
    for name in names {
        let namespace = Namespace::new(&name)?;
        let tasks = tasks(&containerd, &namespace).await?;
        for container in containerd.containers(&namespace).await? {
            let (status, pid) = tasks.get(&container.id).copied().unwrap_or(("no task", 0));
            rows.push(Row {
                namespace: name.clone(),
                running: running(&run_dir, &name, &container.id),
                id: container.id,
                image: container.image,
                status,
                pid: (pid != 0).then_some(pid),
            });
        }
    }
    rows.sort_by(|a, b| (&a.namespace, &a.id).cmp(&(&b.namespace, &b.id)));
    if global.json { show::json(&rows.iter().map(as_json).collect()) } else { show_table(&rows) }.map(|()| 0)
}

/// Status and pid of each task.
async fn tasks(
    containerd: &Containerd,
    namespace: &Namespace,
) -> Result<HashMap<String, (&'static str, u32)>, Failure> {
    let request = namespace.call(ListTasksRequest { filter: String::new() });
    let answer = containerd.client.tasks().list(request).await;
    let tasks = answer.map_err(of_containerd(&containerd.address, "list tasks"))?.into_inner().tasks;
    // Lists name a task by its id, answers about one by the container's.
    let told = tasks.into_iter().map(|task| {
        let status = match Status::try_from(task.status) {
            Ok(Status::Created) => "created",
            Ok(Status::Running) => "running",
            Ok(Status::Stopped) => "stopped",
            Ok(Status::Paused | Status::Pausing) => PAUSED,
            Ok(Status::Unknown) | Err(_) => "unknown",
        };
        (if task.id.is_empty() { task.container_id } else { task.id }, (status, task.pid))
    });
    Ok(told.collect())
}

fn as_json(row: &Row) -> serde_json::Value {
    json!({
        "namespace": row.namespace,
        "id": row.id,
        "image": row.image,
        "status": row.status(),
        "pid": row.pid,
        "vcpus": row.running.vcpus,
        "memory_mib": row.running.memory_mib,
    })
}

fn show_table(rows: &[Row]) -> Result<(), Failure> {
    let heading = ["NAMESPACE", "CONTAINER", "IMAGE", "STATUS", "PID", "VCPUS", "MEMORY"];
    let mut table = vec![heading.map(str::to_owned).to_vec()];
    let or_none = |value: Option<String>| value.unwrap_or_else(|| "-".into());
    for row in rows {
        let Row { namespace, id, image, pid, running, .. } = row;
        let text = |text: &str| if text.is_empty() { "-".into() } else { show::name(text.as_bytes()) };
        table.push(vec![
            text(namespace),
            text(id),
            text(image),
            row.status().to_owned(),
            or_none(pid.map(|pid| pid.to_string())),
            or_none(running.vcpus.map(|vcpus| vcpus.to_string())),
            or_none(running.memory_mib.map(|mib| format!("{mib} MiB"))),
        ]);
    }
    show::table(&table)
}
