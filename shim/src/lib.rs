//! `containerd-shim-spore-v2`: the containerd shim of Spore (DESIGN 1, 7), as a library whose
//! public part is what the `spore` command (`src/bin/spore`) and the file server
//! (`src/bin/spore-fs`) share with it.
//!
//! One binary, several processes. containerd runs it with `start` (spawns the shim
//! daemon and answers its address), `delete` (reclaims whatever a dead shim left),
//! `-info` and `-v`. The daemon serves the Task API and owns one sandbox. It re-runs
//! the binary as `holder` (the process whose pid is the task's), `image-build` and
//! `image-mkfs` (conversion of layers to EROFS), `upper-fill` (what a guest changed). Only the
//! daemon has an async runtime.

pub mod api;
mod bootstrap;
mod bundle;
mod capabilities;
mod checkpoint;
mod clone;
mod config;
mod container;
mod delete;
mod error;
mod events;
mod files;
mod guest;
mod holder;
mod hooks;
mod io;
mod logging;
mod network;
mod options;
mod packets;
mod process;
mod rootfs;
mod rundir;
mod sandbox;
mod serve;
pub mod snapshot;
mod snapshots;
mod stats;
mod task;
mod template;
mod timeline;
mod vm;
mod volumes;
mod zygote;

use std::io::IsTerminal;
use std::process::ExitCode;

/// The name containerd derives this binary's name from.
pub const RUNTIME: &str = "io.containerd.spore.v2";

pub use capabilities::keep_only;
pub use clone::ANNOTATION as CLONE_FROM;
pub use config::{Config, ConfigError};
pub use error::chain;
pub use guest::clean;
pub use network::probe;
pub use rootfs::next_data;
pub use rundir::{Running, running};
pub use volumes::{is_writable_bind, protocol};

/// The whole program.
pub fn run() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let result = match arguments.first().map(String::as_str) {
        Some(holder::SUBCOMMAND) => holder::main(&arguments[1..]),
        Some(io::logger::SUBCOMMAND) => io::logger::main(&arguments[1..]),
        Some(rootfs::build::SUBCOMMAND) => rootfs::build::main(),
        Some(rootfs::changes::helper::SUBCOMMAND) => rootfs::changes::helper::main(&arguments[1..]),
        Some(rootfs::build::MKFS_SUBCOMMAND) => rootfs::build::mkfs_main(),
        _ => containerd(&arguments),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            // containerd shows this text to the user when `start` or `delete` fails, and goes on
            // in the same line.
            let end = if std::io::stderr().is_terminal() { "\n" } else { "" };
            eprint!("{RUNTIME}: {message}{end}");
            ExitCode::FAILURE
        }
    }
}

/// The command line that containerd knows.
fn containerd(arguments: &[String]) -> Result<(), String> {
    let started = timeline::now_ns();
    let flags = containerd_shim::parse(arguments).map_err(|error| format!("command line: {error}"))?;
    if flags.version {
        println!("containerd-shim-spore-v2:\n  Version: {}", env!("CARGO_PKG_VERSION"));
        return Ok(());
    }
    if flags.info {
        return bootstrap::info().map_err(|error| error.to_string());
    }
    for (name, value) in [("-namespace", &flags.namespace), ("-id", &flags.id)] {
        if value.is_empty() || value.contains('/') || value.starts_with('.') {
            return Err(format!(
                "command line: {name} is {value:?}, a non-empty name without '/' is needed; containerd passes it"
            ));
        }
    }
    match flags.action.as_str() {
        "start" => bootstrap::start(&flags, started).map_err(|error| error.to_string()),
        "delete" => delete::main(&flags).map_err(|error| error.to_string()),
        "" => serve::main(&flags).map_err(|error| error.to_string()),
        other => Err(format!("command line: unknown action {other:?}, expected \"start\" or \"delete\"")),
    }
}
