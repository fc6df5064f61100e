//! Benchmarks, run on the ground against runc in the same machine, in alternation
//! (`make bench`; `spore-testbed run spore-bench SUITE`).
//!
//! Each suite prints a table and writes `SUITE.json` to the job's results: an array of
//! [`report::Row`].

mod coldstart;
mod exec;
mod io;
mod kernels;
mod lab;
mod report;
mod stats;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, ValueEnum};

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Suite {
    /// A whole `ctr run --rm`, its phases, and the memory of shim and VMM.
    Coldstart,
    /// Further processes in a running container: latency, and throughput of their output.
    Exec,
    /// Volumes and the writable layer: throughput and metadata.
    Io,
    /// Guest kernels under Spore: boot time and memory. Only on request.
    Kernels,
}

#[derive(Parser)]
#[command(name = "spore-bench", about = "Benchmarks of Spore against runc")]
struct Cli {
    /// Which to run; by default all that compare with runc.
    suites: Vec<Suite>,
    /// Pairs of runs that are counted, after one that is not.
    #[arg(long, default_value_t = 10)]
    pairs: usize,
    /// What is measured against runc. "runc" measures runc against itself: the noise.
    #[arg(long, default_value = "spore")]
    runtime: String,
}

fn main() -> ExitCode {
    match run(&Cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("spore-bench: error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(cli: &Cli) -> Result<()> {
    let results = std::env::var_os("SPORE_RESULTS").map_or_else(|| PathBuf::from("."), PathBuf::from);
    let wanted = |suite| cli.suites.is_empty() || cli.suites.contains(&suite);
    if wanted(Suite::Coldstart) {
        let rows = coldstart::run(cli.runtime.parse()?, cli.pairs, &results)?;
        report::publish("coldstart", &rows, &results)?;
    }
    if wanted(Suite::Exec) {
        report::publish("exec", &exec::run(cli.runtime.parse()?, cli.pairs, &results)?, &results)?;
    }
    if wanted(Suite::Io) {
        report::publish("io", &io::run(cli.runtime.parse()?, cli.pairs, &results)?, &results)?;
    }
    if cli.suites.contains(&Suite::Kernels) {
        report::publish("kernels", &kernels::run(cli.pairs, &results)?, &results)?;
    }
    Ok(())
}
