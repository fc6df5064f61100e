//! `spore-testbed`: runs a program on the ground that tests need, wherever it is started.
//!
//! Standard output carries what the program prints and nothing else; what the test bed itself
//! has to say goes to standard error. The exit status is the program's, or 70 when the test
//! bed failed.

use std::collections::BTreeMap;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::{Parser, Subcommand};
use spore_harness::host::{payload, rootfs, run};
use spore_harness::{demo, inside};

/// EX_SOFTWARE of sysexits.h: the test bed's own failure, unlike any test's.
const STATUS_BROKEN: u8 = 70;

#[derive(Parser)]
#[command(name = "spore-testbed", about = "Runs programs on the ground that Spore's tests need")]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Say which ground programs run on here, and why.
    Ground,
    /// Make what the ground needs, without running anything.
    Prepare,
    /// Run a program on the ground: one of the payload (spore-e2e, spore-bench, ...) or a path.
    Run {
        /// Seconds that the program may take.
        #[arg(long, default_value_t = 900)]
        deadline: u64,
        /// NAME=VALUE for the program's environment; may be repeated.
        #[arg(long)]
        env: Vec<String>,
        /// Outer machines that share the work of a program that can divide it (SPORE_SHARD).
        #[arg(long, default_value_t = 1)]
        machines: u8,
        /// Give the ground an image of applications that take a while to start (`spore-bench template`).
        #[arg(long)]
        applications: bool,
        program: String,
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<String>,
    },
    /// Show containers running in microVMs (`make demo`).
    Demo {
        /// runc shows the test bed itself.
        #[arg(long, default_value = "spore")]
        runtime: String,
    },
    /// The part of the demo that runs on the ground.
    #[command(hide = true)]
    Tour {
        #[arg(long)]
        runtime: String,
        #[arg(long)]
        host: String,
    },
    /// PID 1 of a ground on the host.
    #[command(hide = true)]
    Stage(inside::direct::Paths),
}

fn main() -> ExitCode {
    if std::process::id() == 1 && std::env::args_os().next().is_some_and(|name| name == "/init") {
        inside::init::main();
    }
    match act(Cli::parse().verb) {
        Ok(status) => ExitCode::from(status),
        Err(error) => {
            eprintln!("spore-testbed: error: {error:#}");
            ExitCode::from(STATUS_BROKEN)
        }
    }
}

fn act(verb: Verb) -> Result<u8> {
    match verb {
        Verb::Ground => {
            println!("{}", run::decide(&run::repository()?)?.announce());
            Ok(0)
        }
        Verb::Prepare => {
            let repository = run::repository()?;
            println!("{}", rootfs::prepare(&repository)?.disk().display());
            println!("{}", payload::prepare(&repository, None)?.display());
            Ok(0)
        }
        Verb::Run { deadline, env, machines, applications, program, args } => {
            let env = env
                .iter()
                .map(|pair| pair.split_once('=').map(|(name, value)| (name.to_owned(), value.to_owned())))
                .collect::<Option<BTreeMap<_, _>>>()
                .context("--env takes NAME=VALUE")?;
            let deadline = Duration::from_secs(deadline);
            start(run::Request { program, args, env, deadline, machines, applications })
        }
        Verb::Demo { runtime } => start(demo::request(runtime)?),
        Verb::Tour { runtime, host } => demo::tour(&runtime, &host).map(|()| 0),
        Verb::Stage(paths) => inside::direct::main(&paths).map(|()| 0),
    }
}

fn start(request: run::Request) -> Result<u8> {
    // Statuses of processes fit into a byte.
    Ok(u8::try_from(run::run(request)?).unwrap_or(STATUS_BROKEN))
}
