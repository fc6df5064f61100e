//! Private containerd instances on the ground, one per series, and `ctr` with deadlines.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::wait;

/// A start takes 4 s on an emulated CPU when nothing else runs.
const START: Duration = Duration::from_secs(90);
/// What a call may take unless its caller says otherwise.
const DEADLINE: Duration = Duration::from_secs(240);
const STOP: Duration = Duration::from_secs(30);

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
    process: Child,
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
        let log_file = File::create(log).with_context(|| format!("creating {}", log.display()))?;
        let process = Command::new(binary(series, "containerd"))
            .arg("--config")
            .arg(&config)
            .env("PATH", path(series))
            .stdin(Stdio::null())
            .stdout(log_file.try_clone()?)
            .stderr(log_file)
            .spawn()
            .with_context(|| format!("starting containerd {series}"))?;
        let mut started = Self {
            series: series.to_owned(),
            directory: directory.to_owned(),
            namespace: format!("test{}", series.replace('.', "")),
            process,
        };
        started.wait_until_it_answers(log)?;
        Ok(started)
    }

    fn wait_until_it_answers(&mut self, log: &Path) -> Result<()> {
        let socket = self.directory.join("containerd.sock");
        let what = format!("containerd {} answers (log: {})", self.series, log.display());
        let process = &mut self.process;
        let ended = wait::until(&what, START, || match process.try_wait() {
            Ok(None) => socket.exists().then_some(None),
            Ok(Some(status)) => Some(Some(status)),
            Err(_) => None,
        })?;
        if let Some(status) = ended {
            bail!("containerd {} ended at once: {status} (log: {})", self.series, log.display());
        }
        // The socket stands before the services behind it.
        wait::until(&what, START, || self.ctr(&["version"]).run().ok().filter(Output::success))?;
        Ok(())
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

    pub fn bundle(&self, id: &str) -> PathBuf {
        self.state().join("io.containerd.runtime.v2.task").join(&self.namespace).join(id)
    }

    pub fn pid(&self) -> u32 {
        self.process.id()
    }

    /// A `ctr` call against this instance.
    pub fn ctr<S: AsRef<str>>(&self, args: &[S]) -> Call {
        let mut command = Command::new(binary(&self.series, "ctr"));
        command.arg("--address").arg(self.directory.join("containerd.sock"));
        command.args(["--namespace", &self.namespace]);
        command.args(args.iter().map(AsRef::as_ref)).env("PATH", path(&self.series));
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
        let pid = Pid::from_raw(i32::try_from(self.process.id()).unwrap_or(i32::MAX));
        if kill(pid, Signal::SIGTERM).is_ok() {
            wait::child("containerd stops", &mut self.process, STOP).ok();
        }
    }
}

/// A call of a program with its deadline.
pub struct Call {
    command: Command,
    stdin: Option<Vec<u8>>,
    keep_stdin: bool,
    deadline: Duration,
}

impl Call {
    #[must_use]
    pub fn new(command: Command) -> Self {
        Self { command, stdin: None, keep_stdin: false, deadline: DEADLINE }
    }

    #[must_use]
    pub fn stdin(mut self, bytes: impl Into<Vec<u8>>) -> Self {
        self.stdin = Some(bytes.into());
        self
    }

    #[must_use]
    pub fn deadline(mut self, deadline: Duration) -> Self {
        self.deadline = deadline;
        self
    }

    /// Starts it without waiting.
    pub fn spawn(mut self) -> Result<Running> {
        let begin = Instant::now();
        let stdin = if self.stdin.is_some() || self.keep_stdin { Stdio::piped() } else { Stdio::null() };
        let mut child = self
            .command
            .stdin(stdin)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("starting {:?}", self.command.get_program()))?;
        let mut stdin = child.stdin.take();
        if let (Some(bytes), Some(mut pipe)) = (self.stdin.take(), stdin.take_if(|_| !self.keep_stdin)) {
            // A program that does not read to the end breaks the pipe, which is its right.
            thread::spawn(move || pipe.write_all(&bytes).ok());
        }
        let stdout = Drain::start(child.stdout.take());
        let stderr = Drain::start(child.stderr.take());
        Ok(Running {
            child: Ending(child),
            stdin,
            stdout,
            stderr,
            begin,
            deadline: self.deadline,
            what: format!("{:?}", self.command),
        })
    }

    /// Starts it with its standard input open, for [`Running::feed`].
    pub fn spawn_with_open_stdin(mut self) -> Result<Running> {
        self.keep_stdin = true;
        self.spawn()
    }

    /// Runs it to its end.
    pub fn run(self) -> Result<Output> {
        self.spawn()?.wait()
    }
}

/// What a pipe has given so far, and the thread that reads it.
struct Drain {
    bytes: Arc<Mutex<Vec<u8>>>,
    thread: thread::JoinHandle<()>,
}

