//! Private containerd instances on the ground, one per series, and `ctr` with deadlines.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::call::{Call, Output};
use crate::wait;

/// A start takes 4 s on an emulated CPU when nothing else runs.
const START: Duration = Duration::from_secs(90);
const STOP: Duration = Duration::from_secs(30);
const SPORE: &str = "/usr/local/bin/spore";

/// The two runtimes that are compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Runtime {
    Runc,
    Spore,
}

impl Runtime {
    /// The name that containerd's clients give.
    pub fn id(self) -> &'static str {
        match self {
            Self::Runc => "io.containerd.runc.v2",
            Self::Spore => "io.containerd.spore.v2",
        }
    }

    pub fn name(self) -> &'static str {
        match self {
            Self::Runc => "runc",
            Self::Spore => "spore",
        }
    }
}

impl std::str::FromStr for Runtime {
    type Err = anyhow::Error;

    fn from_str(name: &str) -> Result<Self> {
        match name {
            "runc" => Ok(Self::Runc),
            "spore" => Ok(Self::Spore),
            _ => bail!("runtime \"{name}\" is not known; it may be spore or runc"),
        }
    }
}

/// Series for the demo and the benchmarks: Debian stable's when the ground has it, else the newest.
pub fn preferred_series() -> Result<String> {
    let all = series()?;
    let chosen = all.iter().find(|found| *found == "1.7").or(all.last());
    chosen.cloned().context("the ground has no containerd")
}

/// Series of containerd that the ground has, oldest first.
pub fn series() -> Result<Vec<String>> {
    let mut found: Vec<String> = fs::read_dir("/opt")
        .context("reading /opt (is this the ground? start through spore-testbed run)")?
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.strip_prefix("containerd-").map(str::to_owned))
        .collect();
    found.sort();
    Ok(found)
}

/// A running containerd. Ends with the value.
pub struct Containerd {
    series: String,
    directory: PathBuf,
    /// All that its clients do happens here.
    namespace: String,
    process: Mutex<Child>,
    log: PathBuf,
}

fn launch(series: &str, config: &Path, log: &Path) -> Result<Child> {
    let log = File::options().append(true).open(log)?;
    Command::new(binary(series, "containerd"))
        .arg("--config")
        .arg(config)
        .env("PATH", path(series))
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        .spawn()
        .with_context(|| format!("starting containerd {series}"))
}

impl Containerd {
    /// Starts a series with root and state below `directory`; waits until it answers.
    pub fn start(series: &str, directory: &Path, log: &Path) -> Result<Self> {
        for part in ["root", "state"] {
            fs::create_dir_all(directory.join(part))?;
        }
        let config = directory.join("config.toml");
        fs::write(&config, configuration(series, directory))?;
        if let Some(parent) = log.parent() {
            fs::create_dir_all(parent)?;
        }
        File::create(log).with_context(|| format!("creating {}", log.display()))?;
        let started = Self {
            series: series.to_owned(),
            directory: directory.to_owned(),
            namespace: format!("test{}", series.replace('.', "")),
            process: Mutex::new(launch(series, &config, log)?),
            log: log.to_owned(),
        };
        started.wait_until_it_answers()?;
        Ok(started)
    }

    /// Kills it by force and starts it again over what it left.
    pub fn restart(&self) -> Result<()> {
        self.away(|| Ok(()))
    }

    /// The same, with something done while it is away.
    pub fn away<T>(&self, act: impl FnOnce() -> Result<T>) -> Result<T> {
        {
            let mut process = self.process();
            process.kill()?;
            process.wait()?;
        }
        fs::remove_file(self.socket()).ok();
        let outcome = act();
        *self.process() = launch(&self.series, &self.directory.join("config.toml"), &self.log)?;
        self.wait_until_it_answers()?;
        outcome
    }

    fn process(&self) -> MutexGuard<'_, Child> {
        self.process.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait_until_it_answers(&self) -> Result<()> {
        let socket = self.socket();
        let what = format!("containerd {} answers (log: {})", self.series, self.log.display());
        let ended = wait::until(&what, START, || match self.process().try_wait() {
            Ok(None) => socket.exists().then_some(None),
            Ok(Some(status)) => Some(Some(status)),
            Err(_) => None,
        })?;
        if let Some(status) = ended {
            bail!("containerd {} ended at once: {status} (log: {})", self.series, self.log.display());
        }
        // The socket stands before the services behind it.
        wait::until(&what, START, || self.ctr(&["version"]).run().ok().filter(Output::success))?;
        Ok(())
    }

    /// What it says, and what its shims log.
    pub fn log(&self) -> &Path {
        &self.log
    }

