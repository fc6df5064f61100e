//! The shim daemon: one thread, one async runtime, one socket.

use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::time::Duration;

use containerd_shim::Flags;
use slog::{Logger, info, warn};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::Notify;
use ttrpc::r#async::Server;
use ttrpc::r#async::transport::Listener;

use crate::bootstrap::{self, TTRPC_ADDRESS};
use crate::config::{Config, ConfigError};
use crate::events::Events;
use crate::process::{self, ProcessId};
use crate::rundir::RunDir;
use crate::sandbox::{Context, Sandbox};
use crate::task::{TaskService, services};
use crate::timeline::{START_VARIABLE, Timeline};
use crate::{files, logging, rootfs, snapshots};

/// How long the last events may take; containerd waits three seconds for the shim's end.
const FLUSH: Duration = Duration::from_secs(2);
/// How long the answers under way may take to leave.
const DISCONNECT: Duration = Duration::from_millis(500);

/// How long work on other threads may take to end.
const BLOCKING: Duration = Duration::from_secs(3);

#[derive(Debug, thiserror::Error)]
pub(crate) enum ServeError {
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error("{operation}: {source}")]
    Io { operation: &'static str, source: io::Error },
    #[error("environment variable {TTRPC_ADDRESS} is not set; containerd sets it")]
    NoAddress,
    #[error("serve the Task API: {0}")]
    Ttrpc(#[from] ttrpc::Error),
}

pub(crate) fn main(flags: &Flags) -> Result<(), ServeError> {
    let failed = |operation| move |source| ServeError::Io { operation, source };
    process::limit_heap_arenas();
    let config = Config::load()?;
    let (log, handle) = logging::open(&flags.namespace, &flags.id, flags.debug || config.debug);
    if let Err(error) = process::raise_oom_score_adj() {
        warn!(log, "the shim's OOM score stays containerd's"; "error" => %error);
    }
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(4)
        .thread_keep_alive(Duration::from_secs(1))
        .build()
        .map_err(failed("start the runtime"))?;
    let result = runtime.block_on(serve(flags, config, &log, &handle));
    if let Err(error) = &result {
        warn!(log, "the shim ends"; "error" => %error);
    }
    // Lets a template that is being made be finished or removed; a thread that waits for a
    // lock must not keep the shim.
    runtime.shutdown_timeout(BLOCKING);
    result
}

async fn serve(
    flags: &Flags,
    config: Config,
    log: &Logger,
    handle: &logging::Handle,
) -> Result<(), ServeError> {
    let failed = |operation| move |source| ServeError::Io { operation, source };
    let listener = take_listener().map_err(failed("take the listening socket from standard input"))?;
    let address = std::env::var(TTRPC_ADDRESS).map_err(|_| ServeError::NoAddress)?;
    let dir = RunDir::create(&config.run_dir, &flags.namespace, &flags.id)
        .and_then(|dir| dir.record(|record| record.shim = ProcessId::this().ok()).map(|()| dir))
        .map_err(failed("make the run-time directory"))?;
    let state_dir = config.state_dir.clone();

    let events = Events::start(address, flags.namespace.clone(), log.clone());
    let mut timeline = Timeline::default();
    if let Some(start) = std::env::var(START_VARIABLE).ok().and_then(|text| text.parse::<u64>().ok()) {
        timeline.set("shim_start_ns", start);
    }
    let context = Context {
        config,
        namespace: flags.namespace.clone(),
        id: flags.id.clone(),
        containerd: flags.address.clone(),
        events: events.clone(),
        log: log.clone(),
    };
    timeline.mark("serving_ns");
    let sandbox = Sandbox::new(context, timeline);
    let done = Arc::new(Notify::new());
    let service = TaskService { sandbox: Arc::clone(&sandbox), done: Arc::clone(&done) };
    let listener = Listener::try_from(listener).map_err(failed("listen"))?;
    let mut server = Server::new()
        .add_listener(listener)
        .register_service(services(service))
        .register_service(files::service(Arc::clone(&sandbox)))
        .register_service(snapshots::service(Arc::clone(&sandbox)));
    server.start().await?;
    info!(log, "serving");
    tokio::task::spawn_blocking(move || rootfs::collect_garbage(&state_dir));

    let mut terminate = signal(SignalKind::terminate()).map_err(failed("watch SIGTERM"))?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(failed("watch SIGINT"))?;
    tokio::select! {
        () = done.notified() => {
            info!(log, "shut down");
            // Where it cannot be recorded, the directory is gone and nothing is reclaimed.
            let _ = dir.record(|record| record.ending = true);
        }
        _ = terminate.recv() => {
            warn!(log, "SIGTERM: everything is ended");
            sandbox.abandon().await;
        }
        _ = interrupt.recv() => {
            warn!(log, "SIGINT: everything is ended");
            sandbox.abandon().await;
        }
    }
    sandbox.reclaimed().await;
    if !events.flush(FLUSH).await {
        warn!(log, "the last events could not be delivered in time");
    }
    bootstrap::remove_socket(&bootstrap::address(flags));
    // It is gone already when there was a container; another shim's is left alone.
    if let Err(error) = dir.remove()
        && error.kind() != io::ErrorKind::NotFound
    {
        warn!(log, "run-time directory not removed"; "path" => %dir.path().display(), "error" => %error);
    }
    handle.close();
    let _ = tokio::time::timeout(DISCONNECT, server.shutdown()).await;
    Ok(())
}

/// `start` passes the bound socket as standard input: containerd's connection waits in its
/// backlog while the daemon gets ready. Standard input becomes /dev/null.
fn take_listener() -> io::Result<UnixListener> {
    let listener = UnixListener::from(io::stdin().as_fd().try_clone_to_owned()?);
    listener.local_addr()?;
    let null = std::fs::File::open("/dev/null")?;
    nix::unistd::dup2_stdin(null)?;
    Ok(listener)
}
