//! Calls of programs: input, output, deadline, and no child that outlives its case.

use std::io::{Read, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::wait;

/// What a call may take unless its caller says otherwise.
const DEADLINE: Duration = Duration::from_secs(240);

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

    /// The same call at a terminal of its own, by script(1), of so many rows and columns; output
    /// and error output are one.
    #[must_use]
    pub fn in_terminal(self, rows: u16, columns: u16) -> Self {
        let line = format!("stty rows {rows} cols {columns}; exec {}", self.line());
        self.through("script", &["--quiet", "--return", "--command", &line, "/dev/null"])
    }

    /// The same call in a pipeline of a shell, whose status is the last command's.
    #[must_use]
    pub fn in_pipeline(self, before: &str, after: &str) -> Self {
        let line = format!("{before}{}{after}", self.line());
        self.through("sh", &["-c", &line])
    }

    /// The same call in a network namespace, with a directory of its own at `at`, which others do not see.
    #[must_use]
    pub fn in_namespace(self, namespace: &Path, directory: &Path, at: &Path) -> Self {
        let line = format!("mount --bind {} {} && exec {}", directory.display(), at.display(), self.line());
        let namespace = format!("--net={}", namespace.display());
        self.through("nsenter", &[&namespace, "--", "unshare", "--mount", "sh", "-c", &line])
    }

    /// The call as a shell reads it.
    fn line(&self) -> String {
        let quoted = |word: &std::ffi::OsStr| format!("'{}'", word.to_string_lossy().replace('\'', "'\\''"));
        let words = std::iter::once(self.command.get_program()).chain(self.command.get_args());
        words.map(quoted).collect::<Vec<_>>().join(" ")
    }

    fn through(mut self, program: &str, args: &[&str]) -> Self {
        let mut command = Command::new(program);
        command.args(args);
        for (name, value) in self.command.get_envs() {
            command.env(name, value.unwrap_or_default());
        }
        self.command = command;
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

    /// Starts it with pipes for the caller, who times what goes through them. Its error output
    /// is the caller's own.
    pub fn piped(mut self) -> Result<Piped> {
        let mut child = self
            .command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("starting {:?}", self.command.get_program()))?;
        match (child.stdin.take(), child.stdout.take()) {
            (Some(stdin), Some(stdout)) => Ok(Piped { stdin, stdout, _child: Ending(child) }),
            _ => bail!("no pipes to {:?}", self.command.get_program()),
        }
    }

    /// Runs it to its end.
    pub fn run(self) -> Result<Output> {
        self.spawn()?.wait()
    }
}

/// A call in progress whose pipes are its caller's; ends with the value.
pub struct Piped {
    pub stdin: ChildStdin,
    pub stdout: ChildStdout,
    _child: Ending,
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

    /// How long it took, in milliseconds.
    pub fn ms(&self) -> f64 {
        self.elapsed.as_secs_f64() * 1000.0
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
