//! Benchmarks, run on the ground against runc in the same machine, in alternation
//! (`make bench`; `spore-testbed run spore-bench SUITE`).
//!
//! Each suite prints a table and writes `SUITE.json` to the job's results: an array of
//! [`report::Row`].

mod coldstart;
mod datapath;
mod exec;
mod io;
mod kernels;
mod lab;
mod network;
mod report;
mod rounds;
mod snapshot;
mod stats;
mod template;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, ValueEnum};
use spore_harness::network::traffic;

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Suite {
    /// A whole `ctr run --rm`, its phases, and the memory of shim and VMM.
    Coldstart,
    /// Further processes in a running container: latency, and throughput of their output.
    Exec,
    /// Volumes and the writable layer: throughput and metadata.
    Io,
    /// Interfaces: throughput, latency, datagrams and what they cost.
    Network,
    /// Boot templates and container templates against runc, rollbacks against restores, and how long a container stands still for a
    /// snapshot as it sees it itself. Only on request.
    Template,
    /// Guest kernels under Spore: boot time and memory. Only on request.
    Kernels,
    /// The VMM's network data path with a bare-metal guest, on this machine's own `/dev/kvm`. Only on
    /// request.
    Datapath,
    /// Snapshots and restores of bare-metal guests, there too: pauses, times, and what the kernel alone takes. Only on
    /// request.
    Snapshot,
    /// The memory of many machines of one snapshot, there too. Only on request.
    Density,
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
    // What the containers of two suites run.
    let words: Vec<_> = std::env::args().skip(1).collect();
    let outcome = match words.split_first() {
        Some((verb, rest)) if verb == traffic::VERB => traffic::main(rest),
        Some((verb, [])) if verb == template::TICK => template::tick(),
        _ => run(&Cli::parse()),
    };
    match outcome {
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
    if wanted(Suite::Network) {
        report::publish("network", &network::run(cli.runtime.parse()?, cli.pairs, &results)?, &results)?;
    }
    if cli.suites.contains(&Suite::Template) {
        report::publish("template", &template::run(cli.pairs, &results)?, &results)?;
    }
    if cli.suites.contains(&Suite::Kernels) {
        report::publish("kernels", &kernels::run(cli.pairs, &results)?, &results)?;
    }
    if cli.suites.contains(&Suite::Datapath) {
        report::publish("datapath", &datapath::run(cli.pairs)?, &results)?;
    }
    if cli.suites.contains(&Suite::Snapshot) {
        report::publish("snapshot", &snapshot::run(cli.pairs)?, &results)?;
    }
    if cli.suites.contains(&Suite::Density) {
        report::publish("density", &snapshot::density()?, &results)?;
    }
    Ok(())
}
