//! PID 1: sets the guest up, serves until told to stop, powers off.

use std::io;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use spore_agent_api::{READY_PORT, RPC_PORT, STDIO_PORT};
use tokio::io::Interest;
use tokio::signal::unix::{SignalKind, signal};

use crate::boot::{modules, mounts};
use crate::container::registry::Registry;
use crate::identity::generation::Generation;
use crate::netlink::AcpiEvents;
use crate::network::namespace;
use crate::reaper::Reaper;
use crate::service::{self, Clock};
use crate::vsock::{self, VsockListener};
use crate::{power, say, stdio};

/// The host answers the ready connection within this time, or nobody listens.
const READY_DEADLINE: Duration = Duration::from_secs(5);
/// When modules are loaded that no container waits for: its start comes first.
const LATER: Duration = Duration::from_secs(3);
/// Mounts and unmounts of so many containers go on at a time.
const WORKERS: usize = 4;
const STACK: usize = 256 * 1024;

/// Runs the guest. Returns only when the kernel refuses to power off.
pub fn run() -> ExitCode {
    let started_ns = monotonic_ns();
    power::reset_on_panic();
    if let Err(error) = set_up() {
        say!("cannot set the guest up: {error}");
        power::reset();
    }
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(WORKERS)
        .thread_stack_size(STACK)
        .build();
    let served = runtime.and_then(|runtime| runtime.block_on(serve(started_ns)));
    if let Err(error) = served {
        say!("cannot serve: {error}");
        power::reset();
    }
    power::off()
}

fn set_up() -> io::Result<()> {
    nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(0o022));
    mounts::set_up()?;
    // Memory that runs out is a container's, never the agent's. Its helpers undo this.
    if let Err(error) = std::fs::write("/proc/self/oom_score_adj", "-1000") {
        say!("oom_score_adj: {error}");
    }
    modules::load_listed(modules::BOOT);
    // Containers that cannot join it say so themselves.
    namespace::make(Path::new(namespace::PATH)).unwrap_or_else(|error| say!("{error}"));
    Ok(())
}

/// Serves until the guest shall end, and has everything unmounted then.
async fn serve(started_ns: u64) -> io::Result<()> {
    let reaper = Reaper::new();
    let registry = Registry::new(Arc::clone(&reaper));
    let reaping = tokio::spawn(reaper.run());
    let bind = |port| {
        VsockListener::bind(port)
            .map_err(|error| io::Error::new(error.kind(), format!("listen on vsock port {port}: {error}")))
    };
    let (rpc, streams) = (bind(RPC_PORT)?, bind(STDIO_PORT)?);
    let clock = Arc::new(Clock { started_ns, ready_ns: AtomicU64::new(0) });
    let generation = Arc::new(Generation::default());
    tokio::spawn(Arc::clone(&generation).serve());
    let service = service::serve(rpc, Arc::clone(&registry), Arc::clone(&clock), generation).await?;
    let stdio = tokio::spawn(stdio::listener::serve(streams, Arc::clone(&registry)));
    let buttons = AcpiEvents::open().inspect_err(|error| say!("power button: {error}")).ok();
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    clock.ready_ns.store(monotonic_ns(), Ordering::Relaxed);
    let ready = tokio::spawn(stay_announced());
    tokio::spawn(async {
        tokio::time::sleep(LATER).await;
        tokio::task::spawn_blocking(|| modules::load_listed(modules::LATER)).await
    });

    let pressed = async {
        match &buttons {
            Some(events) => events.power_button().await.unwrap_or_else(|error| say!("power button: {error}")),
            None => std::future::pending().await,
        }
    };
    tokio::select! {
        failed = reaping => return Err(because("reaping", failed)),
        failed = stdio => return Err(because("accepting stdio connections", failed)),
        // Everything is unmounted already; the answer is on its way.
        () = service.shut_down() => {}
        () = pressed => registry.shut_down(power::BUTTON_GRACE).await,
        _ = terminate.recv() => registry.shut_down(power::BUTTON_GRACE).await,
        _ = interrupt.recv() => registry.shut_down(power::BUTTON_GRACE).await,
    }
    ready.abort();
    Ok(())
}

/// Why one of the two tasks without which there is no guest has ended.
fn because(what: &str, ended: Result<io::Error, tokio::task::JoinError>) -> io::Error {
    let error = ended.unwrap_or_else(io::Error::other);
    io::Error::new(error.kind(), format!("{what}: {error}"))
}

/// Tells the host that both ports listen, and again whenever the connection is reset: then the guest
/// has been restored, and the kernel has ended every connection of before.
async fn stay_announced() {
    while let Some(connection) = announce().await {
        match ended(connection).await {
            // Linux says ENOTCONN of a connection that the device has reset.
            Err(_) => {}
            // The host wants no more of it.
            Ok(()) => return,
        }
    }
}

/// Says the byte by which the host knows that this end, too, is connected, so that a reset can end it;
/// returns when the host closes the connection.
async fn ended(connection: std::os::fd::OwnedFd) -> io::Result<()> {
    // A reset is an error that is not readable: tokio's readers do not wake up for it.
    let interest = Interest::READABLE | Interest::ERROR;
    let connection = crate::sys::watch_for(connection, interest)?;
    nix::unistd::write(connection.get_ref(), &[0])?;
    loop {
        let mut guard = connection.ready(interest).await?;
        match nix::unistd::read(connection.get_ref(), &mut [0]) {
            Ok(_) => return Ok(()),
            Err(nix::errno::Errno::EAGAIN) => guard.clear_ready(),
            Err(error) => return Err(error.into()),
        }
    }
}

async fn announce() -> Option<std::os::fd::OwnedFd> {
    match tokio::time::timeout(READY_DEADLINE, vsock::connect_to_host(READY_PORT)).await {
        Ok(Ok(connection)) => Some(connection),
        Ok(Err(error)) => {
            say!("ready, but the host does not listen on vsock port {READY_PORT}: {error}");
            None
        }
        Err(_elapsed) => {
            say!("ready, but the host has not answered on vsock port {READY_PORT}");
            None
        }
    }
}

/// CLOCK_MONOTONIC in nanoseconds.
fn monotonic_ns() -> u64 {
    let now = nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC).map(Duration::from);
    u64::try_from(now.unwrap_or_default().as_nanos()).unwrap_or(u64::MAX)
}