impl Drain {
    fn start(pipe: Option<impl Read + Send + 'static>) -> Self {
        let bytes = Arc::new(Mutex::new(Vec::new()));
        let sink = Arc::clone(&bytes);
        let thread = thread::spawn(move || {
            let Some(mut pipe) = pipe else { return };
            let mut buffer = vec![0; 256 * 1024];
            while let Ok(count @ 1..) = pipe.read(&mut buffer) {
                lock(&sink).extend_from_slice(&buffer[..count]);
            }
        });
        Self { bytes, thread }
    }

    fn so_far(&self) -> Vec<u8> {
        lock(&self.bytes).clone()
    }

    fn finish(self) -> Vec<u8> {
        self.thread.join().ok();
        std::mem::take(&mut *lock(&self.bytes))
    }
}

fn lock(bytes: &Mutex<Vec<u8>>) -> MutexGuard<'_, Vec<u8>> {
    bytes.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A child that does not outlive the value: a case that fails half-way leaves none behind.
struct Ending(Child);

impl Drop for Ending {
    fn drop(&mut self) {
        if matches!(self.0.try_wait(), Ok(None)) {
            self.0.kill().ok();
            self.0.wait().ok();
        }
    }
}

/// A call in progress.
pub struct Running {
    child: Ending,
    stdin: Option<ChildStdin>,
    stdout: Drain,
    stderr: Drain,
    begin: Instant,
    deadline: Duration,
    what: String,
}

impl Running {
    pub fn pid(&self) -> u32 {
        self.child.0.id()
    }

    /// Its standard output until now.
    pub fn stdout(&self) -> String {
        String::from_utf8_lossy(&self.stdout.so_far()).into_owned()
    }

    /// Waits until its standard output contains `text`.
    pub fn says(&mut self, text: &str) -> Result<()> {
        let what = format!("{text:?} in the output of {}", self.what);
        let ended = wait::until(&what, self.deadline, || {
            // In this order: what it said before its end counts.
            let ended = self.child.0.try_wait().ok().flatten();
            if self.stdout().contains(text) { Some(None) } else { ended.map(Some) }
        })?;
        match ended {
            None => Ok(()),
            Some(status) => bail!(
                "{} ended ({status}) before it said {text:?}; stdout: {:?}; stderr: {:?}",
                self.what,
                self.stdout(),
                String::from_utf8_lossy(&self.stderr.so_far()),
            ),
        }
    }

    /// Writes to its standard input.
    pub fn feed(&mut self, bytes: &[u8]) -> Result<()> {
        let Some(stdin) = &mut self.stdin else { bail!("{} has no open standard input", self.what) };
        stdin.write_all(bytes)?;
        Ok(stdin.flush()?)
    }

    /// Ends its standard input.
    pub fn close_stdin(&mut self) {
        self.stdin = None;
    }

    /// Ends it by force.
    pub fn kill(mut self) -> Result<Output> {
        self.child.0.kill()?;
        self.wait()
    }

    /// Whether it has ended.
    pub fn ended(&mut self) -> Result<bool> {
        Ok(self.child.0.try_wait()?.is_some())
    }

    pub fn wait(mut self) -> Result<Output> {
        self.stdin = None;
        let status = wait::child(&format!("end of {}", self.what), &mut self.child.0, self.deadline);
        let elapsed = self.begin.elapsed();
        let (stdout, stderr) = (self.stdout.finish(), self.stderr.finish());
        match status {
            Ok(status) => Ok(Output { status, stdout, stderr, elapsed }),
            Err(error) => {
                let said = String::from_utf8_lossy(&stderr).into_owned();
                Err(error.context(format!("standard error until then: {said}")))
            }
        }
    }
}

/// How a call ended.
#[derive(Debug)]
pub struct Output {
    pub status: ExitStatus,
    pub stdout: Vec<u8>,
    pub stderr: Vec<u8>,
    pub elapsed: Duration,
}

impl Output {
    pub fn success(&self) -> bool {
        self.status.success()
    }

    /// Exit status; -1 when a signal ended it.
    pub fn code(&self) -> i32 {
        self.status.code().unwrap_or(-1)
    }

    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }

    pub fn errors(&self) -> String {
        String::from_utf8_lossy(&self.stderr).into_owned()
    }
}

impl std::fmt::Display for Output {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let cut = |bytes: &[u8]| {
            let text = String::from_utf8_lossy(&bytes[..bytes.len().min(2000)]).into_owned();
            if bytes.len() > 2000 { format!("{text}... ({} bytes)", bytes.len()) } else { text }
        };
        write!(f, "{}; stdout: {:?}; stderr: {:?}", self.status, cut(&self.stdout), cut(&self.stderr))
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