    /// Where its clients connect.
    pub fn socket(&self) -> PathBuf {
        self.directory.join("containerd.sock")
    }

    pub fn series(&self) -> &str {
        &self.series
    }

    pub fn namespace(&self) -> &str {
        &self.namespace
    }

    /// Its state directory: bundles lie in `io.containerd.runtime.v2.task/NAMESPACE/ID`.
    pub fn state(&self) -> PathBuf {
        self.directory.join("state")
    }

    /// Where the overlayfs snapshotter keeps rootfs snapshots, and Spore writable layers in them.
    pub fn snapshots(&self) -> PathBuf {
        self.directory.join("root/io.containerd.snapshotter.v1.overlayfs/snapshots")
    }

    pub fn bundle(&self, id: &str) -> PathBuf {
        self.state().join("io.containerd.runtime.v2.task").join(&self.namespace).join(id)
    }

    /// PATH of what uses this instance.
    pub fn path(&self) -> String {
        path(&self.series)
    }

    pub fn pid(&self) -> u32 {
        self.process().id()
    }

    /// A `ctr` call against this instance.
    pub fn ctr<S: AsRef<str>>(&self, args: &[S]) -> Call {
        let mut command = Command::new(binary(&self.series, "ctr"));
        command.arg("--address").arg(self.socket());
        command.args(["--namespace", &self.namespace]);
        command.args(args.iter().map(AsRef::as_ref)).env("PATH", path(&self.series));
        Call::new(command)
    }

    /// A call of the `spore` command against this instance.
    pub fn spore<S: AsRef<str>>(&self, args: &[S]) -> Call {
        self.spore_in(&self.namespace, args)
    }

    /// The same in another namespace.
    pub fn spore_in<S: AsRef<str>>(&self, namespace: &str, args: &[S]) -> Call {
        let mut command = Command::new(SPORE);
        command.arg("--address").arg(self.socket());
        command.args(["--namespace", namespace]);
        command.args(args.iter().map(AsRef::as_ref));
        Call::new(command)
    }

    /// `ctr` that must succeed; its standard output.
    pub fn must<S: AsRef<str>>(&self, args: &[S]) -> Result<String> {
        let output = self.ctr(args).run()?;
        if !output.success() {
            let args: Vec<_> = args.iter().map(AsRef::as_ref).collect();
            bail!("ctr {} (containerd {}): {output}", args.join(" "), self.series);
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// Imports an archive of images and unpacks them for a snapshotter.
    pub fn import(&self, archive: &Path, snapshotter: &str, options: &[&str]) -> Result<()> {
        let archive = archive.to_string_lossy();
        let mut args = vec!["image", "import", "--snapshotter", snapshotter];
        args.extend(options);
        args.push(&archive);
        self.must(&args).map(drop)
    }
}

impl Drop for Containerd {
    fn drop(&mut self) {
        let mut process = self.process();
        let pid = Pid::from_raw(i32::try_from(process.id()).unwrap_or(i32::MAX));
        if kill(pid, Signal::SIGTERM).is_ok() {
            wait::child("containerd stops", &mut process, STOP).ok();
        }
    }
}

fn binary(series: &str, name: &str) -> PathBuf {
    PathBuf::from(format!("/opt/containerd-{series}/bin/{name}"))
}

/// The series' own runc shim first, then Spore's.
fn path(series: &str) -> String {
    format!("/opt/containerd-{series}/bin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
}

/// Version 2 of the configuration is read by every series from 1.6 to 2.1.
fn configuration(series: &str, directory: &Path) -> String {
    let directory = directory.display();
    let mut text = format!(
        r#"version = 2
root = "{directory}/root"
state = "{directory}/state"
disabled_plugins = [
  "io.containerd.grpc.v1.cri", "io.containerd.cri.v1.images", "io.containerd.cri.v1.runtime",
  "io.containerd.internal.v1.opt", "io.containerd.nri.v1.nri", "io.containerd.internal.v1.tracing",
  "io.containerd.snapshotter.v1.aufs", "io.containerd.snapshotter.v1.btrfs", "io.containerd.snapshotter.v1.zfs",
  "io.containerd.snapshotter.v1.devmapper", "io.containerd.snapshotter.v1.blockfile",
]
[grpc]
  address = "{directory}/containerd.sock"
[ttrpc]
  address = "{directory}/containerd.sock.ttrpc"
"#
    );
    if series.starts_with("2.") {
        text.push_str(
            "[plugins.\"io.containerd.service.v1.diff-service\"]\n  default = [\"walking\", \"erofs\"]\n\
             [plugins.\"io.containerd.differ.v1.erofs\"]\n  mkfs_options = []\n",
        );
    }
    text
}
