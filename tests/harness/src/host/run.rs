//! From a request to an exit status: decide the ground, prepare it, run, fetch results.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use super::{applications, cache, direct, machine::Machine, payload, qemu, rootfs};
use crate::ground::{self, Decision, Ground, ProbeKit};
use crate::job::Job;
use crate::shard::SHARD;

/// What to run on the ground.
pub struct Request {
    pub program: String,
    pub args: Vec<String>,
    pub env: BTreeMap<String, String>,
    pub deadline: Duration,
    /// Machines that share the work, where the ground is one: each gets its part by
    /// [`SHARD`](crate::shard::SHARD), and the program divides.
    pub machines: u8,
    /// Whether the ground gets the image of applications.
    pub applications: bool,
}

/// How a ground finished.
pub struct Finished {
    pub status: i32,
    /// Archive of the job's results and logs.
    pub files: Option<PathBuf>,
}

/// Checkout that this binary was built from: the files to test lie in its `target`.
pub fn repository() -> Result<PathBuf> {
    let start = std::env::current_dir()?;
    start
        .ancestors()
        .find(|directory| directory.join("Cargo.lock").exists() && directory.join("tests/harness").exists())
        .map(Path::to_owned)
        .with_context(|| format!("{} is not inside a checkout of Spore", start.display()))
}

/// Decides on the ground, with this binary as the probe's init.
pub fn decide(repository: &Path) -> Result<Decision> {
    let init = init_binary(repository)?;
    ground::decide(&ProbeKit {
        vmm: repository.join(payload::BINARIES).join("spore-vmm"),
        kernel: repository.join(payload::GUEST).join("vmlinuz"),
        init: &init,
    })
}

/// Runs; returns the program's exit status, the first bad one of several machines. Results
/// land in `target/testbed/PROGRAM`, those of several in `1`, `2`, ... there.
pub fn run(request: Request) -> Result<i32> {
    let repository = repository()?;
    let decision = decide(&repository)?;
    eprintln!("{}", decision.announce());
    let root = rootfs::prepare(&repository)?;
    let applications = request.applications.then(|| applications::prepare(&repository)).transpose()?;
    let payload = payload::prepare(&repository, applications.as_deref())?;
    let init = init_binary(&repository)?;
    let results = repository.join("target/testbed").join(name_of(&request.program));
    if results.exists() {
        fs::remove_dir_all(&results).with_context(|| format!("emptying {}", results.display()))?;
    }
    let mut job = Job {
        program: request.program,
        args: request.args,
        env: request.env,
        deadline_s: request.deadline.as_secs(),
        ground: decision.ground.to_string(),
    };
    let one = |job: &Job, results: &Path| {
        let run_directory = run_directory()?;
        let path = run_directory.path();
        let finished = match decision.ground {
            Ground::Outer(accelerator) => {
                let qemu = qemu::prepare(&repository)?;
                let (root, payload, init) = (&root, payload.as_path(), init.as_path());
                Machine { accelerator, qemu, root, payload, init, run_directory: path }.run(job)
            }
            Ground::Direct => direct::run(&root, &payload, &init, path, job),
        };
        fetch(path, results)?;
        let status = finished?.status;
        if status != 0 {
            let (program, results) = (&job.program, results.display());
            eprintln!("test bed: {program} ended with status {status}; logs: {results}");
        }
        Ok(status)
    };
    let machines = if decision.ground == Ground::Direct { 1 } else { request.machines };
    if machines <= 1 {
        return one(&job, &results);
    }
    thread::scope(|scope| {
        let started: Vec<_> = (1..=machines)
            .map(|number| {
                job.env.insert(SHARD.into(), format!("{number}/{machines}"));
                let (job, results, one) = (job.clone(), results.join(number.to_string()), &one);
                scope.spawn(move || one(&job, &results))
            })
            .collect();
        let statuses: Vec<i32> = started
            .into_iter()
            .map(|machine| machine.join().unwrap_or_else(|_| bail!("the thread of a machine panicked")))
            .collect::<Result<_>>()?;
        Ok(statuses.into_iter().find(|status| *status != 0).unwrap_or(0))
    })
}

fn init_binary(repository: &Path) -> Result<PathBuf> {
    let path = repository.join(payload::BINARIES).join("spore-testbed");
    if !path.exists() {
        bail!("{} is missing; build it: cargo build --release -p spore-harness", path.display());
    }
    Ok(path)
}

fn name_of(program: &str) -> &str {
    program.rsplit('/').next().unwrap_or(program)
}

/// A directory for one run. Those of runs that were killed are removed.
fn run_directory() -> Result<tempfile::TempDir> {
    let runs = cache::directory()?.join("runs");
    fs::create_dir_all(&runs)?;
    for entry in fs::read_dir(&runs)? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        let owner = name.split('-').next().unwrap_or_default();
        if !Path::new("/proc").join(owner).exists() {
            fs::remove_dir_all(entry.path()).ok();
        }
    }
    Ok(tempfile::Builder::new().prefix(&format!("{}-", std::process::id())).tempdir_in(runs)?)
}

/// Unpacks what the ground sent into `results`.
fn fetch(run_directory: &Path, results: &Path) -> Result<()> {
    fs::create_dir_all(results)?;
    let console = run_directory.join("outer-console.log");
    if console.exists() {
        fs::copy(&console, results.join("outer-console.log"))?;
    }
    let files = run_directory.join("files.tar");
    if fs::metadata(&files).is_ok_and(|metadata| metadata.len() > 0) {
        // The archive of a ground that was killed may be cut: what is there still helps.
        let tar = Command::new("tar")
            .arg("-xf")
            .arg(&files)
            .arg("-C")
            .arg(results)
            .status()
            .context("starting tar")?;
        if !tar.success() {
            eprintln!("test bed: the results in {} are incomplete", results.display());
        }
    }
    Ok(())
}
