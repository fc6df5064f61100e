//! `delete`: reclaims what is left of a sandbox, whatever became of its shim. containerd
//! runs it after every shim's end, also after a regular one, so it has to be quick when
//! there is nothing to do.

use std::error::Error;
use std::io::{self, Write};
use std::path::Path;
use std::time::{Duration, SystemTime};

use containerd_shim::Flags;
use containerd_shim_protos::api::DeleteResponse;
use protobuf::Message;

use crate::bootstrap;
use crate::bundle::Bundle;
use crate::checkpoint;
use crate::config::Config;
use crate::container::timestamp;
use crate::hooks::Point;
use crate::rootfs;
use crate::rundir::{self, RunDir};
use crate::snapshot::Store;

/// 128 + SIGKILL: what runc's shim reports here.
const KILLED: u32 = 137;
/// Snapshots that one `delete` removes at most: the next one goes on.
const PRUNED: usize = 4;
/// For all hooks together: containerd gives `delete` five seconds.
const HOOKS: Duration = Duration::from_secs(3);

/// Takes down what the first hooks have set up, which a shim that was killed could not. One that is killed
/// between its own poststop and its end has them run a second time.
fn poststop(bundle: &Path, id: &str, pid: u32) -> Result<(), Box<dyn Error>> {
    let bundle = Bundle::load(bundle)?;
    let told = bundle.told(id, pid);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let run = async { tokio::time::timeout(HOOKS, bundle.hooks.run(Point::Poststop, &told)).await };
    Ok(runtime.block_on(run).map_err(|_| format!("poststop hooks: not done within {HOOKS:?}"))??)
}

#[derive(Debug, thiserror::Error)]
pub(crate) enum DeleteError {
    #[error("delete: encode the answer: {0}")]
    Encode(#[from] protobuf::Error),
    #[error("delete: write the answer: {0}")]
    Write(#[from] io::Error),
}

pub(crate) fn main(flags: &Flags) -> Result<(), DeleteError> {
    // A configuration that cannot be read must not keep a sandbox from being reclaimed.
    let config = Config::load().unwrap_or_else(|error| {
        eprintln!("{error}; using the default directories");
        Config::default()
    });
    let (record, problems) = rundir::reclaim(&RunDir::path_of(&config.run_dir, &flags.namespace, &flags.id));
    for problem in problems {
        eprintln!("delete {}: {problem}", flags.id);
    }
    bootstrap::remove_socket(&bootstrap::address(flags));
    let bundle = if flags.bundle.is_empty() { Path::new(".") } else { Path::new(&flags.bundle) };
    if let Ok(address) = std::fs::read_to_string(bundle.join("address")) {
        bootstrap::remove_socket(address.trim());
    }
    rootfs::collect_garbage(&config.state_dir);
    rootfs::sweep(&config.state_dir);
    if let Some(holder) = record.holder.filter(|_| !record.ending)
        && let Err(problem) = poststop(bundle, &flags.id, holder.pid)
    {
        eprintln!("delete {}: {problem}", flags.id);
    }
    // Last: the sandbox is gone, whatever comes of this.
    let store = Store::new(&config.state_dir);
    let own = (flags.namespace.as_str(), flags.id.as_str());
    let forgotten = match record.has_hibernated {
        true => checkpoint::forget_hibernations(&store, &config.run_dir, own, None),
        false => Ok(()),
    };
    if let Err(error) = forgotten.and_then(|()| checkpoint::prune(&store, Some(PRUNED))) {
        eprintln!("delete {}: {error}", flags.id);
    }
    let response = DeleteResponse {
        pid: record.holder.map_or(0, |holder| holder.pid),
        exit_status: KILLED,
        exited_at: timestamp(SystemTime::now()),
        ..Default::default()
    };
    io::stdout().write_all(&response.write_to_bytes()?)?;
    Ok(())
}
